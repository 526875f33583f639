"""Variants on seeds: what is planned, and what the statistics are told of it."""

import pytest

from cpfean.analysis.statistics import FULL, SeedRun
from cpfean.config import ExperimentConfig
from cpfean.errors import ConfigError
from orchestration.study.comparison import plan_trials, seed_runs
from orchestration.study.variants import Ablation
from tests.orchestration.samples import record

NO_GCN = Ablation(name="no_gcn", question="?", overrides={"model.words.layers": 0})
FULL_MODEL = Ablation(name=FULL, question="?", overrides={})


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


def test_the_statistics_are_told_variant_seed_and_outcome_of_every_trial_by_number() -> None:
    plans = plan_trials(ExperimentConfig(), [FULL_MODEL, NO_GCN], [5])
    full, no_gcn = (
        record(number, *rsums, name=plan.name, overrides=dict(plan.overrides), **more)
        for number, plan, rsums, more in zip(
            (0, 1),
            plans,
            ((300.0, 310.0), ()),
            ({"state": "finished", "test": {"rsum": 305.0}, "seconds": 2.0}, {"state": "failed"}),
            strict=True,
        )
    )
    assert seed_runs([no_gcn, full]) == [
        SeedRun(variant=FULL, seed=5, test={"rsum": 305.0}, dev_rsums=(300.0, 310.0), seconds=2.0),
        SeedRun(variant="no_gcn", seed=5, state="failed"),
    ]
