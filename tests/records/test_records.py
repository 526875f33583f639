import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from cpfean.errors import ConfigError
from cpfean.records.run_folder import RunFolder, newest_unfinished
from cpfean.records.trial_record import TUNING, TrialRecord, relocated
from tests.orchestration.samples import record

ROOT = Path(__file__).resolve().parents[3]
IDENTITY = {"kind": "sweep", "trials": 4, "config": {"loss": {"margin": 0.2}}, "space": [1, 2]}


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    folder = RunFolder(tmp_path / "run")
    folder.create(IDENTITY)
    return folder


def test_a_record_is_read_back_as_it_was_written(folder: RunFolder) -> None:
    written = record(3, 10.0, 30.0, 20.0, state="pruned", overrides={"loss.margin": 0.3})
    folder.write(written)
    (read,) = folder.records()
    assert read == written
    assert read.best_rsum == 30.0
    assert read.settled


def test_the_same_request_is_resumed_and_another_one_is_refused_with_all_differences(
    folder: RunFolder,
) -> None:
    folder.check_same(IDENTITY)
    other = json.loads(json.dumps(IDENTITY)) | {"trials": 5, "space": [1, 3]}
    other["config"]["loss"]["margin"] = 0.4
    with pytest.raises(ConfigError) as refusal:
        folder.check_same(other)
    for part in ("trials: 4 then, 5 now", "config.loss.margin: 0.2 then, 0.4 now", "space: [1, 2]"):
        assert part in str(refusal.value)


def test_a_folder_with_a_run_is_not_overwritten(folder: RunFolder) -> None:
    with pytest.raises(ConfigError, match="--resume"):
        folder.create(IDENTITY)


def test_of_several_that_start_under_one_name_at_once_one_alone_has_it(tmp_path: Path) -> None:
    """In processes of their own, which all wait for the same moment."""
    script = """
import os, sys, time
from pathlib import Path
from cpfean.errors import ConfigError
from cpfean.records.trial_record import TrialRecord
from cpfean.records.run_folder import RunFolder, newest_unfinished

folder, go = RunFolder(Path(sys.argv[1]) / "runs" / "a"), Path(sys.argv[1]) / "go"
children = []
for number in range(8):
    if (child := os.fork()) == 0:
        while not go.exists():
            time.sleep(0.001)
        try:
            folder.create({"kind": "train", "of": number}, resume="go on")
        except ConfigError as error:
            os._exit(1 if "holds a run already; continue it with\\n  go on" in str(error) else 2)
        except BaseException:
            os._exit(3)
        os._exit(0)
    children.append(child)
go.touch()
print(sorted(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children))
"""
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, cwd=ROOT
    )
    assert done.stdout.strip() == str([0] + [1] * 7), done.stderr
    run = RunFolder(tmp_path / "runs" / "a")
    assert len(run.id) == 12
    assert sorted(path.name for path in run.path.iterdir()) == ["sweep.json", "trials"]


def test_records_whose_run_is_gone_are_not_taken_for_those_of_a_new_one(folder: RunFolder) -> None:
    folder.write(record(0, 1.0))
    folder.identity_file.unlink()
    with pytest.raises(ConfigError, match=r"whose sweep\.json is gone"):
        folder.create(IDENTITY)


def test_data_and_encoder_that_moved_are_the_same_if_they_hold_the_same(tmp_path: Path) -> None:
    def asked(place: str, data: str = "d1", encoder: str = "e1") -> dict[str, Any]:
        config = {"data": {"path": place}, "model": {"text": {"encoder": f"{place}/bert"}}}
        return {
            "kind": "train",
            "data_fingerprint": data,
            "encoder_fingerprint": encoder,
            "config": config,
        }

    folder = RunFolder(tmp_path / "a")
    folder.create(asked("/old"))
    folder.check_same(asked("/new"))
    with pytest.raises(ConfigError, match=r"(?s)config.data.path.*data_fingerprint: 'd1' then"):
        folder.check_same(asked("/new", data="d2"))
    with pytest.raises(ConfigError, match=r"(?s)text.encoder.*encoder_fingerprint: 'e1' then"):
        folder.check_same(asked("/new", encoder="e2"))
    # An encoder that goes by its name is another one under another name.
    named = RunFolder(tmp_path / "b")
    named.create(asked("one", encoder=""))
    with pytest.raises(ConfigError, match=r"text\.encoder: 'one/bert' then, 'two/bert' now"):
        named.check_same(asked("two", encoder=""))
    # What an earlier release has not noted cannot be compared, so the place counts.
    earlier = RunFolder(tmp_path / "c")
    earlier.create({k: v for k, v in asked("/old").items() if k != "encoder_fingerprint"})
    earlier.check_same(asked("/old"))
    with pytest.raises(ConfigError, match=r"text\.encoder"):
        earlier.check_same(asked("/new"))


@pytest.mark.parametrize("tail", ["train/a-000/epoch-0002", "checkpoints/epoch-0002"])
def test_checkpoints_of_a_folder_that_moved_are_found_in_it(tmp_path: Path, tail: str) -> None:
    noted = f"/somewhere/runs/a/{tail}"
    assert relocated(noted, tmp_path / "b") == noted
    (tmp_path / "b" / tail).mkdir(parents=True)
    assert relocated(noted, tmp_path / "b") == str(tmp_path / "b" / tail)
    for elsewhere in (f"s3://bucket/{tail}", "/storage/1a2b/a-000/epoch-0002", ""):
        assert relocated(elsewhere, tmp_path / "b") == elsewhere


def test_a_second_driver_is_kept_out_until_the_first_has_gone(folder: RunFolder) -> None:
    with folder.lock(), pytest.raises(ConfigError, match="at work"), RunFolder(folder.path).lock():
        pass
    with folder.lock():
        pass


def test_resume_without_a_name_takes_the_newest_unfinished_run_of_its_kind(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nothing to resume"):
        newest_unfinished(tmp_path, "sweep")
    for name, kind in (("a", "sweep"), ("b", "sweep"), ("c", "train")):
        RunFolder(tmp_path / name).create({"kind": kind})
    (tmp_path / "b" / "summary.json").write_text("{}")
    assert newest_unfinished(tmp_path, "sweep").name == "a"
    RunFolder(tmp_path / "b").write(record(0, state="failed", failure="oom"))
    assert newest_unfinished(tmp_path, "sweep").name == "a"
    assert newest_unfinished(tmp_path, "sweep", with_failed=True).name == "b"
    # Of which the driver was killed before the trial was run once more.
    assert RunFolder(tmp_path / "b").reopen_failed() == 1
    assert newest_unfinished(tmp_path, "sweep").name == "b"


def test_a_comparison_is_resumed_after_its_tuning_too(tmp_path: Path) -> None:
    kinds = ("comparison", "tuning")
    RunFolder(tmp_path / f"a{TUNING}").create({"kind": "tuning"})
    (tmp_path / f"a{TUNING}" / "summary.json").write_text("{}")
    assert newest_unfinished(tmp_path, *kinds).name == f"a{TUNING}"
    RunFolder(tmp_path / "a").create({"kind": "comparison"})
    (tmp_path / "a" / "summary.json").write_text("{}")
    with pytest.raises(ConfigError, match="nothing to resume"):
        newest_unfinished(tmp_path, *kinds)


def test_a_record_knows_when_it_is_for_good() -> None:
    states = ("waiting", "running", "interrupted", "finished", "pruned", "failed")
    settled = [TrialRecord(number=0, name="", state=state).settled for state in states]
    assert settled == [False, False, False, True, True, True]
