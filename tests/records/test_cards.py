"""Cards in a file of prices: which nodes have which, and what was measured on them."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from cpfean.errors import ConfigError
from cpfean.records.budget import Prices
from cpfean.records.cards import Cards
from experiments.baselines import BASELINES

ROOT = Path(__file__).resolve().parents[2]
PRICES = ROOT / "experiments" / "prices.toml"

CARDS = """
[cards]
"X1" = { capability = [8, 9], tflops_16 = 120, tflops_32 = 30.5, gb_per_second = 300 }
"X2" = { capability = [7, 5], tflops_16 = 60, tflops_32 = 8, gb_per_second = 320 }
"""
NODES = """
[instances.m9]
on_demand = 1
spot = 1
card = "X1"
[nodes]
head = { dollars = 1 }
worker = { instance = "m9", market = "spot" }
other = { dollars = 1, card = "X2" }
"""
MEASURED = """
[[measured]]
card = "X1"
configuration = "coco"
workers = 2
step_seconds = 0.25
validation_seconds = 9
source = "a command"
date = 2027-01-02
commit = "abc"
"""


def read(text: str, tmp_path: Path) -> Prices:
    (tmp_path / "p.toml").write_text(text)
    return Prices.read(tmp_path / "p.toml")


def test_a_node_has_the_card_of_its_machine_or_its_own(tmp_path: Path) -> None:
    cards = read(CARDS + NODES, tmp_path).cards
    assert cards.nodes == {"worker": "X1", "other": "X2"}
    assert cards.slowest(["head"]) is None
    found = cards.slowest(["head", "worker"])
    assert found is not None
    assert (found.name, found.capability, found.tflops_32) == ("X1", (8, 9), 30.5)
    slow = cards.slowest(["worker", "other", "worker"])
    assert slow is not None
    assert slow.name == "X2"


def test_the_newest_measurement_that_fits_is_taken(tmp_path: Path) -> None:
    newer = MEASURED.replace("2027-01-02", "2027-01-03").replace("0.25", "0.2")
    cards = read(CARDS + newer + MEASURED, tmp_path).cards
    found = cards.newest("X1", ["flickr30k", "coco"], workers=2)
    assert found is not None
    assert (found.step_seconds, found.validation_seconds) == (0.2, 9.0)
    assert cards.newest("X1", ["coco"], workers=1) is None
    assert cards.newest("X2", ["coco"], workers=2) is None
    assert cards.newest("X1", ["flickr30k"], workers=2) is None


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (CARDS.replace("[8, 9]", "8.9"), 'cards."X1".capability must be like [8, 9]; got 8.9'),
        (CARDS.replace("[8, 9]", "[8]"), "must be like [8, 9]"),
        (CARDS.replace("tflops_16 = 120, ", ""), 'cards."X1".tflops_16 must be a number above 0'),
        (CARDS.replace("30.5", "0"), 'cards."X1".tflops_32 must be a number above 0; got 0'),
        (CARDS.replace("300", "'300'"), "gb_per_second must be a number above 0"),
        ("cards = 3", "[cards] must have a table for each name"),
        ("cards = { X1 = 3 }", 'cards."X1" must be a table'),
        (NODES, "worker: card must be one of [cards]; got 'X1'"),
        ("measured = 3", "[[measured]] be a list"),
        (MEASURED.replace('commit = "abc"', ""), "measured, entry 1 must have"),
        (MEASURED + 'by = "me"', "and nothing else"),
        (MEASURED.replace('"abc"', '""'), "commit must be a text"),
        (MEASURED.replace("workers = 2", "workers = 0"), "workers must be 1 or more; got 0"),
        (MEASURED.replace("2027-01-02", '"today"'), "date must be a day"),
        (MEASURED.replace("0.25", "-1"), "step_seconds must be a number above 0; got -1"),
        (MEASURED + MEASURED.replace("= 9", "= nan"), "entry 2: validation_seconds must be"),
    ],
)
def test_what_is_no_card_or_no_measurement_is_refused_by_name(
    text: str, said: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError) as refused:
        read(text, tmp_path)
    assert said in str(refused.value)
    assert "p.toml" in str(refused.value)


def test_the_workers_of_the_cluster_have_a_card_and_the_head_has_none() -> None:
    cards = Prices.read(PRICES).cards
    assert cards.nodes == {"gpu-worker": "NVIDIA L4"}


def unknown(cards: Cards) -> list[str]:
    """What measurements name that nobody can look up."""
    found = []
    for one in cards.measured:
        commit = ["git", "-C", str(ROOT), "cat-file", "-e", f"{one.commit}^{{commit}}"]
        found += [] if one.card in cards.known else [one.card]
        found += [] if one.configuration in BASELINES else [one.configuration]
        found += [one.commit] if subprocess.run(commit, capture_output=True).returncode else []
    return found


def test_what_is_said_to_be_measured_can_be_looked_up(tmp_path: Path) -> None:
    assert unknown(Prices.read(PRICES).cards) == []
    assert unknown(read(CARDS + MEASURED, tmp_path).cards) == ["abc"]
    assert unknown(read(MEASURED, tmp_path).cards) == ["X1", "abc"]
