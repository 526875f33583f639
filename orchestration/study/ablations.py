"""Variants of the model on the same seeds: what is run, and what each run came to."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from cpfean.analysis.statistics import SeedRun
from cpfean.config import ExperimentConfig, Plain
from cpfean.errors import ConfigError
from cpfean.records.trial_record import TrialRecord
from orchestration.study.plan import TrialPlan


@dataclass(frozen=True, kw_only=True, slots=True)
class Ablation:
    """One change to the full model, and the question it answers."""

    name: str
    question: str
    overrides: Mapping[str, Plain]


def plan_trials(
    base: ExperimentConfig, variants: Iterable[Ablation], seeds: Sequence[int]
) -> tuple[TrialPlan, ...]:
    """Every variant on every seed, seed by seed.

    Raises:
        ConfigError: a variant that this base does not allow.
    """
    variants = list(variants)
    plans = []
    for seed in seeds:
        for variant in variants:
            overrides = {**variant.overrides, "seed": seed}
            try:
                config = base.with_overrides(overrides)
            except ConfigError as error:
                raise ConfigError(f"variant {variant.name!r}: {error}") from None
            plans.append(
                TrialPlan(name=f"{variant.name}/seed-{seed}", overrides=overrides, config=config)
            )
    return tuple(plans)


def seed_runs(records: Iterable[TrialRecord]) -> list[SeedRun]:
    """The trials that `plan_trials` planned, by number, as the statistics take them."""
    return [
        SeedRun(
            variant=record.name.split("/")[0],
            seed=int(record.overrides["seed"]),
            state=record.state,
            test=record.test,
            dev_rsums=tuple(row["val/rsum"] for row in record.history),
            seconds=record.seconds,
        )
        for record in sorted(records, key=lambda record: record.number)
    ]
