"""A search space: its corners, the baseline in it, and what is no space."""

import pytest

from cpfean.config import ExperimentConfig
from cpfean.errors import ConfigError
from orchestration.proposals.search_space import Choice, Range, SearchSpace
from tests.orchestration.proposals.spaces import GATE, SPACE, THRESHOLD


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
