"""Suites: when each is due, and the one file that a schedule keeps them in.

A suite is due at the times of a cron expression, in UTC; each of them is a slot.
"""

from __future__ import annotations

import fcntl
import os
import re
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cpfean import commands
from cpfean.errors import ConfigError, ServiceError
from cpfean.files import is_there
from cpfean.json_files import RecordError, aside, checked, of_type, read_table
from cpfean.writing import cannot_write, write_json

if TYPE_CHECKING:
    from apscheduler.triggers.cron import CronTrigger

_FILE = "suites.json"
_NAME = re.compile(r"[a-z0-9][a-z0-9_]{0,39}")
_WITHOUT = "Without it no suite is known; the journal beside it keeps what has been run."
_SLOT = "%Y%m%dT%H%M%SZ"
_FIELDS = ("second", "minute", "hour", "day", "month", "day_of_week")
_MOST = 101  # slots after one pause


def slot_of(time: datetime) -> str:
    """The name of a time in UTC, e.g. 20261124T020000Z; names sort as their times do."""
    return time.strftime(_SLOT)


@dataclass(frozen=True, kw_only=True, slots=True)
class Suite:
    """What runs, and when.

    Attributes:
        name: lower-case letters, digits and underscores.
        cron: five fields (minute, hour, day, month, day of the week), or six with seconds first.
        arguments: of `run_ablations.py`.
        added: when, as ISO 8601 with an offset; earlier slots are not caught up with.
    """

    name: str
    cron: str
    arguments: tuple[str, ...]
    added: str

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise ConfigError(
                "a suite's name is 1 to 40 lower-case letters, digits and underscores, and starts "
                f"with a letter or digit; got {self.name[:100]!r}."
            )
        self._trigger()
        with suppress(ValueError):
            if datetime.fromisoformat(self.added).tzinfo is not None:
                return
        raise ConfigError(f"added must be a time with an offset; got {self.added[:100]!r}.")

    def due(self, newest: str, now: datetime) -> list[str]:
        """The newest slots, 101 at most, since one that was dealt with, or ""; oldest first."""
        since = datetime.fromisoformat(self.added)
        if newest:
            since = max(since, datetime.strptime(newest, _SLOT).replace(tzinfo=UTC))
        reach = timedelta(minutes=2)
        while True:
            start = max(since, now - reach)
            slots = deque(self._slots(start, now), maxlen=_MOST)
            if start == since or len(slots) == _MOST:
                return list(slots)
            reach *= 4

    def next(self, now: datetime) -> datetime | None:
        """When it is due next, after `now`; None: never, as on 30 February."""
        return _after(self._trigger(), now)

    def _slots(self, since: datetime, until: datetime) -> Iterator[str]:
        trigger = self._trigger()
        time = _after(trigger, since)
        while time is not None and time <= until:
            yield slot_of(time)
            time = _after(trigger, time)

    def _trigger(self) -> CronTrigger:
        from apscheduler.triggers.cron import CronTrigger

        fields = self.cron.split()
        if len(fields) not in (5, 6):
            raise ConfigError(
                "--cron needs five fields (minute hour day month weekday), e.g. '0 2 * * *' for "
                f"two o'clock every night, UTC; got {self.cron!r}."
            )
        given = dict(zip(_FIELDS[-len(fields) :], fields, strict=True))
        try:
            return CronTrigger(timezone=UTC, **given)
        except ValueError as error:
            raise ConfigError(f"--cron {self.cron!r}: {error}.") from None


def _after(trigger: CronTrigger, time: datetime) -> datetime | None:
    return trigger.get_next_fire_time(None, time + timedelta(microseconds=1))


def read_suites(folder: Path) -> dict[str, Suite]:
    """The suites of a schedule, by name; none if it has no file.

    Raises:
        RecordError: the file is damaged, or of another release.
        ServiceError: others may write to it, or an earlier release has left its own.
    """
    file, old = folder / _FILE, folder / "schedule.db"
    if is_there(old):
        raise ServiceError(
            f"{old}: suites of an earlier release, as pickles. Reading those would run what is in "
            "them, so they are left alone, and nothing is run, until the file is put aside and "
            "the suites are added again; `schedule.py list` of that release shows their times and "
            "flags. The journal stays, and with it what has been run. To put it aside:\n"
            f"  {commands.move(old, aside(old, why='earlier'))}"
        )
    plain = read_table(file, without=_WITHOUT)
    if plain is None:
        return {}
    # Whoever may write to it decides what is run.
    if file.stat().st_uid != os.geteuid() or file.stat().st_mode & 0o022:
        raise ServiceError(
            f"{file}: others may write to it; own it, and {commands.for_owner_alone(file)}"
        )
    suites = {}
    for name, given in plain.items():
        try:
            given = of_type(given, dict[str, Any], path="it")
            if "name" in given:
                raise ConfigError("unknown field 'name'")
            suites[name] = Suite(**checked({"name": name} | given, Suite))
        except ConfigError as error:
            raise RecordError(file, f"suite {name[:100]!r}: {error}", without=_WITHOUT) from None
    return suites


@contextmanager
def edited_suites(folder: Path) -> Iterator[dict[str, Suite]]:
    """The suites by name, to be changed by one process at a time, and written at the end.

    Raises:
        RecordError, ServiceError: as `read_suites`; or the file cannot be written.
    """
    file = folder / _FILE
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # Not the file itself, which is replaced whenever it is written.
        lock = (folder / f".{file.name}.lock").open("a", encoding="utf-8")
        fcntl.flock(lock, fcntl.LOCK_EX)
    except OSError as error:
        raise cannot_write(file, error) from error
    with lock:
        suites = read_suites(folder)
        yield suites
        plain = {name: asdict(suites[name]) for name in sorted(suites)}
        for suite in plain.values():
            del suite["name"]
        write_json(file, plain, mode=0o600)
