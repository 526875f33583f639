"""How a study is stopped, and how long each part of it may take to."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    pass


SAVE_SECONDS = 4.0  # that trials have to save where they are when a study is told to stop
_STOP_SECONDS = 7.0  # that Tune and Ray have to end, those included
STOPPED_SECONDS = 9.0  # after which it has stopped; what the tracker lacks by then waits


class Interrupted(BaseException):
    """The user or the system asked us to stop; everything is recorded for a resume."""

    def __init__(self, signal_number: int) -> None:
        super().__init__(signal_number)
        self.exit_code = 128 + signal_number


@contextmanager
def stopped_by_signals(stop: Callable[[int], None], say: Callable[[str], None]) -> Iterator[None]:
    """SIGINT and SIGTERM call `stop` with their number; the second one ends the process at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    told = False

    def handle(number: int, _frame: object) -> None:
        nonlocal told
        if told:
            os._exit(128 + number)
        told = True
        # It may have come in the middle of another line.
        with suppress(RuntimeError):
            say("stopping ... (once more to stop at once)")
        stop(number)

    os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, handle) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def seconds_to_stop(told: float) -> float:
    """What is left of the time that a study has to stop.

    Args:
        told: when it was told to, by the monotonic clock; 0 if by no signal.
    """
    return max(0.0, STOPPED_SECONDS - (time.monotonic() - told if told else 0.0))
