"""The study that proposes points of a space: restarts, repeats, and its export."""

import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import optuna
import pytest

from cpfean.config import ExperimentConfig
from cpfean.errors import ServiceError
from cpfean.records.trial_record import TrialRecord
from orchestration.proposals.optuna_study import NEEDED, Proposals
from orchestration.proposals.search_space import SearchSpace
from tests.faults import small_disk
from tests.orchestration.proposals.spaces import FOUR, GATE, SPACE, THRESHOLD
from tests.orchestration.samples import record

ROOT = Path(__file__).resolve().parents[3]


def proposals(space: SearchSpace = SPACE, *, seed: int = 0, **given) -> Proposals:
    return Proposals(space, seed=seed, trials=8, **{"name": "s", "baseline": None} | given)


def run_five() -> list[TrialRecord]:
    """Four settled trials and one that runs."""
    asked = proposals()
    seen: list[TrialRecord] = []
    for number, state in enumerate(("finished", "pruned", "finished", "failed", "running")):
        drawn = asked.ask(number, seen)
        assert drawn is not None
        failure = {"failure": "oom"} if state == "failed" else {}
        rsums = (10.0 * number, 20.0 + number)
        seen.append(record(number, *rsums, state=state, overrides=drawn, **failure))
    return seen


def load(file: Path, *, name: str = "s") -> optuna.Study:
    return optuna.load_study(study_name=name, storage=f"sqlite:///{file}")


def test_the_baseline_comes_first_and_every_proposal_lies_in_the_space() -> None:
    asked = proposals(baseline=SPACE.baseline(ExperimentConfig()))
    seen: list[TrialRecord] = []
    for number in range(8):
        drawn = asked.ask(number, seen)
        assert drawn is not None
        assert (THRESHOLD in drawn) == (drawn[GATE] == "soft")
        assert all(drawn[path] in SPACE.parameters[path] for path in drawn)
        ExperimentConfig().with_overrides(drawn)
        seen.append(record(number, 100.0 * number, state="finished", overrides=drawn))
    assert seen[0].overrides == SPACE.baseline(ExperimentConfig())


def test_a_small_space_is_asked_until_it_is_exhausted_and_repeats_cost_nothing() -> None:
    asked = proposals(FOUR)
    seen: list[TrialRecord] = []
    for number in range(12):
        drawn = asked.ask(number, seen)
        if drawn is None:
            break
        # Of a repeat the sampler is told what came of its twin, whatever that was.
        state = ("finished", "failed", "running", "pruned")[number % 4]
        seen.append(record(number, 50.0, state=state, overrides=drawn))
    assert len(seen) == 4
    assert len({tuple(sorted(r.overrides.items())) for r in seen}) == 4
    assert asked.duplicates
    assert set(asked.duplicates) <= {r.name for r in seen}


@pytest.mark.parametrize("num_seen", range(6))
def test_a_proposal_depends_on_the_records_the_seed_and_the_number_alone(num_seen: int) -> None:
    """What a killed driver has proposed and not recorded is proposed by the next one."""
    seen = run_five()
    asked = proposals()
    for number in range(num_seen):
        asked.ask(number, seen[:number])
    drawn = asked.ask(num_seen, seen[:num_seen])
    assert drawn not in [one.overrides for one in seen[:num_seen]]
    assert proposals().ask(num_seen, seen[:num_seen]) == drawn
    backwards = seen[:num_seen][::-1]
    assert proposals().ask(num_seen, backwards) == drawn
    assert proposals(seed=1).ask(num_seen, seen[:num_seen]) != drawn
    assert proposals().ask(num_seen + 1, seen[:num_seen]) != drawn


_ANOTHER = """
import json, sys
from orchestration.proposals.optuna_study import Proposals
from cpfean.records.trial_record import TrialRecord
from tests.orchestration.proposals.spaces import SPACE
seen = [TrialRecord(**fields) for fields in json.load(sys.stdin)]
asked = Proposals(SPACE, name="s", seed=0, baseline=None, trials=8)
print(json.dumps([asked.ask(number, seen) for number in range(5, 9)]))
"""


def test_another_process_proposes_the_same() -> None:
    seen = run_five()
    asked = proposals()
    here = [asked.ask(number, seen) for number in range(5, 9)]
    done = subprocess.run(
        [sys.executable, "-c", _ANOTHER],
        input=json.dumps([asdict(one) for one in seen]),
        cwd=ROOT,
        env=os.environ | {"PYTHONHASHSEED": "7"},
        stdout=subprocess.PIPE,
        check=True,
        encoding="utf-8",
    )
    assert json.loads(done.stdout) == here


def test_good_and_bad_trials_steer_the_search_and_those_that_run_are_kept_away_from() -> None:
    def mean(seen: list[TrialRecord]) -> float:
        drawn = [proposals(seed=seed).ask(6, seen) for seed in range(20)]
        return statistics.mean(float(point["loss.margin"]) for point in drawn if point)

    margins = (0.12, 0.14, 0.16, 0.34, 0.36, 0.38)
    low, high = (
        [
            record(
                number,
                500.0 if (margin < 0.25) == is_low else 20.0,
                state="finished",
                overrides={GATE: "off", "loss.margin": margin},
            )
            for number, margin in enumerate(margins)
        ]
        for is_low in (True, False)
    )
    assert mean(low) < mean(high) - 0.01
    running = [replace(one, state="running") for one in low[:3]]
    assert mean([*running, *low[3:]]) > mean(low) + 0.01


def test_the_export_has_every_trial_as_it_stands(tmp_path: Path) -> None:
    seen = run_five()
    proposals().export(tmp_path / "study.db", seen)
    study = load(tmp_path / "study.db")
    assert (study.direction.name, study.metric_names) == ("MAXIMIZE", ["val/rsum"])
    states = [trial.state.name for trial in study.trials]
    assert states == ["COMPLETE", "PRUNED", "COMPLETE", "FAIL", "RUNNING"]
    for trial, one in zip(study.trials, seen, strict=True):
        assert trial.params == pytest.approx(one.overrides)
        assert trial.user_attrs["name"] == one.name
        assert trial.user_attrs.get("failure", "") == one.failure
        assert trial.intermediate_values == {row["epoch"]: row["val/rsum"] for row in one.history}
    assert study.best_trial.number == 2
    assert study.best_value == seen[2].best_rsum
    assert [path.name for path in tmp_path.iterdir()] == ["study.db"]


@pytest.mark.parametrize("name", ["study.db", "100%41 of? what#s Ω.db"])
def test_an_export_replaces_what_is_there_whatever_it_holds(tmp_path: Path, name: str) -> None:
    file = tmp_path / name
    asked, seen = proposals(), run_five()[:3]
    asked.export(file, seen[:2])  # as one of an earlier release, which was read back
    asked.export(file, seen)
    file.rename(tmp_path / "plain.db")
    assert len(load(tmp_path / "plain.db").trials) == 3
    for leftover in (file, tmp_path / f"{name}.new", tmp_path / f"{name}.new-journal"):
        leftover.write_bytes(b"damaged" * 200)
    asked.export(file, seen)
    file.rename(tmp_path / "plain.db")
    assert len(load(tmp_path / "plain.db").trials) == 3
    assert [path.name for path in tmp_path.iterdir()] == ["plain.db"]


@pytest.mark.parametrize("put", [Path.mkdir, os.mkfifo, lambda file: file.symlink_to("nowhere")])
def test_what_is_no_file_is_named_and_left(tmp_path: Path, put: Callable[[Path], None]) -> None:
    put(tmp_path / "study.db")
    with pytest.raises(ServiceError, match=r"study\.db: cannot be written.* left as it is"):
        proposals().export(tmp_path / "study.db", [])
    assert [path.name for path in tmp_path.iterdir()] == ["study.db"]
    assert not (tmp_path / "study.db").is_file()


def test_an_export_to_a_full_disk_leaves_the_one_that_was_there(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", kilobytes=1024) as disk:
        file = disk / "study.db"
        asked, seen = proposals(), run_five()
        asked.export(file, seen)
        before = file.read_bytes()
        (disk / "filler").write_bytes(bytes(shutil.disk_usage(disk).free - 60_000))
        with pytest.raises(ServiceError, match=r"study\.db: disk full"):
            asked.export(file, seen)
        assert file.read_bytes() == before
        assert sorted(path.name for path in disk.iterdir()) == ["filler", "study.db"]


_EXPORT = """
import sys
from pathlib import Path
from orchestration.proposals.optuna_study import Proposals
from tests.orchestration.proposals.spaces import SPACE
from tests.orchestration.samples import record
overrides = {"model.alignment.gate": "off", "loss.margin": 0.2}
seen = [record(n, 1.0 + n, state="finished", overrides=overrides) for n in range(20)]
asked = Proposals(SPACE, name="s", seed=0, baseline=None, trials=8)
print("ready", flush=True)
while True:
    asked.export(Path(sys.argv[1]), seen)
"""


@pytest.mark.slow
def test_an_export_that_is_killed_leaves_no_half_of_one(tmp_path: Path) -> None:
    file = tmp_path / "study.db"
    for milliseconds in (20, 150, 400, 900):
        words = [sys.executable, "-c", _EXPORT, str(file)]
        writer = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE)
        assert writer.stdout is not None
        with writer.stdout:
            writer.stdout.readline()
        time.sleep(milliseconds / 1000)
        writer.send_signal(signal.SIGKILL)
        writer.wait()
        assert not file.exists() or len(load(file).trials) == 20
    proposals().export(file, run_five())
    assert len(load(file).trials) == 5


def searched(number: int, *, of: int = 24) -> TrialRecord:
    """One of many trials of which the margin alone decides; what is far off is stopped early."""
    margin = 0.1 + 0.3 * (number * 7 % of) / (of - 1)
    overrides = {GATE: ("soft", "off")[number % 2], "loss.margin": margin}
    if overrides[GATE] == "soft":
        overrides[THRESHOLD] = round(0.1 * (number // 2 % 5), 1)
    state = "finished" if abs(margin - 0.2) < 0.1 else "pruned"
    return record(number, 300 - 500 * abs(margin - 0.2), state=state, overrides=overrides)


def test_the_setting_that_decides_is_the_important_one_also_if_its_bad_values_were_stopped() -> (
    None
):
    seen = [searched(number) for number in range(24)]
    assert {r.state for r in seen} == {"finished", "pruned"}
    seen += [
        record(24, 9.0, state="failed", failure="oom", overrides=seen[0].overrides),
        record(25, state="running", overrides=seen[1].overrides),
    ]
    found = proposals().importance(seen)
    assert set(found) == {"loss.margin", GATE, THRESHOLD}  # of half of the trials, too
    assert next(iter(found)) == "loss.margin"
    assert found["loss.margin"].share > 0.5
    assert found["loss.margin"].p < 0.05
    assert found[GATE].p > 0.05
    assert proposals().importance(seen) == found


@pytest.mark.filterwarnings("error")
def test_of_few_trials_no_importance_is_told() -> None:
    seen = [searched(number) for number in range(24)]
    assert proposals().importance(seen[: NEEDED - 1]) == {}
    without = [record(n, state="pruned", overrides=seen[n].overrides) for n in range(24)]
    assert proposals().importance(without) == {}  # none has an rSum
    assert proposals().importance(seen[:NEEDED])
