import json
from pathlib import Path

import pytest

from cpfean.errors import ConfigError
from orchestration.records import TUNING, RunFolder
from orchestration.study import table
from tests.orchestration.samples import record

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


def test_a_torn_record_counts_as_never_written(folder: RunFolder) -> None:
    folder.write(record(0, 1.0))
    folder.write(record(1, 1.0))
    file = folder.path / "trials" / "001" / "record.json"
    file.write_text(file.read_text()[:40])
    assert [found.number for found in folder.records()] == [0]


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


def test_a_second_driver_is_kept_out_until_the_first_has_gone(folder: RunFolder) -> None:
    with folder.lock(), pytest.raises(ConfigError, match="at work"), RunFolder(folder.path).lock():
        pass
    with folder.lock():
        pass


def test_resume_without_a_name_takes_the_newest_unfinished_run_of_its_kind(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nothing to resume"):
        RunFolder.newest_unfinished(tmp_path, "sweep")
    for name, kind in (("a", "sweep"), ("b", "sweep"), ("c", "train")):
        RunFolder(tmp_path / name).create({"kind": kind})
    (tmp_path / "b" / "summary.json").write_text("{}")
    assert RunFolder.newest_unfinished(tmp_path, "sweep").name == "a"
    RunFolder(tmp_path / "b").write(record(0, state="failed", failure="oom"))
    assert RunFolder.newest_unfinished(tmp_path, "sweep").name == "a"
    assert RunFolder.newest_unfinished(tmp_path, "sweep", with_failed=True).name == "b"
    # Of which the driver was killed before the trial was run once more.
    assert RunFolder(tmp_path / "b").reopen_failed() == 1
    assert RunFolder.newest_unfinished(tmp_path, "sweep").name == "b"


def test_a_comparison_is_resumed_after_its_tuning_too(tmp_path: Path) -> None:
    kinds = ("comparison", "tuning")
    RunFolder(tmp_path / f"a{TUNING}").create({"kind": "tuning"})
    (tmp_path / f"a{TUNING}" / "summary.json").write_text("{}")
    assert RunFolder.newest_unfinished(tmp_path, *kinds).name == f"a{TUNING}"
    RunFolder(tmp_path / "a").create({"kind": "comparison"})
    (tmp_path / "a" / "summary.json").write_text("{}")
    with pytest.raises(ConfigError, match="nothing to resume"):
        RunFolder.newest_unfinished(tmp_path, *kinds)


def test_the_table_shows_the_best_trial_first_and_what_each_one_varied() -> None:
    lines = table(
        [
            record(0, 50.0, state="finished", overrides={"loss.margin": 0.2}),
            record(1, 90.0, state="pruned", overrides={"loss.margin": 0.35}),
            record(2, state="failed", failure="oom"),
        ]
    ).splitlines()
    assert lines[0].split()[:2] == ["trial", "state"]
    assert "margin" in lines[0]
    assert lines[1].split()[:3] == ["trial-001", "pruned", "90.0"]
    assert "0.35" in lines[1]
    assert "failed (oom)" in lines[3]
