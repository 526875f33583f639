"""A space, and the study that proposes points of it: restarts, repeats, damage."""

import os
import sqlite3
from collections.abc import Callable
from pathlib import Path

import optuna
import pytest

from cpfean.config import ExperimentConfig
from cpfean.errors import ConfigError
from orchestration.proposals.search import Choice, Proposals, Range, SearchSpace
from orchestration.settings import ServiceError
from orchestration.study.records import TrialRecord
from tests.orchestration.samples import record

GATE = "model.alignment.gate"
THRESHOLD = "model.alignment.gate_threshold"
SPACE = SearchSpace(
    name="space",
    question="?",
    parameters={
        GATE: Choice(("soft", "off")),
        THRESHOLD: Range(0.0, 0.4, step=0.1),
        "loss.margin": Range(0.1, 0.4),
    },
    only_if={THRESHOLD: (GATE, ("soft",))},
)
FOUR = SearchSpace(
    name="four",
    question="?",
    parameters={
        "data.num_regions": Choice((2, 4)),
        "model.words.layers": Range(0, 1),
    },
)


def proposals(folder: Path, space: SearchSpace = SPACE, *, seed: int = 0, **given) -> Proposals:
    return Proposals(
        space,
        file=folder / "study.db",
        seed=seed,
        trials=8,
        **{"name": folder.name, "baseline": None} | given,
    )


def load(folder: Path) -> optuna.Study:
    return optuna.load_study(study_name=folder.name, storage=f"sqlite:///{folder / 'study.db'}")


def states(folder: Path) -> dict[int, str]:
    return {
        trial.user_attrs["number"]: trial.state.name
        for trial in load(folder).trials
        if "number" in trial.user_attrs
    }


def test_corners_are_all_combinations_without_what_does_not_apply() -> None:
    corners = list(SPACE.corners())
    assert {frozenset(corner) for corner in corners} == {
        frozenset({GATE, THRESHOLD, "loss.margin"}),
        frozenset({GATE, "loss.margin"}),
    }
    assert {corner["loss.margin"] for corner in corners} == {0.1, 0.4}


@pytest.mark.parametrize(
    ("path", "values", "named"),
    [
        ("loss.margins", Range(0.1, 0.2), "loss.margins"),
        ("loss.margin", Range(0.0, 0.2), r"loss.margin = 0.0"),
        ("model.regions.iou_threshold", Range(0.5, 1.5), "iou_threshold = 1.5"),
        (GATE, Choice(("soft", "softer")), "softer"),
    ],
)
def test_a_space_that_leaves_what_can_be_run_is_refused_before_any_trial(
    path: str, values: Choice | Range, named: str
) -> None:
    space = SearchSpace(name="bad", question="?", parameters={path: values})
    with pytest.raises(ConfigError, match=named):
        space.check(ExperimentConfig())


def test_the_baseline_is_a_point_of_the_space_or_nothing() -> None:
    config = ExperimentConfig()
    assert SPACE.baseline(config) == {GATE: "soft", THRESHOLD: 0.2, "loss.margin": 0.2}
    off = config.with_overrides({GATE: "off"})
    assert SPACE.baseline(off) == {GATE: "off", "loss.margin": 0.2}
    assert SPACE.baseline(config.with_overrides({"loss.margin": 0.5})) is None


def test_the_baseline_comes_first_and_every_proposal_lies_in_the_space(tmp_path: Path) -> None:
    asked = proposals(tmp_path, baseline=SPACE.baseline(ExperimentConfig()))
    seen: list[TrialRecord] = []
    for number in range(8):
        drawn = asked.ask(number, seen)
        assert drawn is not None
        assert (THRESHOLD in drawn) == (drawn[GATE] == "soft")
        assert all(drawn[path] in SPACE.parameters[path] for path in drawn)
        ExperimentConfig().with_overrides(drawn)
        seen.append(record(number, 100.0 * number, state="finished", overrides=drawn))
        asked.tell(seen[-1])
    assert seen[0].overrides == SPACE.baseline(ExperimentConfig())


def test_a_small_space_is_asked_until_it_is_exhausted_and_repeats_cost_nothing(
    tmp_path: Path,
) -> None:
    asked = proposals(tmp_path, FOUR)
    seen: list[TrialRecord] = []
    for number in range(12):
        drawn = asked.ask(number, seen)
        if drawn is None:
            break
        seen.append(record(number, 50.0, state="finished", overrides=drawn))
        asked.tell(seen[-1])
    assert len(seen) == 4
    assert len({tuple(sorted(r.overrides.items())) for r in seen}) == 4
    assert asked.duplicates
    assert set(asked.duplicates) <= {r.name for r in seen}


def test_each_outcome_is_told_as_what_it_is_and_once(tmp_path: Path) -> None:
    asked = proposals(tmp_path)
    seen: list[TrialRecord] = []
    for number, state in enumerate(("finished", "pruned", "failed")):
        drawn = asked.ask(number, seen)
        assert drawn is not None
        seen.append(record(number, 10.0, 20.0, state=state, overrides=drawn))
        asked.tell(seen[-1])
        asked.tell(seen[-1])
    assert states(tmp_path) == {0: "COMPLETE", 1: "PRUNED", 2: "FAIL"}


def test_a_restart_goes_on_with_new_points_and_hands_out_the_lost_one_again(tmp_path: Path) -> None:
    first = proposals(tmp_path)
    done = first.ask(0, [])
    assert done is not None
    finished = record(0, 10.0, state="finished", overrides=done)
    first.tell(finished)
    lost = first.ask(1, [finished])  # the driver is killed before it records this one
    second = proposals(tmp_path)
    assert second.ask(1, [finished]) == lost
    assert lost is not None
    running = record(1, overrides=lost)
    new = second.ask(2, [finished, running])
    assert new is not None
    assert new not in (done, lost)
    second.tell(record(1, 5.0, state="pruned", overrides=lost))
    assert states(tmp_path) == {0: "COMPLETE", 1: "PRUNED", 2: "RUNNING"}


def run_five(folder: Path) -> list[TrialRecord]:
    """A study of four settled trials and one that runs."""
    asked = proposals(folder)
    seen: list[TrialRecord] = []
    for number, state in enumerate(("finished", "pruned", "finished", "failed", "running")):
        drawn = asked.ask(number, seen)
        assert drawn is not None
        seen.append(record(number, 10.0 * number, 20.0 + number, state=state, overrides=drawn))
        if seen[-1].settled:
            asked.tell(seen[-1])
    return seen


def cut(file: Path, share: float) -> None:
    with file.open("r+b") as stream:
        stream.truncate(int(file.stat().st_size * share))


def blank(file: Path, share: float) -> None:
    """NULs from there to the end."""
    size = file.stat().st_size
    with file.open("r+b") as stream:
        stream.seek(int(size * share))
        stream.write(bytes(size - int(size * share)))


def garble(file: Path, share: float) -> None:
    """Another value for every margin that is stored, which leaves a sound database."""
    with sqlite3.connect(file) as connection:
        connection.execute("UPDATE trial_params SET param_value = 0.2 WHERE param_name LIKE 'l%'")


@pytest.mark.parametrize(
    ("damage", "share"),
    [(cut, 0.0), (cut, 0.3), (cut, 0.99), (blank, 0.0), (blank, 0.3), (blank, 0.95), (garble, 0.0)],
)
def test_a_damaged_study_is_rebuilt_from_the_records(
    tmp_path: Path, damage: Callable[[Path, float], None], share: float
) -> None:
    seen = run_five(tmp_path)
    file = tmp_path / "study.db"
    before, best = states(tmp_path), load(tmp_path).best_trial
    damage(file, share)
    damaged = file.read_bytes()
    again = proposals(tmp_path, records=seen)
    assert again.num_rebuilt == len(seen)
    if damaged:  # SQLite takes an empty file for a new database
        assert again.damaged == tmp_path / "study.db.damaged"
        assert again.damaged.read_bytes() == damaged
    assert states(tmp_path) == before
    rebuilt = load(tmp_path).best_trial
    assert (rebuilt.user_attrs, rebuilt.value) == (best.user_attrs, best.value)
    assert rebuilt.distributions == best.distributions
    assert rebuilt.intermediate_values == best.intermediate_values
    new = again.ask(5, seen)
    assert new is not None
    assert new not in [one.overrides for one in seen]
    assert proposals(tmp_path, records=seen).num_rebuilt == 0


def test_a_study_that_is_sound_is_left_alone_and_one_that_somebody_holds_is_not_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = run_five(tmp_path)
    again = proposals(tmp_path, records=seen)
    assert (again.damaged, again.num_rebuilt) == (None, 0)
    connect = sqlite3.connect
    monkeypatch.setattr(sqlite3, "connect", lambda file, timeout: connect(file, timeout=0.1))
    holder = connect(tmp_path / "study.db", isolation_level=None)
    holder.execute("BEGIN EXCLUSIVE")
    with pytest.raises(ServiceError, match=r"study\.db: cannot be opened: database is locked"):
        proposals(tmp_path, records=seen)
    holder.close()
    assert not (tmp_path / "study.db.damaged").exists()


def test_a_repeat_of_a_finished_trial_is_told_its_value_and_one_of_a_failed_trial_that_it_failed(
    tmp_path: Path,
) -> None:
    asked = proposals(tmp_path, FOUR)
    seen: list[TrialRecord] = []
    outcomes = {"finished": 50.0, "failed": None}
    for number in range(4):
        drawn = asked.ask(number, seen)
        assert drawn is not None
        state = list(outcomes)[number % 2]
        seen.append(record(number, 50.0 + number, state=state, overrides=drawn))
        asked.tell(seen[-1])
    assert asked.ask(4, seen) is None
    repeats = [trial for trial in load(tmp_path).trials if "number" not in trial.user_attrs]
    assert len(repeats) == len(asked.duplicates) > 0
    for trial, name in zip(repeats, asked.duplicates, strict=True):
        (twin,) = (one for one in seen if one.overrides == trial.params)
        assert twin.name == name
        finished = twin.state == "finished"
        assert trial.value == (twin.best_rsum if finished else None)
        assert trial.state.name == ("COMPLETE" if finished else "FAIL")


def test_the_same_seed_proposes_the_same(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    a, b = proposals(tmp_path / "a", seed=3), proposals(tmp_path / "b", seed=3)
    assert [a.ask(n, []) for n in range(3)] == [b.ask(n, []) for n in range(3)]


@pytest.mark.parametrize("put", [Path.mkdir, os.mkfifo, lambda file: file.symlink_to("nowhere")])
def test_what_is_no_database_is_named_and_left(tmp_path: Path, put: Callable[[Path], None]) -> None:
    put(tmp_path / "study.db")
    with pytest.raises(ServiceError, match=r"study\.db: cannot be opened.* left as it is"):
        proposals(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["study.db"]


def test_what_was_put_aside_before_is_not_replaced(tmp_path: Path) -> None:
    for number, aside in enumerate(("study.db.damaged", "study.db.damaged-2")):
        (tmp_path / "study.db").write_bytes(b"damaged" * (100 + number))
        assert proposals(tmp_path).damaged == tmp_path / aside
    assert (tmp_path / "study.db.damaged").read_bytes() == b"damaged" * 100


def test_a_study_keeps_its_name_in_a_folder_that_was_renamed(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    first = proposals(tmp_path / "a")
    assert first.ask(0, []) is not None
    (tmp_path / "a").rename(tmp_path / "b")
    again = proposals(tmp_path / "b", name="a")
    assert again.damaged is None
    assert [trial.user_attrs for trial in again._study.trials] == [{"number": 0}]
