"""Variants of the model on the same seeds, compared in pairs.

The same seed means the same data order, dropout and initial weights of what two variants both have,
so the difference of two runs varies less than either: its interval is the one to look at.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

FULL = "full"  # the variant that the others are compared with
LEVEL = 0.05  # of significance, after Holm's correction


@dataclass(frozen=True, kw_only=True, slots=True)
class SeedRun:
    """One run of a variant with one seed.

    Attributes:
        variant: the name that its seeds share.
        seed: of the run; runs of one seed are pairs.
        state: how it ended, in a word; "failed" counts as a run without a result.
        test: metrics of the test split, by name, "rsum" among them; empty if it was not tested.
        dev_rsums: rSum on the dev split, after every epoch.
        seconds: of training.
    """

    variant: str
    seed: int
    state: str = "finished"
    test: Mapping[str, float] = field(default_factory=dict)
    dev_rsums: Sequence[float] = ()
    seconds: float = 0.0

    @property
    def best_dev_rsum(self) -> float:
        """The best of those that are numbers; minus infinity if there is none."""
        return max(filter(math.isfinite, self.dev_rsums), default=-math.inf)


@dataclass(frozen=True, kw_only=True, slots=True)
class Interval:
    """A mean and the half width of its 95 % interval; infinite for a single value."""

    mean: float
    half_width: float
    n: int

    @property
    def brief(self) -> str:
        """Without n; the mean alone of a single value."""
        return f"{self.mean:.1f}" if self.n < 2 else f"{self.mean:.1f} ± {self.half_width:.1f}"

    def __str__(self) -> str:
        if self.n < 2:
            return f"{self.mean:.1f} (n = {self.n}, no interval)"
        return f"{self.mean:.1f} ± {self.half_width:.1f} (n = {self.n})"


@dataclass(frozen=True, kw_only=True, slots=True)
class AblationResult:
    """How a variant compares with the full model, by rSum on the test split.

    Attributes:
        rsums: of its seeds.
        rsum: mean and interval of these; None if no seed finished.
        difference: variant minus full, paired by seed; None for the full model itself, or if no
            seed finished for both.
        p: of the paired t-test of that difference, two-sided, corrected by Holm over all variants;
            None without two pairs.
        failed: its runs without a result.
        seconds: of training, mean over its seeds.
    """

    name: str
    rsums: Mapping[int, float] = field(default_factory=dict)
    rsum: Interval | None = None
    difference: Interval | None = None
    p: float | None = None
    failed: int = 0
    seconds: float = 0.0

    @property
    def verdict(self) -> str:
        """The difference in words."""
        if self.difference is None:
            return ""
        if self.p is None:
            return "one seed says nothing"
        if self.p >= LEVEL:
            return "not distinguishable from full"
        return "better than full" if self.difference.mean > 0 else "worse than full"


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


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted p-values: with all below 0.05 kept, the chance of one false find is below 0.05.

    Source: Holm, A simple sequentially rejective multiple test procedure (1979).
    """
    adjusted = [0.0] * len(p_values)
    highest = 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = highest
    return adjusted


def compare(runs: Iterable[SeedRun]) -> list[AblationResult]:
    """Every variant against the full model, in the order of the variants' first runs.

    Args:
        runs: in the order they were planned; of several with one seed the last one counts.
    """
    of_variant: dict[str, list[SeedRun]] = {}
    for run in runs:
        of_variant.setdefault(run.variant, []).append(run)
    tested = {
        name: {run.seed: run for run in group if run.test} for name, group in of_variant.items()
    }
    full = tested.get(FULL, {})
    results = []
    for name, by_seed in tested.items():
        rsums = {seed: by_seed[seed].test["rsum"] for seed in sorted(by_seed)}
        pairs = [rsums[seed] - full[seed].test["rsum"] for seed in rsums if seed in full]
        results.append(
            AblationResult(
                name=name,
                rsums=rsums,
                rsum=mean_interval(list(rsums.values())) if rsums else None,
                difference=mean_interval(pairs) if pairs and name != FULL else None,
                p=_paired_p(pairs) if name != FULL else None,
                failed=sum(run.state == "failed" for run in of_variant[name]),
                seconds=sum(run.seconds for run in by_seed.values()) / max(1, len(by_seed)),
            )
        )
    compared = [index for index, result in enumerate(results) if result.p is not None]
    for index, p in zip(compared, holm([results[i].p or 0.0 for i in compared]), strict=True):
        results[index] = replace(results[index], p=p)
    return results


@dataclass(frozen=True, kw_only=True, slots=True)
class Change:
    """How a variant's rSum on the test split differs from that of an earlier round.

    Attributes:
        before: mean and interval over the seeds of the earlier round.
        now: over those of the later one.
        difference: later minus earlier, paired by seed; None if no seed finished in both.
    """

    name: str
    before: Interval | None
    now: Interval | None
    difference: Interval | None

    @property
    def is_certain(self) -> bool:
        """Whether the interval of the difference excludes 0; never for a single seed."""
        of = self.difference
        return of is not None and of.n > 1 and abs(of.mean) > of.half_width


def changes(before: Iterable[SeedRun], now: Iterable[SeedRun]) -> list[Change]:
    """What changed between two rounds, for every variant of the later one."""
    known = {result.name: result for result in compare(before)}
    found = []
    for result in compare(now):
        earlier = known.get(result.name, AblationResult(name=result.name))
        pairs = [
            rsum - earlier.rsums[seed]
            for seed, rsum in result.rsums.items()
            if seed in earlier.rsums
        ]
        found.append(
            Change(
                name=result.name,
                before=earlier.rsum,
                now=result.rsum,
                difference=mean_interval(pairs) if pairs else None,
            )
        )
    return found


def _paired_p(differences: Sequence[float]) -> float | None:
    """Two-sided p of a mean difference of zero."""
    from scipy import stats

    if len(differences) < 2:
        return None
    if len(set(differences)) == 1:  # no spread: the statistic is 0 / 0 or infinite
        return 1.0 if differences[0] == 0 else 0.0
    return float(stats.ttest_1samp(differences, 0.0).pvalue)
