"""Ablations: one change each, trained on the same seeds as the full model, compared in pairs.

The same seed means the same data order, dropout and initial weights of what both have, so the
difference of two runs varies less than either: its interval is the one to look at.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from cpfean.config import ExperimentConfig, Plain
from cpfean.errors import ConfigError
from orchestration.records import TrialRecord
from orchestration.study import TrialPlan

FULL = "full"


@dataclass(frozen=True, kw_only=True, slots=True)
class Ablation:
    """One change to the full model, and the question it answers."""

    name: str
    question: str
    overrides: Mapping[str, Plain]


@dataclass(frozen=True, kw_only=True, slots=True)
class Interval:
    """A mean and the half width of its 95 % interval; infinite for a single value."""

    mean: float
    half_width: float
    n: int

    def __str__(self) -> str:
        if self.n < 2:
            return f"{self.mean:.1f} (n = {self.n}, no interval)"
        return f"{self.mean:.1f} ± {self.half_width:.1f} (n = {self.n})"


@dataclass(frozen=True, kw_only=True, slots=True)
class AblationResult:
    """How a variant compares with the full model.

    Attributes:
        rsum: over its seeds.
        difference: variant minus full, paired by seed; None for the full model itself, or if no
            seed finished for both.
        failed: its trials without a result.
    """

    name: str
    rsum: Interval | None
    difference: Interval | None
    failed: int


def mean_interval(values: Sequence[float]) -> Interval:
    """Mean and Student's 95 % interval of independent values.

    mean ± t(0.975; n - 1) s / sqrt(n)
    """
    from scipy import stats

    n = len(values)
    mean = math.fsum(values) / n
    if n < 2:
        return Interval(mean=mean, half_width=math.inf, n=n)
    variance = math.fsum((value - mean) ** 2 for value in values) / (n - 1)
    quantile = float(stats.t.ppf(0.975, n - 1))
    return Interval(mean=mean, half_width=quantile * math.sqrt(variance / n), n=n)


def plan_trials(
    base: ExperimentConfig, ablations: Iterable[Ablation], seeds: Sequence[int]
) -> tuple[TrialPlan, ...]:
    """The full model and every variant on every seed, seed by seed.

    Raises:
        ConfigError: a variant that this base does not allow.
    """
    variants: list[tuple[str, Mapping[str, Plain]]] = [(FULL, {})]
    variants += [(ablation.name, ablation.overrides) for ablation in ablations]
    plans = []
    for seed in seeds:
        for name, overrides in variants:
            try:
                config = base.with_overrides({**overrides, "seed": seed})
            except ConfigError as error:
                raise ConfigError(f"ablation {name!r}: {error}") from None
            plans.append(
                TrialPlan(
                    name=f"{name}/seed-{seed}", overrides={**overrides, "seed": seed}, config=config
                )
            )
    return tuple(plans)


def compare(records: Iterable[TrialRecord]) -> list[AblationResult]:
    """Results in the order of the variants' first trials, the full model first."""
    by_name: dict[str, dict[int, float]] = {}
    failed: dict[str, int] = {}
    for record in records:
        name = record.name.split("/")[0]
        by_name.setdefault(name, {})
        failed.setdefault(name, 0)
        if record.state == "finished":
            by_name[name][int(record.overrides["seed"])] = record.best_rsum
        else:
            failed[name] += 1
    full = by_name.get(FULL, {})
    results = []
    for name, values in by_name.items():
        pairs = [values[seed] - full[seed] for seed in sorted(values) if seed in full]
        results.append(
            AblationResult(
                name=name,
                rsum=mean_interval([values[seed] for seed in sorted(values)]) if values else None,
                difference=mean_interval(pairs) if pairs and name != FULL else None,
                failed=failed[name],
            )
        )
    return results


def comparison_table(results: Sequence[AblationResult]) -> str:
    """Lines for people: dev rSum as mean and 95 % interval, and the paired difference."""
    rows = [["variant", "dev rSum, 95 % interval", "difference from full, paired"]]
    for result in results:
        cells = [result.name, str(result.rsum or "-"), str(result.difference or "")]
        if result.failed:
            cells[1] += f", {result.failed} failed"
        if result.difference is not None and result.difference.mean > 0:
            cells[2] = f"+{cells[2]}"
        rows.append(cells)
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )
