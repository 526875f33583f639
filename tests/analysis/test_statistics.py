"""The statistics of variants on seeds, against those of scipy and by hand."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from cpfean.analysis.statistics import FULL, SeedRun, changes, compare, holm, mean_interval
from tests.analysis.samples import runs


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
    reference, variant = compare(runs(full=full, no_gcn=without))
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
    _, first, second = compare(runs(full=full, worse=worse, same=same))
    raw = [stats.ttest_rel(values, full).pvalue for values in (worse, same)]
    assert (first.p, second.p) == (pytest.approx(2 * raw[0]), pytest.approx(raw[1]))
    assert first.verdict == "worse than full"
    assert second.verdict == "not distinguishable from full"
    (_, better) = compare(runs(full=worse, better=full))
    assert better.verdict == "better than full"


def test_one_seed_has_no_p_and_says_so() -> None:
    _, variant = compare(runs(full=[300.0], no_gcn=[200.0]))
    assert variant.p is None
    assert variant.verdict == "one seed says nothing"


def test_differences_without_spread_have_a_p_all_the_same() -> None:
    _, equal, shifted = compare(runs(full=[1.0, 2.0], equal=[1.0, 2.0], shifted=[2.0, 3.0]))
    assert equal.p == 1.0
    assert shifted.p == 0.0


def test_a_failed_seed_leaves_its_pair_out_and_is_counted() -> None:
    done = runs(full=[300.0, 310.0], no_gcn=[290.0])
    _, variant = compare([*done, SeedRun(variant="no_gcn", seed=1, state="failed")])
    assert variant.difference is not None
    assert (variant.difference.mean, variant.difference.n) == (-10.0, 1)
    assert variant.failed == 1


def test_a_change_is_certain_if_the_interval_of_the_paired_difference_excludes_0() -> None:
    before = runs(full=[300.0, 310.0, 320.0], no_gcn=[290.0, 300.0, 310.0], gone=[1.0])
    now = runs(full=[305.0, 315.5, 324.5], no_gcn=[299.0, 295.0, 311.0], new=[5.0, 6.0])
    full, no_gcn, new = changes(before, now)
    assert (full.name, full.is_certain) == (FULL, True)
    assert full.before == mean_interval([300.0, 310.0, 320.0])
    assert full.difference == mean_interval([5.0, 5.5, 4.5])
    assert not no_gcn.is_certain
    assert (new.before, new.difference, new.is_certain) == (None, None, False)
    same = changes(before, before)
    assert not any(change.is_certain for change in same)
    # A single seed has no interval; the same step on every seed has one of width 0.
    (one,) = changes(runs(full=[300.0]), runs(full=[200.0]))
    assert not one.is_certain
    (step,) = changes(runs(full=[300.0, 301.0]), runs(full=[299.0, 300.0]))
    assert step.is_certain


def test_of_several_runs_with_one_seed_the_last_that_was_tested_counts() -> None:
    again = [SeedRun(variant=FULL, seed=0, test={"rsum": 320.0}, seconds=7.0)]
    untested = [SeedRun(variant=FULL, seed=0, state="pruned")]
    (full,) = compare([*runs(full=[300.0]), *again, *untested])
    assert (full.rsums, full.failed, full.seconds) == ({0: 320.0}, 0, 7.0)


def test_the_best_epoch_is_the_best_of_the_numbers() -> None:
    assert SeedRun(variant=FULL, seed=0, dev_rsums=[1.0, 3.0, np.nan, 2.0]).best_dev_rsum == 3.0
    assert SeedRun(variant=FULL, seed=0, dev_rsums=[np.nan]).best_dev_rsum == -np.inf
