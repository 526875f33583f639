"""An epoch beside busy processes is compared with one on a quiet machine."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest


@pytest.mark.slow
@pytest.mark.long
def test_both_ways_are_measured_quiet_and_beside_others(
    run_benchmark: Callable[..., tuple[str, dict[str, Any]]],
) -> None:
    printed, found = run_benchmark(
        "busy_machine", "--runs", 1, "--images", 16, "--busy", 1, "--seconds", 20
    )
    rows = found["rows"]
    assert [(row["threads"], row["so many"], row["beside"]) for row in rows] == [
        ("two threads", "2", 0),
        ("two threads", "2", 1),
        ("as many as a step needs", "1", 0),
        ("as many as a step needs", "1", 1),
    ]
    for quiet, busy in (rows[:2], rows[2:]):
        assert quiet["v quiet"] == 1
        assert busy["v quiet"] == busy["epoch, s"] / quiet["epoch, s"] > 0
    assert "| as many as a step needs | 1 |" in printed
