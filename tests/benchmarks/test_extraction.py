"""The benchmark of extraction runs, and its ways come to the same bytes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.extraction.tiny import write_photographs
from tests.photographs.models import tiny_dinov2, tiny_rt_detr_v2

RunBenchmark = Callable[..., tuple[str, dict[str, Any]]]


def test_ways_of_working_are_measured_and_come_to_the_same(
    run_benchmark: RunBenchmark, tmp_path: Path
) -> None:
    photographs = tmp_path / "photographs"
    write_photographs(photographs)
    printed, result = run_benchmark(
        *("extraction", photographs, "--no-ray", "--runs", 1, "--count", 10, "--batch-size", 2),
        *("--detector", tiny_rt_detr_v2(tmp_path / "detector")),
        *("--backbone", tiny_dinov2(tmp_path / "backbone")),
    )
    assert result["same_bytes"] is True
    ways = {row["way, workers"]: row["photographs a second"] for row in result["rows"]}
    assert list(ways) == ["models alone", "threads, 1", "threads, 2"]
    assert all(rate > 0 for rate in ways.values())
    assert "threads, 2" in printed
