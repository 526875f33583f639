"""The benchmark of two workers runs one and then two, and times every step of both."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest


@pytest.mark.long
@pytest.mark.timeout(300)
def test_each_worker_count_has_its_times(
    run_benchmark: Callable[..., tuple[str, dict[str, Any]]],
) -> None:
    sizes = ("--images", 8, "--batch", 8, "--dim", 64, "--feature-dim", 16, "--text-dim", 32)
    printed, result = run_benchmark("two_workers", *sizes, "--runs", 1, "--steps", 3)
    rows = {(row["work"], row["workers"]): row for row in result["rows"]}
    assert rows.keys() == {(work, n) for work in ("training", "evaluation") for n in (1, 2)}
    for (work, workers), row in rows.items():
        assert 0 < row["fastest s"] <= row["s"]
        pairs = 8 * 8 if work == "training" else 8 * 5 * 8
        assert row["pairs/s"] == pytest.approx(pairs / row["s"])
        assert row["v one worker"] == pytest.approx(rows[work, 1]["s"] / row["s"])
        assert f"| {work} | {workers} |" in printed
    # Three steps: their median is not their least.
    assert rows["training", 2]["fastest s"] < rows["training", 2]["s"]
