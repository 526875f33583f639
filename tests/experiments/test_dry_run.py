"""What a study would take: hours and dollars, from the length of a step."""

from dataclasses import replace
from datetime import date
from pathlib import Path

import pytest

from cpfean.config import ExperimentConfig
from cpfean.data.synthetic import write_synthetic
from cpfean.records.budget import Price, Prices
from cpfean.records.cards import Card, Cards, Measured
from experiments.baselines import BASELINES
from experiments.dry_run import Estimate, Pace, cost_line, pace_of, same_steps
from tests.orchestration.samples import TINY


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


CARD = Card(name="X1", capability=(7, 5), tflops_16=60.0, tflops_32=8.0, gb_per_second=300.0)


def measured(**other: object) -> Measured:
    about = {"configuration": "synthetic", "workers": 2, "date": date(2027, 1, 2)}
    rest = {"step_seconds": 0.5, "validation_seconds": 7.0, "source": "a.json", "commit": "abc"}
    return Measured(**({"card": "X1"} | about | rest | other))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "tiny"
    write_synthetic(folder, replace(TINY.data.synthetic, num_regions=24))
    return folder


def pace(
    config: ExperimentConfig, data: Path, *known: Measured, types: tuple[str, ...] = ("gpu",)
) -> Pace:
    cards = Cards(known={"X1": CARD}, nodes={"gpu": "X1"}, measured=known)
    return pace_of(
        config,
        data,
        prices=Prices(file=Path("p.toml"), nodes={}, cards=cards),
        types=types,
        cache_dir=data.parent,
        workers=2,
        threads=1,
    )


def test_a_step_that_was_measured_on_the_card_is_taken_with_where_it_is_from(data: Path) -> None:
    config = BASELINES["synthetic"].with_overrides({"optim.epochs": 99, "seed": 7})
    found = pace(config, data, measured(), measured(workers=1, step_seconds=0.9))
    assert (found.step_seconds, found.validation_seconds) == (0.5, 7.0)
    assert found.steps == 5 * TINY.data.synthetic.train_images // config.optim.batch_size
    for said in ("measured", "32 images a second", "X1", "2027-01-02", "commit abc", "a.json"):
        assert said in found.line


@pytest.mark.parametrize(
    "known", [[], [measured(card="X2")], [measured(configuration="coco")], [measured(workers=3)]]
)
def test_without_one_the_step_is_counted_and_called_an_estimate(
    known: list[Measured], data: Path
) -> None:
    found = pace(TINY, data, *known)
    assert found.line.split()[0] == "estimate"
    assert "nothing was measured" in found.line
    assert "in fp16" in found.line  # as a card of capability 7.5 computes
    assert 0 < found.step_seconds < 1
    assert not found.is_of_a_processor


def test_where_no_card_is_told_a_processor_is_timed(data: Path) -> None:
    found = pace(TINY, data, types=("head",))
    assert found.line.split()[0] == "timed"
    assert found.is_of_a_processor


def test_steps_are_as_long_as_those_of_a_named_configuration_if_only_the_rest_differs() -> None:
    rest = {"optim.learning_rate": 1e-3, "optim.epochs": 3, "data.path": "x", "loss.margin": 0.3}
    assert same_steps(BASELINES["flickr30k"].with_overrides(rest)) == ["flickr30k"]
    for changed in ({"model.dim": 512}, {"optim.batch_size": 64}, {"optim.precision": "fp32"}):
        assert same_steps(BASELINES["flickr30k"].with_overrides(changed)) == []
