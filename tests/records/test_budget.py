"""What a study may take and has taken; the clock is the test's."""

from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from cpfean.errors import ConfigError
from cpfean.records.budget import (
    OTHER,
    SPENT,
    Budget,
    Meter,
    Price,
    Prices,
    eta,
    size,
)

ROOT = Path(__file__).resolve().parents[2]
PRICES = ROOT / "experiments" / "prices.toml"


@dataclass
class Clock:
    now: float = 100.0

    def __call__(self) -> float:
        return self.now


def prices(**dollars: float) -> Prices:
    return Prices(
        file=Path("p.toml"),
        nodes={name: Price(dollars=d, on_demand=2 * d) for name, d in dollars.items()},
    )


def test_every_node_type_of_the_cluster_has_the_price_of_its_instance_and_market() -> None:
    types = yaml.safe_load((ROOT / "cluster.yaml").read_text())["available_node_types"]
    known = Prices.read(PRICES)
    assert known.unknown(types) == []
    for name, kind in types.items():
        spot = "InstanceMarketOptions" in kind["node_config"]
        assert (known.nodes[name].dollars < known.nodes[name].on_demand) == spot, name
    text = PRICES.read_text()
    for name, kind in types.items():
        assert f'{name} = {{ instance = "{kind["node_config"]["InstanceType"]}"' in text


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[nodes", "not valid TOML"),
        ("nodes = 3", "must have a table for each name"),
        ("[nodes]\nhead = 3", "must have a table for each name"),
        ("[nodes]\nhead = { instance = 'm9' }", "nodes.head.instance must be one of"),
        ("[nodes]\nhead = { dollars = 'ten' }", "nodes.head.dollars must be dollars an hour"),
        ("[nodes]\nhead = { dollars = -1 }", "got -1"),
        ("[instances.m9]\non_demand = nan\nspot = 1", "instances.m9.on_demand"),
        ("[instances.m9]\non_demand = 1", "instances.m9.spot"),
        (
            "[instances.m9]\non_demand = 1\nspot = 1\n[nodes]\nhead = { instance = 'm9' }",
            'must be "on_demand" or "spot"',
        ),
    ],
)
def test_prices_that_are_none_are_refused_by_name(text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "p.toml").write_text(text)
    with pytest.raises(ConfigError) as refused:
        Prices.read(tmp_path / "p.toml")
    assert said in str(refused.value)
    assert "p.toml" in str(refused.value)


def test_a_missing_file_of_prices_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        Prices.read(tmp_path / "none.toml")


def test_a_price_may_be_given_outright(tmp_path: Path) -> None:
    (tmp_path / "p.toml").write_text("[nodes]\nother = { dollars = 0.5 }\n")
    known = Prices.read(tmp_path / "p.toml")
    assert known.hourly([OTHER, OTHER]) == known.hourly([OTHER, OTHER], on_demand=True) == 1.0


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_a_limit_is_a_number_above_zero(value: float) -> None:
    with pytest.raises(ConfigError, match="--max-hours must be a number above 0"):
        Budget(max_hours=value)
    with pytest.raises(ConfigError, match="--max-cost must be a number above 0"):
        Budget(max_cost=value)


def test_hours_and_dollars_add_up_over_attempts_and_prices(tmp_path: Path) -> None:
    clock = Clock()
    first = Meter(tmp_path / SPENT, clock=clock)
    clock.now += 3600
    first.look()
    assert (first.hours, first.dollars) == (1.0, None)  # no price was known
    clock.now += 3600
    first.look(2.0)  # the nodes that are there now, and were from the start
    clock.now += 1800
    first.look(4.0)
    assert first.hours == pytest.approx(2.5)
    assert first.dollars == pytest.approx(2 * 2.0 + 0.5 * 4.0)
    first.save()
    clock.now += 3600  # after the driver was killed nothing is counted

    second = Meter(tmp_path / SPENT, clock=clock)
    assert (second.hours, second.dollars) == (pytest.approx(2.5), pytest.approx(6.0))
    clock.now += 1800
    second.look(1.0)
    assert second.metrics() == {
        "study/hours": pytest.approx(3.0),
        "study/cost": pytest.approx(6.5),
    }


def test_a_meter_is_written_twice_a_minute_and_a_full_disk_does_not_stop_it(tmp_path: Path) -> None:
    clock = Clock()
    meter = Meter(tmp_path / "no" / "folder" / SPENT, clock=clock)
    assert not meter.is_due
    clock.now += 31
    assert meter.is_due
    meter.look()
    meter.save()
    assert not meter.is_due
    assert meter.hours == pytest.approx(31 / 3600)


def test_a_limit_is_reached_when_it_is_reached_and_not_before() -> None:
    budget = Budget(max_hours=2, max_cost=5)
    assert budget.used_up(hours=1.99, dollars=4.99) == ""
    assert "--max-hours 2" in budget.used_up(hours=2.0, dollars=0.0)
    assert "--max-cost 5" in budget.used_up(hours=0.0, dollars=5.0)
    assert Budget().used_up(hours=1e9, dollars=1e9) == ""


def test_a_limit_in_dollars_needs_the_price_of_every_node() -> None:
    Budget(max_cost=5, prices=prices(head=1)).check_prices(["head"])
    Budget(max_hours=5, prices=prices(head=1)).check_prices(["other"])
    for given in (prices(head=1), None):
        with pytest.raises(ConfigError, match="'other'"):
            Budget(max_cost=5, prices=given).check_prices(["other"])


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(0, "ETA 0:00"), (59.6, "ETA 1:00"), (3599, "ETA 59:59"), (7325, "ETA 2:02:05")],
)
def test_a_length_of_time_is_said_as_a_running_study_says_it(seconds: float, said: str) -> None:
    assert eta(seconds) == said


def test_bytes_are_said_in_three_digits() -> None:
    assert [size(n) for n in (0, 999, 1000, 12_345_678, 2.5e9, 4e12)] == [
        "0 bytes",
        "999 bytes",
        "1 kB",
        "12.3 MB",
        "2.5 GB",
        "4000 GB",
    ]
