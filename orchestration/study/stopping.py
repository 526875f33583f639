"""Stopping a study: who asks for it, how the work is told, and how long each part of it may take.

A study stops because the user or the system says so, by a signal, or because an error of its driver
makes further work senseless. Everybody who has to know asks one object, `Stop`.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from cpfean.errors import CpfeanError
from cpfean.writing import cannot_write, is_disk_error


@dataclass(frozen=True, kw_only=True, slots=True)
class Deadlines:
    """Seconds from the moment that a study is told to stop by a signal.

    Attributes:
        saved: trials have saved where they are.
        ended: whatever trains them has ended; else the process is ended from another thread.
        closed: records are copied and tracked; what is not by then is so at the next resume.
        unhurried: the same of a study that nobody stops, from its end.
    """

    saved: float = 4.0
    ended: float = 7.0
    closed: float = 9.0
    unhurried: float = 60.0


class Interrupted(BaseException):
    """The user or the system asked us to stop; everything is recorded for a resume."""

    def __init__(self, signal_number: int) -> None:
        super().__init__(signal_number)
        self.exit_code = 128 + signal_number


@dataclass(eq=False)
class Stop:
    """Why a study is to stop, and the way to those who have to hear of it.

    Work that can be interrupted in good order listens to SIGUSR1, as Tune does.

    Attributes:
        say: shows the user a line.
        end_process: ends it at once, with an exit code.
        signal: number of the one that came; 0 if none did.
        error: that makes further work senseless; the first one counts.
        left: called by `leave`, in whatever thread it is called: writes what is to be written and
            ends the process.
    """

    say: Callable[[str], None]
    deadlines: Deadlines = Deadlines()
    end_process: Callable[[int], None] = os._exit
    signal: int = 0
    error: CpfeanError | None = None
    left: Callable[[], None] = lambda: None

    def __post_init__(self) -> None:
        self._told = 0.0
        self._save: Callable[[float], bool] | None = None

    @property
    def is_asked(self) -> bool:
        """Whether nothing more is to be begun."""
        return self.signal != 0 or self.error is not None

    @property
    def seconds_to_close(self) -> float:
        """What is left of the time that a study has to close."""
        if not self.signal:
            return self.deadlines.unhurried
        return max(0.0, self._told + self.deadlines.closed - time.monotonic())

    @property
    def exit_code(self) -> int:
        """Of a process that is ended from another thread."""
        return 128 + self.signal if self.error is None else self.error.exit_code

    def check(self) -> None:
        """Raises what the study is to end with, if it is to end."""
        if self.error is not None:
            raise self.error
        if self.signal:
            raise Interrupted(self.signal)

    @contextmanager
    def listening(self) -> Iterator[None]:
        """SIGINT and SIGTERM stop the study; the second one ends the process at once."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"
        numbers = (signal.SIGINT, signal.SIGTERM)
        before = {number: signal.signal(number, self._hear) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextmanager
    def at_work(self, save: Callable[[float], bool]) -> Iterator[None]:
        """While work is done that can be stopped in good order.

        Args:
            save: called in another thread after a signal: lets the work save where it is, and waits
                for that so many seconds at most; returns whether the work ends by itself.
        """
        self._save = save
        try:
            yield
        finally:
            self._save = None
            if threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # one may be on its way

    def fail(self, error: CpfeanError) -> None:
        """Stops the study because of an error, if it is the first one."""
        if self.error is None:
            self.error = error
            _interrupt_work()

    @contextmanager
    def errors_of(self, folder: Path) -> Iterator[None]:
        """Stops the study by errors of ours, or of its folder's disk, before a library hides them.

        Tune makes texts of what its callbacks raise, and an error of a disk may name no file.
        """
        try:
            yield
        except CpfeanError as error:
            self.fail(error)
        except Exception as error:
            if not is_disk_error(error):
                raise
            self.fail(cannot_write(folder, error))

    def leave(self, error: CpfeanError | None = None) -> None:
        """Ends the process from another thread, as the main thread hangs in somebody's code."""
        self.error = self.error or error
        self.left()

    def _hear(self, number: int, _frame: object) -> None:
        if self.signal:
            self.end_process(128 + number)
        self.signal, self._told = number, time.monotonic()
        with suppress(RuntimeError):  # it may have come in the middle of another line
            self.say("stopping ... (once more to stop at once)")
        if self._save is None or not _work_listens():
            raise Interrupted(number)
        # The main thread goes on, as it may be what passes news while trials are saved.
        leaving = threading.Timer(self.deadlines.ended, self._leave_if_at_work, (self._save,))
        saving = threading.Thread(target=self._save_and_interrupt, args=(self._save,))
        for thread in (leaving, saving):
            thread.daemon = True
            thread.start()

    def _save_and_interrupt(self, save: Callable[[float], bool]) -> None:
        ends_by_itself = False
        try:
            ends_by_itself = save(self.deadlines.saved)
        finally:
            if not ends_by_itself and self._save is save:
                _interrupt_work()

    def _leave_if_at_work(self, save: Callable[[float], bool]) -> None:
        if self._save is save:
            self.leave()


def _work_listens() -> bool:
    return signal.getsignal(signal.SIGUSR1) not in (signal.SIG_DFL, signal.SIG_IGN, None)


def _interrupt_work() -> None:
    """Lets Tune stop in good order; an exception out of a callback would leave trials behind."""
    if _work_listens():
        os.kill(os.getpid(), signal.SIGUSR1)
