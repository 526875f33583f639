"""Runs as they come out of a comparison."""

from __future__ import annotations

from cpfean.analysis.statistics import SeedRun


def runs(**rsums: list[float]) -> list[SeedRun]:
    """Finished runs of each variant on seeds 0, 1, ..., by rSum on test; two epochs each."""
    return [
        SeedRun(
            variant=variant,
            seed=seed,
            test={"rsum": rsum},
            dev_rsums=[rsum / 2, rsum - 5],
            seconds=3.0,
        )
        for variant, values in rsums.items()
        for seed, rsum in enumerate(values)
    ]
