"""What a study will take and what it has taken: hours, dollars and disk.

Nothing here knows of Ray or torch. Hours and dollars are counted in the driver, over all attempts,
in `spent.json` of the study's folder: a driver that is killed loses what it counted since it last
wrote, half a minute at most. A limit belongs to no plan: a study that it ended is resumed with a
larger one.
"""

from __future__ import annotations

import math
import shutil
import time
import tomllib
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cpfean.errors import ConfigError, ServiceError
from cpfean.files import read_file
from cpfean.json_files import RecordError, read_fields
from cpfean.records.cards import Cards
from cpfean.writing import write_json

SPENT = "spent.json"
OTHER = "other"  # the type of a node that tells none
_SAVED_SECONDS = 30.0
_LARGEST = 1_000_000  # bytes of a file of prices
_MARKETS = ("on_demand", "spot")
_WITHOUT = "Without it hours and dollars are counted from 0 again."


@dataclass(frozen=True, kw_only=True, slots=True)
class Price:
    """Of a node, in dollars an hour: where it is bought, and where nobody takes it away."""

    dollars: float
    on_demand: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Prices:
    """What nodes cost by their type, which cards they have, and the file that says so."""

    file: Path
    nodes: Mapping[str, Price]
    cards: Cards = field(default_factory=Cards)

    @classmethod
    def read(cls, file: Path) -> Prices:
        """From a file like experiments/prices.toml.

        Raises:
            ConfigError: it cannot be read, or says what cannot be understood.
        """
        try:
            plain = tomllib.loads(read_file(file, limit=_LARGEST).decode("utf-8-sig"))
            machines, described = _tables("instances", plain), _tables("nodes", plain)
            instances = {
                name: {market: _dollars(f"instances.{name}", of, market) for market in _MARKETS}
                for name, of in machines.items()
            }
            nodes = {
                name: _price(f"nodes.{name}", node, instances) for name, node in described.items()
            }
            # A node has the card that it tells itself, or else its machine's.
            told = {
                name: machines.get(str(of.get("instance")), {}) | of
                for name, of in described.items()
            }
            of_nodes = {name: str(of["card"]) for name, of in told.items() if "card" in of}
            cards = Cards.read(plain, nodes=of_nodes)
        except OSError as error:
            raise ConfigError(f"{file}: cannot be read: {error.strerror}.") from None
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{file}: not valid TOML: {error}.") from None
        except ConfigError as error:
            raise ConfigError(f"{file}: {error}") from None
        return cls(file=file, nodes=nodes, cards=cards)

    def unknown(self, types: Iterable[str]) -> list[str]:
        """Those of the types that have no price."""
        return sorted({name for name in types if name not in self.nodes})

    def hourly(self, types: Iterable[str], *, on_demand: bool = False) -> float:
        """Dollars an hour of nodes of these types; without a price they cost nothing."""
        priced = [self.nodes[name] for name in types if name in self.nodes]
        return math.fsum(price.on_demand if on_demand else price.dollars for price in priced)


@dataclass(frozen=True, kw_only=True, slots=True)
class Budget:
    """What a study may take before it begins no new trial.

    Attributes:
        max_hours: by the clock on the wall, from start to end of every attempt.
        max_cost: in dollars, of all nodes of the cluster for those hours.
        prices: of the nodes.
    """

    max_hours: float | None = None
    max_cost: float | None = None
    prices: Prices | None = None

    def __post_init__(self) -> None:
        for flag, value in (("--max-hours", self.max_hours), ("--max-cost", self.max_cost)):
            if value is not None and not 0 < value < math.inf:
                raise ConfigError(f"{flag} must be a number above 0; got {value:g}.")

    def used_up(self, *, hours: float, dollars: float) -> str:
        """Which limit is reached, as a phrase; empty if none is."""
        if self.max_hours is not None and hours >= self.max_hours:
            return f"--max-hours {self.max_hours:g} is used up: {hours:.3g} h"
        if self.max_cost is not None and dollars >= self.max_cost:
            return f"--max-cost {self.max_cost:g} is used up: ${dollars:.2f}"
        return ""

    def check_prices(self, types: Sequence[str]) -> None:
        """Raises ConfigError if there is a limit in dollars and a node without a price."""
        unknown = self.prices.unknown(types) if self.prices else sorted(set(types))
        if self.max_cost is not None and unknown:
            where = self.prices.file if self.prices else "a file of prices"
            raise ConfigError(
                f"--max-cost needs the price of every node, and {where} has none for "
                f"{', '.join(map(repr, unknown))}: put it under [nodes], or limit --max-hours."
            )


@dataclass(eq=False)
class Meter:
    """Hours and dollars of a study over all its attempts, beside what it may take.

    Attributes:
        before: files of studies that count as part of this one.
        nodes: types of the nodes that are held now.
        clock: seconds from any origin; never goes back.
        used_up: the limit that kept trials from being begun; empty as long as none did.

    Raises:
        RecordError: a file that is damaged or of another release.
    """

    file: Path
    budget: Budget = Budget()
    before: Sequence[Path] = ()
    nodes: Callable[[], Sequence[str]] = tuple
    say: Callable[[str], None] = print
    clock: Callable[[], float] = time.monotonic

    def __post_init__(self) -> None:
        self.used_up = ""
        self._last = self._saved = self.clock()
        self._rate: float | None = None
        self._unpriced = 0.0  # seconds of this attempt, as long as no price is known
        self._not_counted: set[str] = set()  # types of nodes of which that was said
        self._own = _spent(self.file)
        self._parts = [self._own, *map(_spent, self.before)]

    @property
    def hours(self) -> float:
        """Of all attempts, up to the last look at the clock."""
        return math.fsum(part.seconds for part in self._parts) / 3600

    @property
    def dollars(self) -> float | None:
        """The same in dollars; None if no price was ever known."""
        known = [part.dollars for part in self._parts if part.dollars is not None]
        return math.fsum(known) if known else None

    @property
    def spent(self) -> str:
        """Hours, and dollars where a price was ever known, up to now; for people."""
        self.look()
        cost = "" if self.dollars is None else f", ${self.dollars:.2f}"
        return f"{self.hours:.2f} h{cost}"

    @property
    def is_due(self) -> bool:
        """Whether it is time to count, and to write."""
        return self.clock() - self._saved >= _SAVED_SECONDS

    def count(self) -> None:
        """Counts up to now by the nodes that there are now, and writes it down."""
        hourly, prices = None, self.budget.prices
        if prices is not None:
            types = self.nodes()
            unknown = set(prices.unknown(types))
            # A limit in dollars was refused at the start if a node had no price; one that joins
            # later is told of, and so is any that is missing in the dollars that are shown.
            matters = self.budget.max_cost is not None or unknown < set(types)
            if matters and unknown - self._not_counted:
                names = ", ".join(sorted(unknown))
                self.say(f"{prices.file} has no price of {names}: not counted.")
                self._not_counted |= unknown
            hourly = None if unknown >= set(types) else prices.hourly(types)
        self.look(hourly)
        self.save()

    def look(self, hourly: float | None = None) -> None:
        """Counts the time since the last look.

        Args:
            hourly: dollars an hour of what is held since then; None: as before. What this attempt
                took before the first price is known costs that one.
        """
        now = self.clock()
        self._rate = self._rate if hourly is None else hourly
        passed, self._last = now - self._last, now
        self._own.seconds += passed
        self._unpriced += passed
        if self._rate is not None:
            self._own.dollars = (self._own.dollars or 0.0) + self._unpriced / 3600 * self._rate
            self._unpriced = 0.0

    def save(self) -> None:
        """Writes what was counted, if it can be written: a full disk ends no study by this."""
        self._saved = self.clock()
        own = {"seconds": round(self._own.seconds, 3), "dollars": self._own.dollars}
        with suppress(ServiceError):
            write_json(self.file, own)

    def allows_another(self, *, left: int, running: int) -> bool:
        """Whether one more trial may be begun.

        Args:
            left: trials that are not begun, for the line that is said once.
            running: trials that are underway.
        """
        self.look()
        reached = self.budget.used_up(hours=self.hours, dollars=self.dollars or 0.0)
        if reached and not self.used_up:
            self.used_up = reached
            self.say(f"{reached}: {left} trial(s) are not begun, {running} running go on.")
        return not reached

    def metrics(self) -> dict[str, float]:
        """For the tracker."""
        cost = {} if self.dollars is None else {"study/cost": self.dollars}
        return {"study/hours": self.hours} | cost


@dataclass(frozen=True, kw_only=True, slots=True)
class Disk:
    """Room that the checkpoints of a plan need, all at once: those of settled trials stay.

    Attributes:
        each: bytes of a checkpoint: weights, two moments of each, and the best epoch's weights.
        trials: that are still to be run.
        kept: checkpoints of a trial.
        at_a_time: trials; each writes a new checkpoint before it removes an old one.
    """

    each: int
    trials: int
    kept: int
    at_a_time: int

    @property
    def needed(self) -> int:
        """Bytes."""
        return self.each * (self.kept * self.trials + min(self.at_a_time, self.trials))

    def __str__(self) -> str:
        return (
            f"{size(self.needed)} for checkpoints: {self.trials} trial(s) x {self.kept} kept and "
            f"{min(self.at_a_time, self.trials)} being written, at most {size(self.each)} each"
        )


def free_bytes(folder: Path) -> int:
    """Free space where a folder is or will be."""
    there = next(parent for parent in (folder, *folder.parents) if parent.exists())
    return shutil.disk_usage(there).free


def eta(seconds: float) -> str:
    """How long something will still take, as a study that runs says it."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"ETA {hours}:{minutes:02d}:{seconds:02d}" if hours else f"ETA {minutes}:{seconds:02d}"


def size(number: float) -> str:
    """Bytes for people."""
    for unit in ("bytes", "kB", "MB"):
        if number < 1000:
            return f"{number:.3g} {unit}"
        number /= 1000
    return f"{number:.3g} GB" if number < 1000 else f"{number:.0f} GB"


@dataclass(kw_only=True, slots=True)
class _Spent:
    """What the file of a meter holds."""

    seconds: float = 0.0
    dollars: float | None = None


def _spent(file: Path) -> _Spent:
    """What a file says was spent; nothing if it is not there."""
    given = read_fields(file, _Spent, without=_WITHOUT, optional=("dollars",)) or {}
    for name, value in given.items():
        if value is not None and not 0 <= value < math.inf:
            raise RecordError(file, f"{name} must be 0 or more; got {value}", without=_WITHOUT)
    return _Spent(**given)


def _tables(name: str, plain: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    tables = plain.get(name, {})
    if isinstance(tables, dict) and all(isinstance(of, dict) for of in tables.values()):
        return tables
    raise ConfigError(f"[{name}] must have a table for each name, as in prices.toml.")


def _dollars(name: str, table: Mapping[str, Any], key: str) -> float:
    value = table.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
        raise ConfigError(f"{name}.{key} must be dollars an hour; got {value!r}.")
    return float(value)


def _price(name: str, node: Mapping[str, Any], instances: Mapping[str, dict[str, float]]) -> Price:
    if "dollars" in node:
        dollars = _dollars(name, node, "dollars")
        return Price(dollars=dollars, on_demand=dollars)
    instance, market = str(node.get("instance")), node.get("market")
    if instance not in instances:
        raise ConfigError(f"{name}.instance must be one of [instances]; got {instance!r}.")
    if market not in _MARKETS:
        raise ConfigError(f'{name}.market must be "on_demand" or "spot"; got {market!r}.')
    of = instances[instance]
    return Price(dollars=of[market], on_demand=of["on_demand"])
