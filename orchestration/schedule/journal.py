"""What became of each slot: a file of JSON lines, to which every scheduler and round adds."""

from __future__ import annotations

import json
import logging
import os
from collections import defaultdict
from collections.abc import Sequence
from datetime import datetime, timedelta
from pathlib import Path
from typing import NamedTuple

from cpfean.errors import ConfigError, ServiceError
from cpfean.files import is_there, read_file
from cpfean.json_files import LARGEST, of_type
from orchestration.schedule.suites import slot_of

logger = logging.getLogger("cpfean.schedule")

_WRONG_CLOCK = timedelta(days=1)  # a slot further ahead was noted by a clock that was wrong

_OPEN = ("submitted", "known")
_ENDED = ("done", "changed", "failed", "stopped")
_NOT_RUN = ("skipped", "missed", "paused")
_OF_A_SUITE = ("added", "resumed")


class Row(NamedTuple):
    """One line: what became of a slot, and why if that needs a reason.

    `what` is "submitted", or "known" to Ray from another scheduler; how a round has ended;
    "skipped", "missed" or "paused"; and without a slot "added" or "resumed", of the suite.
    """

    time: str
    suite: str
    slot: str
    what: str
    why: str = ""


class Standing:
    """What became of a suite's slots.

    Args:
        rows: the lines of the suite, oldest first.

    Attributes:
        last: of the round that was run or heard of last.
        not_run: of the last slot that was not run; of what there is not yet all is empty.
        is_paused: until somebody resumes it.
    """

    def __init__(self, rows: Sequence[Row]) -> None:
        self._rows = rows
        self.last = self.not_run = Row("", "", "", "", "")
        self.is_paused = bool(rows) and rows[-1].what == "paused"
        for row in rows:
            if row.what in _NOT_RUN:
                self.not_run = row
            elif row.what in (*_OPEN, *_ENDED):
                self.last = row

    def newest_slot(self, now: datetime) -> str:
        """The newest slot that was dealt with; "" before the first.

        Older ones count as dealt with too: a clock that is set back brings none of them back.
        """
        limit = slot_of(now + _WRONG_CLOCK)
        return max((row.slot for row in self._rows if row.slot <= limit), default="")

    def failed_slots(self) -> list[str]:
        """The slots of the newest rounds, as far back as all failed; newest first.

        Asked while none runs: a round that was submitted and did not say how it ended was killed.
        """
        became: dict[str, set[str]] = defaultdict(set)
        for row in self._rows:
            if row.what in _OF_A_SUITE:
                became.clear()
            else:
                became[row.slot].add(row.what)
        failed = []
        for slot in sorted(became, reverse=True):
            if became[slot] & {"done", "changed"}:
                break
            # One that was stopped by hand, or not run after all, says nothing.
            if became[slot] & {"failed", *_OPEN} and not became[slot] & {"stopped", "skipped"}:
                failed.append(slot)
        return failed


class Journal:
    """A file that lines are only added to."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._told = False

    def add(self, row: Row) -> None:
        """Raises ServiceError if the file cannot be written."""
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            with self._file.open("ab+") as file:
                # A line that a power cut left unfinished must not spoil this one.
                size = file.seek(0, os.SEEK_END)
                file.seek(max(0, size - 1))
                start = b"\n" if file.read(1) not in (b"", b"\n") else b""
                # One write to the end of the file: lines of two schedulers do not mix.
                file.write(start + json.dumps(row._asdict()).encode() + b"\n")
        except OSError as error:
            raise ServiceError(f"{self._file}: cannot be written: {error}") from None

    def standing(self, suite: str) -> Standing:
        """What became of a suite's slots; raises ServiceError if the file cannot be read."""
        if not is_there(self._file):
            return Standing([])
        try:
            text = read_file(self._file, limit=LARGEST).decode("utf-8", errors="replace")
        except OSError as error:
            raise ServiceError(
                f"{self._file}: cannot be read: {error.strerror}. It was left as it is; without "
                "it what has been run is not known, and Ray refuses what it still knows."
            ) from None
        rows, unknown = [], 0
        for line in filter(str.strip, text.split("\n")):
            try:
                plain = json.loads(line)
                rows.append(Row(*(of_type(plain[name], str, path=name) for name in Row._fields)))
            # Cut off by a power cut, damaged, or of a release that writes others.
            except (ValueError, RecursionError, KeyError, TypeError, ConfigError):
                unknown += 1
        if unknown and not self._told:
            self._told = True
            logger.warning("%s: %d line(s) are damaged and left out.", self._file, unknown)
        return Standing([row for row in rows if row.suite == suite])
