import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from cpfean.config import ExperimentConfig
from cpfean.errors import ConfigError
from orchestration.ablation import (
    FULL,
    Ablation,
    compare,
    comparison_table,
    mean_interval,
    plan_trials,
)
from orchestration.records import TrialRecord
from tests.orchestration.samples import record

NO_GCN = Ablation(name="no_gcn", question="?", overrides={"model.words.layers": 0})


def trial(number: int, name: str, seed: int, rsum: float, **fields) -> TrialRecord:
    given = {"state": "finished"} | fields
    return record(number, rsum, name=f"{name}/seed-{seed}", overrides={"seed": seed}, **given)


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
    records = [
        trial(2 * seed + i, name, seed, values[seed])
        for seed in range(3)
        for i, (name, values) in enumerate(((FULL, full), ("no_gcn", without)))
    ]
    reference, variant = compare(records)
    assert reference.difference is None
    assert variant.difference is not None
    expected = stats.ttest_rel(without, full).confidence_interval(0.95)
    assert variant.difference.mean - variant.difference.half_width == pytest.approx(expected.low)
    assert variant.difference.mean + variant.difference.half_width == pytest.approx(expected.high)
    assert variant.rsum is not None
    assert variant.difference.half_width < variant.rsum.half_width / 10


def test_a_failed_seed_leaves_its_pair_out_and_is_said() -> None:
    records = [
        trial(0, FULL, 0, 300.0),
        trial(1, "no_gcn", 0, 290.0),
        trial(2, FULL, 1, 310.0),
        trial(3, "no_gcn", 1, 0.0, state="failed"),
    ]
    _, variant = compare(records)
    assert variant.difference is not None
    assert (variant.difference.mean, variant.difference.n) == (-10.0, 1)
    assert "1 failed" in comparison_table(compare(records))


def test_full_and_every_variant_are_planned_on_the_same_seeds() -> None:
    plans = plan_trials(ExperimentConfig(), [NO_GCN], range(5, 7))
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
    with pytest.raises(ConfigError, match="ablation 'off'"):
        plan_trials(base, [off], [0])
