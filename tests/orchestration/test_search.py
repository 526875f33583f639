from pathlib import Path

import optuna
import pytest

from cpfean.config import ExperimentConfig
from cpfean.errors import ConfigError
from orchestration.records import TrialRecord
from orchestration.search import Choice, Proposals, Range, SearchSpace
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
        space, file=folder / "study.db", seed=seed, trials=8, **{"baseline": None} | given
    )


def states(folder: Path) -> dict[int, str]:
    study = optuna.load_study(study_name=folder.name, storage=f"sqlite:///{folder / 'study.db'}")
    return {t.user_attrs["number"]: t.state.name for t in study.trials if "number" in t.user_attrs}


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
    assert asked.num_duplicates > 0


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


def test_the_same_seed_proposes_the_same(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    a, b = proposals(tmp_path / "a", seed=3), proposals(tmp_path / "b", seed=3)
    assert [a.ask(n, []) for n in range(3)] == [b.ask(n, []) for n in range(3)]
