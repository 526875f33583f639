"""What a study would take: hours and dollars, from the length of a step."""

from pathlib import Path

import pytest

from cpfean.records.budget import Price, Prices
from experiments.dry_run import Estimate, cost_line


def test_an_estimate_counts_rounds_of_trials_and_every_worker() -> None:
    estimate = Estimate(
        trials=5,
        epochs=10,
        steps=100,
        step_seconds=0.5,
        validation_seconds=10.0,
        workers=2,
        units=3,
        at_a_time=2,
    )
    assert estimate.trial_seconds == 600.0
    assert estimate.seconds == 3 * 600.0
    assert estimate.unit_hours == pytest.approx(5 * 600 * 2 * 3 / 3600)


def test_a_cost_names_what_is_held_and_what_has_no_price() -> None:
    dollars = {"head": 1.0, "worker": 2.0}
    nodes = {name: Price(dollars=d, on_demand=2 * d) for name, d in dollars.items()}
    known = Prices(file=Path("p.toml"), nodes=nodes)
    line = cost_line(known, ["head", "worker", "worker", "other"], hours=2.0)
    assert "$10.00 for 1 x head, 1 x other, 2 x worker at $5.00 an hour" in line
    assert "$20.00 if all were on demand" in line
    assert "without 'other'" in line
    assert "unknown" in cost_line(known, ["other"], hours=2.0)
