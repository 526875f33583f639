"""The times of cron expressions, in UTC."""

import time
from datetime import UTC, datetime

import pytest

from orchestration.schedule.due_times import due_slots, next_time, slot_of, time_of, trigger_of


@pytest.mark.parametrize(
    ("cron", "now", "since", "expected"),
    [
        ("0 2 * * *", "2026-11-24 01:59", "2026-11-20", "2026-11-23 02:00"),
        ("0 2 * * *", "2026-11-24 02:00", "2026-11-20", "2026-11-24 02:00"),
        ("*/5 * * * *", "2026-11-24 10:07", "2026-11-20", "2026-11-24 10:05"),
        ("0 0 1 * *", "2026-11-24 10:07", "2026-01-20", "2026-11-01 00:00"),
        ("0 0 29 2 *", "2027-06-01", "2020-01-01", "2024-02-29 00:00"),
        ("0 2 * * *", "2026-11-24 01:59", "2026-11-23 02:00", None),
        ("0 2 * * *", "2026-11-24 01:59", "2026-11-23 12:00", None),
        # The clocks of Europe went back on 25 October; slots are in UTC.
        ("30 1 * * *", "2026-10-25 12:00", "2026-10-01", "2026-10-25 01:30"),
    ],
)
def test_the_newest_slot_that_is_due(cron: str, now: str, since: str, expected: str | None) -> None:
    def utc(text: str) -> datetime:
        return datetime.fromisoformat(text).replace(tzinfo=UTC)

    newest = due_slots(trigger_of(cron), utc(now), since=utc(since))[-1:]
    assert [time_of(slot) for slot in newest] == ([utc(expected)] if expected else [])


def test_slots_come_oldest_first_and_after_a_long_pause_only_the_newest() -> None:
    now = datetime(2026, 11, 24, 10, 7, tzinfo=UTC)
    few = due_slots(trigger_of("*/2 * * * *"), now, since=now.replace(minute=1))
    assert few == ["20261124T100200Z", "20261124T100400Z", "20261124T100600Z"]
    started = time.monotonic()
    many = due_slots(trigger_of("* * * * * *"), now, since=now.replace(year=2016))
    assert time.monotonic() - started < 5  # and not as many steps as seconds in ten years
    assert (len(many), many[-1]) == (101, "20261124T100700Z")
    assert many == sorted(many)


def test_what_is_next_is_later_than_now_and_may_never_be() -> None:
    now = datetime(2026, 11, 24, 10, 0, tzinfo=UTC)
    later = next_time(trigger_of("0 * * * *"), now)
    assert later is not None
    assert slot_of(later) == "20261124T110000Z"
    assert next_time(trigger_of("0 0 30 2 *"), now) is None
