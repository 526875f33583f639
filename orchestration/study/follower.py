"""Brings MLflow and the copy on the storage up to date with a study's records.

The records are the truth, and what follows them is a sink. What has changed is dirty for a sink
until the sink has it, as it is by then and not as it was when it changed; a failure leaves it
dirty. Each sink has a thread of its own, so that one that hangs holds up neither the training nor
the others. What one subject is refused for is told once and holds up no other subject.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, NamedTuple, Protocol

from cpfean.records.trial_record import TrialRecord


@dataclass(frozen=True, slots=True)
class StudyNews:
    """The study as a whole: its state, as of a trial, its numbers, and tags that may change."""

    state: str
    metrics: Mapping[str, float] = field(default_factory=dict)
    tags: Mapping[str, str] = field(default_factory=dict)


class SinkError(Exception):
    """What a sink answers instead of taking something; the text is told once."""


class RefusedError(SinkError):
    """It takes all but this subject, which is asked again later."""


class ShutError(SinkError):
    """It takes nothing until somebody has mended it."""


class GivenUpError(SinkError):
    """It will never take anything."""


class Sink(Protocol):
    """What follows the records.

    Each `send_...` finds out what the sink has and sends what is missing. All but `load` and
    `lacks` are called by the thread of the sink. What they raise says that the sink is away,
    unless it is a `SinkError`.

    Attributes:
        name: of its thread.
        names_resume: whether `lacks` names the command that sends the rest.
        beat_due: when `beat` is to be called, by the monotonic clock.
    """

    name: str
    names_resume: bool

    @property
    def beat_due(self) -> float: ...

    def load(self) -> None:
        """Imports what it needs; raises ServiceError if that is not installed."""

    def open(self) -> None:
        """Called before each sending: connects, unless that has been done."""

    def send_study(self, news: StudyNews) -> None: ...

    def send_trial(self, record: TrialRecord) -> None: ...

    def send_files(self, paths: Sequence[Path], record: TrialRecord | None) -> None:
        """Files of a trial, of which its configuration is one, or of the whole."""

    def beat(self) -> bool:
        """Does what is due without news; True if the whole is found to be dirty."""

    def away(self, error: Exception) -> str:
        """What to tell when it does not answer."""

    def lacks(
        self, records: Sequence[TrialRecord], files: Mapping[int | None, Sequence[Path]]
    ) -> str:
        """What to tell at the end of what it has not got; empty if that is nothing to speak of."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Pauses:
    """Seconds.

    Attributes:
        retry: before a sink that is away is tried again, and files that were not taken.
        refused: before numbers that were refused are sent again: a run may have been restored.
        away: that the end of a study waits for a sink that has not answered.
    """

    retry: float = 15.0
    refused: float = 60.0
    away: float = 5.0


@dataclass(eq=False)
class Follower:
    """Keeps sinks up to date in the background; with none, takes note of nothing.

    Attributes:
        sinks: the first ones are waited for first when it is closed.
        say: shows the user a line.
    """

    sinks: Sequence[Sink]
    say: Callable[[str], None]
    pauses: Pauses = Pauses()

    def __post_init__(self) -> None:
        self._known = known = _Known()
        self._changed = known.changed
        self._deliveries = [_Delivery(sink, known, self.say, self.pauses) for sink in self.sinks]

    def start(self) -> None:
        """Starts the sending.

        Raises:
            ServiceError: what a sink needs is not installed.
        """
        for delivery in self._deliveries:
            delivery.sink.load()
        for delivery in self._deliveries:
            delivery.start()

    def meet(self, *, seconds: float) -> None:
        """Waits until each sink has answered for the first time, or not; no longer than this.

        What is wrong with it is told by then, before hours are spent on a training.
        """
        with self._changed:
            self._changed.wait_for(lambda: all(d.has_met for d in self._deliveries), seconds)

    def update(self, record: TrialRecord) -> None:
        """Takes note of a trial; returns at once."""
        with self._changed:
            if record.number not in self._known.records:
                self._mark(_Subject("files", record.number))  # its configuration is one
            self._known.records[record.number] = _copy(record)
            self._mark(_Subject("trial", record.number))

    def update_study(
        self, state: str, metrics: Mapping[str, float], tags: Mapping[str, str] | None = None
    ) -> None:
        """Takes note of the state of the whole, and of what to show on it; returns at once."""
        with self._changed:
            self._known.study = StudyNews(state, dict(metrics), dict(tags or {}))
            self._mark(_Subject("study"))

    def keep_files(self, files: Sequence[Path], record: TrialRecord | None = None) -> None:
        """Takes note of files to be kept with a trial, or with the whole; returns at once.

        Args:
            files: they stay where they are; one that is gone when its turn comes is left out.
            record: of the trial; None for the whole.
        """
        if not files:
            return
        number = None if record is None else record.number
        with self._changed:
            if record is not None:
                self._known.records.setdefault(record.number, _copy(record))
            before = self._known.files.get(number, ())
            self._known.files[number] = tuple(dict.fromkeys([*before, *files]))
            self._mark(_Subject("files", number))

    def close(self, *, seconds: float = 60.0) -> bool:
        """Waits until all is sent, but no longer, nor for a sink that is away; tells what is not.

        Returns:
            Whether all is sent, or a sink has told how to send the rest. It is in the records, and
            goes out with the next resume.
        """
        began = time.monotonic()
        with self._changed:
            self._known.closing = True
            self._changed.notify_all()
        complete = True
        for place, delivery in enumerate(self._deliveries):
            # One takes no more than its share, and those after it have the rest.
            left = max(0.0, began + seconds - time.monotonic())
            complete &= delivery.close(began, seconds=left / (len(self._deliveries) - place))
        return complete

    @property
    def first(self) -> str:
        """What has to come before a resume that sends the rest; empty if it needs nothing."""
        to_mend = any(delivery.has_to_be_mended for delivery in self._deliveries)
        return "once that is mended, " if to_mend else ""

    def _mark(self, subject: _Subject) -> None:
        for delivery in self._deliveries:
            delivery.mark(subject)
        self._changed.notify_all()


class _Subject(NamedTuple):
    """What can be dirty: the greeting before anything is, the study, a trial, files of either."""

    kind: Literal["greeting", "study", "trial", "files"]
    number: int | None = None


class _Known:
    """What all sinks follow; whoever reads or writes it holds `changed`."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.study = StudyNews("running")
        self.records: dict[int | None, TrialRecord] = {}
        self.files: dict[int | None, tuple[Path, ...]] = {}
        self.closing = False


@dataclass(eq=False)
class _Delivery:
    """What one sink has not got yet, and the thread that sends it."""

    sink: Sink
    known: _Known
    say: Callable[[str], None]
    pauses: Pauses

    def __post_init__(self) -> None:
        self.has_met = False
        self._changed = self.known.changed
        self._dirty: dict[_Subject, None] = {_Subject("study"): None}  # in the order of coming
        self._current: _Subject | None = _Subject("greeting")
        self._refused: dict[_Subject, float] = {}  # until when
        self._told: set[object] = set()
        self._away = self._is_shut = self._given_up = False
        self._ended = True
        self._retry_at = 0.0
        self._is_last_try = self._asked_again = False
        self._thread = threading.Thread(target=self._work, name=self.sink.name, daemon=True)

    def start(self) -> None:
        self._ended = False
        self._thread.start()

    def mark(self, subject: _Subject) -> None:
        self._dirty[subject] = None

    @property
    def has_to_be_mended(self) -> bool:
        return bool(self._refused) or self._is_shut

    def close(self, began: float, *, seconds: float) -> bool:
        """Waits, as `Follower.close`; `began` is when that was called."""
        end = time.monotonic() + seconds
        with self._changed:
            # A beat that hangs is not waited for.
            while not self._ended and (self._current or self._dirty):
                until = min(end, began + self.pauses.away) if self._away else end
                if (left := until - time.monotonic()) <= 0:
                    break
                self._changed.wait(left)
            held = self._dirty | ({self._current: None} if self._current else {})
            records = [self.known.records[one.number] for one in held if one.kind == "trial"]
            named = [one.number for one in held if one.kind == "files"]
            files = {number: self.known.files.get(number, ()) for number in named}
        if held and not self._given_up and (line := self.sink.lacks(records, files)):
            self.say(line)
        return not held or self.sink.names_resume

    def _work(self) -> None:
        subject = self._current
        while subject is not None:
            try:
                self.sink.open()
                self._send(subject)
            # Whatever a sink or the network raises must not end the training.
            except Exception as error:
                self._keep(subject, error)
            else:
                with self._changed:
                    self._refused.pop(subject, None)
                    self._is_shut = self._away = False
            subject = self._next()
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def _send(self, subject: _Subject) -> None:
        with self._changed:
            study, record = self.known.study, self.known.records.get(subject.number)
            paths = self.known.files.get(subject.number, ())
        if subject.kind == "study":
            self.sink.send_study(study)
        elif subject.kind == "trial" and record is not None:
            self.sink.send_trial(record)
        elif subject.kind == "files":
            self.sink.send_files(paths, record)

    def _next(self) -> _Subject | None:
        """The next thing to send; None when there is no more to come."""
        with self._changed:
            self._current, self.has_met = None, True
            self._changed.notify_all()
        while True:
            self._beat()
            with self._changed:
                closing = self.known.closing
                paused = not closing and time.monotonic() < self._retry_at
                if self._given_up or (self._away and self._is_last_try):
                    return None
                if not paused and (subject := self._pick()) is not None:
                    del self._dirty[subject]
                    self._current, self._is_last_try = subject, closing
                    return subject
                if closing:
                    return None
                again = [until for one, until in self._refused.items() if one in self._dirty]
                due = self._retry_at if paused else min([self.sink.beat_due, *again])
                self._changed.wait(max(0.0, min(due - time.monotonic(), threading.TIMEOUT_MAX)))

    def _pick(self) -> _Subject | None:
        """Numbers before files, which are large; the end of the whole after that of its trials."""
        now = time.monotonic()
        free = [one for one in self._dirty if self._refused.get(one, 0.0) <= now]
        if not free and self.known.closing and not self._asked_again:
            # What was refused is asked once more at the end, and that is all.
            self._asked_again = True
            self._refused.clear()
            free = list(self._dirty)
        order = {"study": 0 if self.known.study.state == "running" else 2, "trial": 1, "files": 3}
        return min(free, key=lambda one: order[one.kind], default=None)

    def _beat(self) -> None:
        """One that does not arrive is not sent again: there is a next one."""
        due = max(self.sink.beat_due, self._retry_at)
        if self.known.closing or time.monotonic() < due:
            return
        try:
            is_dirty, away = self.sink.beat(), False
        # Whatever a sink or the network raises must not end the training.
        except Exception:
            is_dirty, away = False, True
        with self._changed:
            self._away = away
            if is_dirty:
                self.mark(_Subject("study"))
            self._changed.notify_all()

    def _keep(self, subject: _Subject, error: Exception) -> None:
        """Leaves dirty what was not taken, and tells of it once."""
        now, is_refused = time.monotonic(), isinstance(error, RefusedError)
        with self._changed:
            if subject.kind != "greeting":  # what comes next connects
                self.mark(subject)
            self._is_shut = isinstance(error, ShutError)
            self._given_up = isinstance(error, GivenUpError)
            self._away = not is_refused
            if not is_refused:
                self._retry_at = now + self.pauses.retry
            else:
                is_file = subject.kind == "files"
                pause = self.pauses.retry if is_file else self.pauses.refused
                self._refused[subject] = now + pause
        answered = isinstance(error, SinkError)
        what = subject if is_refused else type(error) if answered else None
        if what not in self._told:
            self._told.add(what)
            self.say(str(error) if answered else self.sink.away(error))


def _copy(record: TrialRecord) -> TrialRecord:
    # The record goes on changing while the sinks read.
    return replace(record, history=list(record.history))
