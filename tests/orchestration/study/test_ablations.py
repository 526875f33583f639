"""Variants on seeds: what is planned, and the statistics of what came out."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from cpfean.config import ExperimentConfig
from cpfean.errors import ConfigError
from orchestration.study.ablations import (
    FULL,
    Ablation,
    changes,
    compare,
    holm,
    mean_interval,
    plan_trials,
)
from orchestration.study.records import TrialRecord
from tests.orchestration.samples import record

NO_GCN = Ablation(name="no_gcn", question="?", overrides={"model.words.layers": 0})
FULL_MODEL = Ablation(name=FULL, question="?", overrides={})


def trial(number: int, name: str, seed: int, rsum: float, **fields) -> TrialRecord:
    given = {"state": "finished", "test": {"rsum": rsum}} | fields
    return record(number, 1.0, name=f"{name}/seed-{seed}", overrides={"seed": seed}, **given)


def trials(**rsums: list[float]) -> list[TrialRecord]:
    """Finished trials of each variant on seeds 0, 1, ..."""
    number = iter(range(1000))
    return [
        trial(next(number), name, seed, value)
        for name, values in rsums.items()
        for seed, value in enumerate(values)
    ]


@given(st.lists(st.floats(0, 600), min_size=2, max_size=9))
def test_the_interval_is_that_of_students_t(values: list[float]) -> None:
    interval = mean_interval(values)
    assert interval.n == len(values)
    assert interval.mean == pytest.approx(np.mean(values))
    error = stats.sem(values)
    expected = stats.t.interval(0.95, len(values) - 1, loc=0, scale=error)[1] if error > 0 else 0
    assert interval.half_width == pytest.approx(expected, rel=1e-6, abs=1e-9)


def test_a_single_seed_has_a_mean_and_no_interval() -> None:
    assert mean_interval([300.0]).half_width == np.inf
    assert "no interval" in str(mean_interval([300.0]))


def test_the_paired_difference_is_free_of_what_the_seeds_have_in_common() -> None:
    full, without = [300.0, 400.0, 350.0], [298.0, 397.0, 349.0]
    reference, variant = compare(trials(full=full, no_gcn=without))
    assert reference.difference is None
    assert reference.p is None
    assert variant.difference is not None
    expected = stats.ttest_rel(without, full)
    low, high = expected.confidence_interval(0.95)
    assert variant.difference.mean - variant.difference.half_width == pytest.approx(low)
    assert variant.difference.mean + variant.difference.half_width == pytest.approx(high)
    assert variant.p == pytest.approx(expected.pvalue)  # alone, there is nothing to correct
    assert variant.rsum is not None
    assert variant.difference.half_width < variant.rsum.half_width / 10


def test_holm_is_the_known_example_and_never_below_the_raw_value() -> None:
    # Four tests: 0.005 x 4, 0.01 x 3, then 0.03 x 2, and 0.04, which may not fall below it.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([]) == []
    assert holm([0.7, 0.9]) == [1.0, 1.0]


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_holm_rejects_what_the_sequential_procedure_rejects(p_values: list[float]) -> None:
    rejected = set()
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        if p_values[index] >= 0.05 / (len(p_values) - rank):
            break
        rejected.add(index)
    adjusted = holm(p_values)
    borderline = {i for i, p in enumerate(adjusted) if abs(p - 0.05) < 1e-9}
    assert {i for i, p in enumerate(adjusted) if p < 0.05} - borderline == rejected - borderline


def test_p_values_are_corrected_over_all_variants_and_the_verdict_follows() -> None:
    full = [300.0, 310.0, 305.0, 302.0]
    worse = [value - gap for value, gap in zip(full, (20, 21, 19, 20), strict=True)]
    same = [value + gap for value, gap in zip(full, (3, -4, 2, -2), strict=True)]
    _, first, second = compare(trials(full=full, worse=worse, same=same))
    raw = [stats.ttest_rel(values, full).pvalue for values in (worse, same)]
    assert (first.p, second.p) == (pytest.approx(2 * raw[0]), pytest.approx(raw[1]))
    assert first.verdict == "worse than full"
    assert second.verdict == "not distinguishable from full"
    (_, better) = compare(trials(full=worse, better=full))
    assert better.verdict == "better than full"


def test_one_seed_has_no_p_and_says_so() -> None:
    _, variant = compare(trials(full=[300.0], no_gcn=[200.0]))
    assert variant.p is None
    assert variant.verdict == "one seed says nothing"


def test_differences_without_spread_have_a_p_all_the_same() -> None:
    _, equal, shifted = compare(trials(full=[1.0, 2.0], equal=[1.0, 2.0], shifted=[2.0, 3.0]))
    assert equal.p == 1.0
    assert shifted.p == 0.0


def test_a_failed_seed_leaves_its_pair_out_and_is_counted() -> None:
    records = [
        trial(0, FULL, 0, 300.0),
        trial(1, "no_gcn", 0, 290.0),
        trial(2, FULL, 1, 310.0),
        trial(3, "no_gcn", 1, 0.0, state="failed", test={}),
    ]
    _, variant = compare(records)
    assert variant.difference is not None
    assert (variant.difference.mean, variant.difference.n) == (-10.0, 1)
    assert variant.failed == 1


def test_every_variant_is_planned_on_the_same_seeds() -> None:
    plans = plan_trials(ExperimentConfig(), [FULL_MODEL, NO_GCN], range(5, 7))
    assert [plan.name for plan in plans] == [
        "full/seed-5",
        "no_gcn/seed-5",
        "full/seed-6",
        "no_gcn/seed-6",
    ]
    assert plans[1].config.model.words.layers == 0
    assert plans[1].config.with_overrides({"model.words.layers": 1}) == plans[0].config


def test_a_variant_that_the_base_does_not_allow_is_refused_by_name() -> None:
    base = ExperimentConfig().with_overrides({"model.alignment.gate": "hard"})
    off = Ablation(name="off", question="?", overrides={"model.alignment.fusion": False})
    with pytest.raises(ConfigError, match="variant 'off'"):
        plan_trials(base, [off], [0])


def test_a_change_is_certain_if_the_interval_of_the_paired_difference_excludes_0() -> None:
    before = trials(full=[300.0, 310.0, 320.0], no_gcn=[290.0, 300.0, 310.0], gone=[1.0])
    now = trials(full=[305.0, 315.5, 324.5], no_gcn=[299.0, 295.0, 311.0], new=[5.0, 6.0])
    full, no_gcn, new = changes(before, now)
    assert (full.name, full.is_certain) == (FULL, True)
    assert full.before == mean_interval([300.0, 310.0, 320.0])
    assert full.difference == mean_interval([5.0, 5.5, 4.5])
    assert not no_gcn.is_certain
    assert (new.before, new.difference, new.is_certain) == (None, None, False)
    same = changes(before, before)
    assert not any(change.is_certain for change in same)
    # A single seed has no interval; the same step on every seed has one of width 0.
    (one,) = changes(trials(full=[300.0]), trials(full=[200.0]))
    assert not one.is_certain
    (step,) = changes(trials(full=[300.0, 301.0]), trials(full=[299.0, 300.0]))
    assert step.is_certain
