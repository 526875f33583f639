"""What a user is told of long work, and how work is split."""

from __future__ import annotations

import logging

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cpfean.processes import share
from cpfean.progress import Progress, duration


def test_progress_says_how_long_it_will_take(caplog: pytest.LogCaptureFixture) -> None:
    now = [0.0]
    progress = Progress("scoring", total=10, interval=10, clock=lambda: now[0])
    with caplog.at_level(logging.INFO):
        for done, seconds in ((1, 4.0), (4, 12.0), (5, 15.0), (8, 24.0), (10, 40.0)):
            now[0] = seconds
            progress.step(done, "loss 1.5")
    assert [record.message for record in caplog.records] == [
        "scoring: 4/10, loss 1.5, 18 s left",
        "scoring: 8/10, loss 1.5, 6 s left",
    ]


def test_progress_in_percent(caplog: pytest.LogCaptureFixture) -> None:
    now = [0.0]
    progress = Progress("converting", total=4_000, unit="%", clock=lambda: now[0])
    with caplog.at_level(logging.INFO):
        now[0] = 30.0
        progress.step(3_000)
    assert [record.message for record in caplog.records] == ["converting: 75 %, 10 s left"]


def test_durations_read_like_durations() -> None:
    said = [duration(seconds) for seconds in (0.4, 59.4, 60, 185, 3600, 7810)]
    assert said == ["0 s", "59 s", "1 min 00 s", "3 min 05 s", "1 h 00 min", "2 h 10 min"]


@given(total=st.integers(0, 50), world_size=st.integers(1, 8))
def test_shares_cover_everything_once_and_evenly(total: int, world_size: int) -> None:
    shares = [share(total, rank=rank, world_size=world_size) for rank in range(world_size)]
    assert [row for start, stop in shares for row in range(start, stop)] == list(range(total))
    sizes = [stop - start for start, stop in shares]
    assert max(sizes) - min(sizes) <= 1
