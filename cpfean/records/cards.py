"""Which cards there are, what their makers say of them, and what was measured on them."""

from __future__ import annotations

import datetime
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from cpfean.errors import ConfigError

_TEXTS = ("card", "configuration", "source", "commit")
_NUMBERS = ("step_seconds", "validation_seconds")


@dataclass(frozen=True, kw_only=True, slots=True)
class Card:
    """A card by its maker's figures.

    Attributes:
        name: as its driver tells it.
        capability: compute capability, major and minor.
        tflops_16: dense matrix products of 16-bit numbers, 10^12 operations a second.
        tflops_32: the same in float32.
        gb_per_second: of its memory, 10^9 bytes.
    """

    name: str
    capability: tuple[int, int]
    tflops_16: float
    tflops_32: float
    gb_per_second: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """A training that was timed on a card.

    Attributes:
        card: its name.
        configuration: a name that --config takes.
        workers: that shared the batch.
        step_seconds: of a training step.
        validation_seconds: of an epoch, all workers together.
        source: the command that measured it, or the file with its result.
        date: of the day.
        commit: of this project.
    """

    card: str
    configuration: str
    workers: int
    step_seconds: float
    validation_seconds: float
    source: str
    date: datetime.date
    commit: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Cards:
    """What a file of prices says of cards.

    Attributes:
        known: by name.
        nodes: which card the nodes have, by their type.
        measured: in the order of the file.
    """

    known: Mapping[str, Card] = field(default_factory=dict)
    nodes: Mapping[str, str] = field(default_factory=dict)
    measured: tuple[Measured, ...] = ()

    @classmethod
    def read(cls, plain: Mapping[str, Any], *, nodes: Mapping[str, str]) -> Cards:
        """From the tables [cards] and [[measured]].

        Args:
            plain: the file.
            nodes: the names of the cards that nodes have.

        Raises:
            ConfigError: they say what cannot be understood.
        """
        tables, rows = plain.get("cards", {}), plain.get("measured", [])
        if not isinstance(tables, dict) or not isinstance(rows, list):
            raise ConfigError(
                "[cards] must have a table for each name, and [[measured]] be a list."
            )
        known = {name: _card(name, table) for name, table in tables.items()}
        for of, name in nodes.items():
            if name not in known:
                raise ConfigError(f"{of}: card must be one of [cards]; got {name!r}.")
        measured = tuple(_measured(number, row) for number, row in enumerate(rows, start=1))
        return cls(known=known, nodes=nodes, measured=measured)

    def slowest(self, types: Iterable[str]) -> Card | None:
        """Of nodes of these types: the card that the others wait for; None if none is told."""
        there = {self.nodes[of] for of in types if of in self.nodes}
        return min(
            (self.known[name] for name in there), key=lambda card: card.tflops_16, default=None
        )

    def newest(self, card: str, configurations: Iterable[str], *, workers: int) -> Measured | None:
        """The newest measurement of any of these configurations on a card."""
        names = set(configurations)
        fitting = [
            one
            for one in self.measured
            if (one.card, one.workers) == (card, workers) and one.configuration in names
        ]
        return max(fitting, key=lambda one: one.date, default=None)


def _card(name: str, table: Any) -> Card:
    where = f'cards."{name}"'
    if not isinstance(table, dict):
        raise ConfigError(f"{where} must be a table.")
    capability = table.get("capability")
    if not isinstance(capability, list) or [type(part) for part in capability] != [int, int]:
        raise ConfigError(f"{where}.capability must be like [8, 9]; got {capability!r}.")
    rates = ("tflops_16", "tflops_32", "gb_per_second")
    return Card(
        name=name,
        capability=(capability[0], capability[1]),
        **{rate: _above_zero(f"{where}.{rate}", table.get(rate)) for rate in rates},
    )


def _measured(number: int, row: Any) -> Measured:
    where = f"measured, entry {number}"
    wanted = {*_TEXTS, *_NUMBERS, "workers", "date"}
    if not isinstance(row, dict) or row.keys() != wanted:
        raise ConfigError(f"{where} must have {', '.join(sorted(wanted))}, and nothing else.")
    for name in _TEXTS:
        if not isinstance(row[name], str) or not row[name].strip():
            raise ConfigError(f"{where}: {name} must be a text; got {row[name]!r}.")
    if type(row["workers"]) is not int or row["workers"] < 1:
        raise ConfigError(f"{where}: workers must be 1 or more; got {row['workers']!r}.")
    if type(row["date"]) is not datetime.date:
        raise ConfigError(f"{where}: date must be a day like 2026-11-30; got {row['date']!r}.")
    seconds = {name: _above_zero(f"{where}: {name}", row[name]) for name in _NUMBERS}
    return Measured(**(row | seconds))


def _above_zero(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ConfigError(f"{name} must be a number above 0; got {value!r}.")
    return float(value)
