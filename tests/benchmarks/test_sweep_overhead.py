"""The benchmark of a sweep: a real one of three trials, a simulated one of twelve."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest


@pytest.mark.slow
@pytest.mark.drill
@pytest.mark.timeout(900)
def test_it_tells_what_a_trial_costs_and_what_the_driver_holds(
    run_benchmark: Callable[..., tuple[str, dict[str, Any]]],
) -> None:
    tiny = ["data.synthetic.train_images=16", "model.dim=16", "model.regions.heads=2"]
    settings = [word for setting in tiny for word in ("--set", setting)]
    counts = ["--trials", "3", "--simulated", "12", "--every", "5"]
    printed, result = run_benchmark("sweep_overhead", *counts, *settings)
    rows = {row["what"]: row for row in result["rows"]}
    assert len(result["added_seconds"]) == len(result["alone_seconds"]) == 3
    assert rows["from sweep.py to the first training step, s"]["median"] > 1
    assert rows["training of a trial alone, s"]["least"] > 0
    first = rows["first trial in its place, beyond its training, s"]["least"]
    assert first > rows["later trial, beyond its training, s"]["median"]
    looks = result["simulated"]
    assert [look["trials"] for look in looks] == [1, 5, 10, 11]
    assert all(50 < look["megabytes"] < 5000 for look in looks)
    assert "| later trial, beyond its training, s |" in printed
