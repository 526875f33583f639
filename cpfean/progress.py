"""Progress of anything that may take longer than ten seconds."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Literal

logger = logging.getLogger(__name__)


class Progress:
    """Logs how far a piece of work is and how long it will still take, every ten seconds."""

    def __init__(
        self,
        what: str,
        *,
        total: int,
        unit: Literal["", "%"] = "",
        interval: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Starts the clock.

        Args:
            what: the work, as a phrase: "encoding captions".
            total: steps in all.
            unit: "%" says how far it is in percent, where the steps mean nothing to people.
            interval: seconds between two lines.
            clock: seconds from any origin.
        """
        self.what = what
        self.total = total
        self.unit = unit
        self.interval = interval
        self._clock = clock
        self._start = self._said = clock()

    def step(self, done: int, note: str = "") -> None:
        """Says how far the work is, if it is time to.

        Args:
            done: steps finished so far.
            note: put behind, e.g. the loss.
        """
        now = self._clock()
        if done <= 0 or done >= self.total or now - self._said < self.interval:
            return
        self._said = now
        left = (now - self._start) / done * (self.total - done)
        note = f", {note}" if note else ""
        far = f"{100 * done // self.total} %" if self.unit == "%" else f"{done}/{self.total}"
        logger.info("%s: %s%s, %s left", self.what, far, note, duration(left))


def duration(seconds: float) -> str:
    """A length of time for people: "42 s", "3 min 05 s", "2 h 10 min"."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
