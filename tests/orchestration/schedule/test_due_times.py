"""The times of cron expressions, in UTC."""

import time
from datetime import UTC, datetime

import pytest

from orchestration.schedule.suites import Suite, slot_of


def suite(cron: str, *, added: datetime) -> Suite:
    return Suite(name="s", cron=cron, arguments=(), added=added.isoformat())


def utc(text: str) -> datetime:
    return datetime.fromisoformat(text).replace(tzinfo=UTC)


@pytest.mark.parametrize(
    ("cron", "now", "since", "expected"),
    [
        ("0 2 * * *", "2026-11-24 01:59", "2026-11-20", "20261123T020000Z"),
        ("0 2 * * *", "2026-11-24 02:00", "2026-11-20", "20261124T020000Z"),
        ("*/5 * * * *", "2026-11-24 10:07", "2026-11-20", "20261124T100500Z"),
        ("0 0 1 * *", "2026-11-24 10:07", "2026-01-20", "20261101T000000Z"),
        ("0 0 29 2 *", "2027-06-01", "2020-01-01", "20240229T000000Z"),
        ("0 2 * * *", "2026-11-24 01:59", "2026-11-23 02:00", None),
        ("0 2 * * *", "2026-11-24 01:59", "2026-11-23 12:00", None),
        # The clocks of Europe went back on 25 October; slots are in UTC.
        ("30 1 * * *", "2026-10-25 12:00", "2026-10-01", "20261025T013000Z"),
    ],
)
def test_the_newest_slot_that_is_due(cron: str, now: str, since: str, expected: str | None) -> None:
    newest = suite(cron, added=utc(since)).due("", utc(now))[-1:]
    assert newest == ([expected] if expected else [])
    # The same if it was added long before, and a slot of that time was dealt with.
    assert suite(cron, added=utc("2019-01-01")).due(slot_of(utc(since)), utc(now))[-1:] == newest


def test_slots_come_oldest_first_and_after_a_long_pause_only_the_newest() -> None:
    now = datetime(2026, 11, 24, 10, 7, tzinfo=UTC)
    few = suite("*/2 * * * *", added=now.replace(minute=1)).due("", now)
    assert few == ["20261124T100200Z", "20261124T100400Z", "20261124T100600Z"]
    started = time.monotonic()
    many = suite("* * * * * *", added=now.replace(year=2016)).due("", now)
    assert time.monotonic() - started < 5  # and not as many steps as seconds in ten years
    assert (len(many), many[-1]) == (101, "20261124T100700Z")
    assert many == sorted(many)


def test_what_is_next_is_later_than_now_and_may_never_be() -> None:
    now = datetime(2026, 11, 24, 10, 0, tzinfo=UTC)
    later = suite("0 * * * *", added=now).next(now)
    assert later is not None
    assert slot_of(later) == "20261124T110000Z"
    assert suite("0 0 30 2 *", added=now).next(now) is None
