"""When a suite is due: the times of a cron expression, in UTC; each of them is a slot."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

from cpfean.errors import ConfigError

if TYPE_CHECKING:
    from apscheduler.triggers.cron import CronTrigger

_SLOT = "%Y%m%dT%H%M%SZ"
_FIELDS = ("second", "minute", "hour", "day", "month", "day_of_week")
_MOST = 101  # slots after one pause


def slot_of(time: datetime) -> str:
    """The name of a time in UTC, e.g. 20261124T020000Z; names sort as their times do."""
    return time.strftime(_SLOT)


def time_of(slot: str) -> datetime:
    """The time that `slot_of` has named."""
    return datetime.strptime(slot, _SLOT).replace(tzinfo=UTC)


def trigger_of(cron: str) -> CronTrigger:
    """The times of a cron expression: five fields, minute to weekday, or six, seconds first.

    Raises:
        ConfigError: it is none.
    """
    from apscheduler.triggers.cron import CronTrigger

    fields = cron.split()
    if len(fields) not in (5, 6):
        raise ConfigError(
            "--cron needs five fields (minute hour day month weekday), e.g. '0 2 * * *' for two "
            f"o'clock every night, UTC; got {cron!r}."
        )
    try:
        return CronTrigger(timezone=UTC, **dict(zip(_FIELDS[-len(fields) :], fields, strict=True)))
    except ValueError as error:
        raise ConfigError(f"--cron {cron!r}: {error}.") from None


def next_time(trigger: CronTrigger, now: datetime) -> datetime | None:
    """The first time of a trigger after `now`; None if there is none, as of 30 February."""
    return trigger.get_next_fire_time(None, now + timedelta(microseconds=1))


def due_slots(trigger: CronTrigger, now: datetime, *, since: datetime) -> list[str]:
    """The newest slots, 101 at most, after `since` and not after `now`; oldest first."""
    reach = timedelta(minutes=2)
    while True:
        start = max(since, now - reach)
        newest = deque(_times(trigger, start, now), maxlen=_MOST)
        if start == since or len(newest) == _MOST:
            return [slot_of(time) for time in newest]
        reach *= 4


def _times(trigger: CronTrigger, since: datetime, until: datetime) -> Iterator[datetime]:
    time = next_time(trigger, since)
    while time is not None and time <= until:
        yield time
        time = next_time(trigger, time)
