"""What became of each slot: a file of JSON lines, to which every scheduler and round adds."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Sequence
from datetime import datetime, timedelta
from pathlib import Path
from typing import NamedTuple

from cpfean.errors import ConfigError, ServiceError
from cpfean.files import is_there, read_file
from cpfean.json_files import LARGEST, of_type
from orchestration.schedule.due_times import slot_of

logger = logging.getLogger("cpfean.schedule")

_WRONG_CLOCK = timedelta(days=1)  # a slot further ahead was noted by a clock that was wrong

_ENDED = ("done", "changed", "failed", "stopped")
_OPEN = ("submitted", "known")
_NOT_RUN = ("skipped", "missed", "paused")


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


_NONE = Row("", "", "", "", "")


class Standing(NamedTuple):
    """What became of a suite's slots lately; of a row that there is not yet all is empty."""

    last: Row  # the round that was run or heard of last
    not_run: Row  # the last slot that was not run
    is_paused: bool  # until somebody resumes it


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

    def rows(self, suite: str) -> list[Row]:
        """The lines of one suite, oldest first; raises ServiceError if they cannot be read."""
        if not is_there(self._file):
            return []
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
        return [row for row in rows if row.suite == suite]


def standing_of(rows: Sequence[Row]) -> Standing:
    """What became of the slots of the suite whose lines these are."""
    *_, last = [_NONE, *(row for row in rows if row.what in (*_OPEN, *_ENDED))]
    *_, not_run = [_NONE, *(row for row in rows if row.what in _NOT_RUN)]
    is_paused = bool(rows) and rows[-1].what == "paused"
    return Standing(last, not_run, is_paused)


def newest_slot(rows: Sequence[Row], now: datetime) -> str:
    """The newest slot that was dealt with; "" before the first.

    Older ones count as dealt with too: a clock that is set back brings none of them back.
    """
    limit = slot_of(now + _WRONG_CLOCK)
    return max((row.slot for row in rows if row.slot <= limit), default="")


def failed_slots(rows: Sequence[Row]) -> list[str]:
    """The slots of the newest rounds, as far back as all failed; newest first.

    Asked while none runs: a round that was submitted and did not say how it ended was killed.
    """
    became: dict[str, set[str]] = {}
    for row in rows:
        if row.what in ("added", "resumed"):
            became.clear()
        else:
            became.setdefault(row.slot, set()).add(row.what)
    failed = []
    for slot in sorted(became, reverse=True):
        if became[slot] & {"done", "changed"}:
            break
        # One that was stopped by hand, or not run after all, says nothing.
        if became[slot] & {"failed", *_OPEN} and not became[slot] & {"stopped", "skipped"}:
            failed.append(slot)
    return failed
