"""Rounds: each slot of each suite is submitted once, and only one round of a suite runs."""

from __future__ import annotations

import fcntl
import shlex
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import NoReturn

from cpfean import commands
from cpfean.errors import ConfigError, ServiceError
from cpfean.json_files import RecordError
from orchestration.schedule.jobs import Jobs
from orchestration.schedule.journal import Journal, Row, Standing
from orchestration.schedule.suites import Suite, edited_suites, read_suites

_RETRY = timedelta(seconds=60)
_LOOK = timedelta(seconds=30)  # for suites that were added, and for clocks that were set
_FAILURES = 3  # rounds in a row, then a suite is paused


class Schedule:
    """The suites of one folder.

    Args:
        folder: that rounds write their records to as well.
        script: absolute path of the script whose `round` command runs one.
        python: that runs it.
        now: the time in UTC.
    """

    def __init__(
        self,
        folder: Path,
        *,
        script: Path,
        python: str,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self.folder = folder
        self._script = script
        self._python = python
        self._now = now
        self._journal = Journal(folder / "schedule.jsonl")

    def add(self, name: str, *, cron: str, arguments: Sequence[str]) -> Suite:
        """Adds a suite.

        Raises:
            ConfigError: a name that cannot be one or is taken, or no cron expression that is ever
                due.
        """
        now = self._now()
        suite = Suite(name=name, cron=cron, arguments=tuple(arguments), added=now.isoformat())
        if suite.next(now) is None:
            raise ConfigError(f"--cron {cron!r} is never due.")
        with edited_suites(self.folder) as suites:
            if name in suites:
                raise ConfigError(
                    f"there is a suite {name!r} already; remove it first: "
                    f"{self._line('remove', name)}"
                )
            suites[name] = suite
        self.note(name, "", "added")
        return suite

    def remove(self, name: str) -> None:
        """Removes a suite, a round that runs goes on; raises ConfigError if there is none."""
        with edited_suites(self.folder) as suites:
            _check_known(name, suites)
            del suites[name]

    def resume(self, name: str) -> None:
        """Forgets a suite's failed rounds: its next slot is run; raises as `remove` does."""
        _check_known(name, read_suites(self.folder))
        self.note(name, "", "resumed")

    def suites(self) -> list[Suite]:
        """All of them, by name."""
        suites = read_suites(self.folder)
        return [suites[name] for name in sorted(suites)]

    def standing(self, name: str) -> Standing:
        """What became of the suite's slots; raises ServiceError if that cannot be read."""
        return self._journal.standing(name)

    def tick(self, jobs: Jobs, say: Callable[[str], None]) -> bool:
        """Brings every suite up to date, once; whether a slot was due.

        Raises:
            RecordError: the file of the suites is damaged.
            ServiceError: no cluster answers, or the journal cannot be read or written; once the
                other suites are up to date.
        """
        due, errors = False, []
        for suite in self.suites():
            try:
                due |= self._fire(suite, jobs, say)
            except ServiceError as error:
                errors.append(error)
        if errors:
            raise errors[0]
        return due

    def _fire(self, suite: Suite, jobs: Jobs, say: Callable[[str], None]) -> bool:
        """Submits a suite's newest slot unless that has been dealt with; whether one was due."""
        now = self._now()
        due = suite.due(self.standing(suite.name).newest_slot(now), now)
        if not due:
            return False
        *missed, slot = due
        job = f"{suite.name}-{slot}"
        others = [other for other in jobs.running(f"{suite.name}-") if other != job]
        # Read once more: a round that has just ended has noted how.
        failed = self.standing(suite.name).failed_slots()
        words = [self._python, self._script, "round", suite.name, slot, "--output", self.folder]
        if others:
            what, why = "skipped", f"{others[0]} still runs"
        elif len(failed) >= _FAILURES:
            what = "paused"
            why = (
                f"the last {_FAILURES} rounds failed, {suite.name}-{failed[0]} the last of "
                f"them; when it is mended: {self._line('resume', suite.name)}"
            )
        elif jobs.submit(job, shlex.join([*map(str, words), "--", *suite.arguments])):
            what, why = "submitted", ""
        else:
            what, why = "known", "another scheduler had submitted it"
        for other in missed:
            self.note(suite.name, other, "missed", "no scheduler and cluster were there")
        self.note(suite.name, slot, what, why)
        say(f"{job}: {what}{f', {why}' if why else ''}")
        return True

    def run(
        self,
        jobs: Jobs,
        say: Callable[[str], None],
        *,
        wait: Callable[[float], None] = time.sleep,
    ) -> NoReturn:
        """Ticks when a suite is due, and every 30 s, until something is raised, as by Ctrl-C."""
        while True:
            try:
                # Asked before the tick: what becomes due during it is not waited with.
                due = self._next_due()
                self.tick(jobs, say)
                pause = min(_LOOK, due - self._now())
            except (RecordError, ServiceError) as error:
                pause = _RETRY
                say(str(error))
                say(f"trying again in {pause.seconds} s.")
            wait(max(0.0, pause.total_seconds()))

    @contextmanager
    def only_round(self, suite: str, slot: str, say: Callable[[str], None]) -> Iterator[bool]:
        """Whether this process may run the round, as no other of the suite runs; notes if not.

        The system lets go of the lock when the process that runs a round dies.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / f".{suite}.lock").open("a+", encoding="utf-8") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                holder = file.read()
                say(f"{suite}-{slot}: not run, {suite}-{holder} still runs")
                if holder != slot:
                    self.note(suite, slot, "skipped", f"{suite}-{holder} still runs")
                yield False
                return
            file.truncate(0)
            file.write(slot)
            file.flush()
            yield True

    def note(self, suite: str, slot: str, what: str, why: str = "") -> None:
        """Adds a line to the journal; raises ServiceError if it cannot be written."""
        time = self._now().isoformat(timespec="seconds")
        self._journal.add(Row(time, suite, slot, what, why))

    def _next_due(self) -> datetime:
        """When the next suite is due; later than anybody waits if none is."""
        now = self._now()
        times = [time for suite in self.suites() if (time := suite.next(now)) is not None]
        return min(times, default=now + _RETRY)

    def _line(self, *words: str) -> str:
        """What to type to tell this schedule something."""
        return commands.script(self._script.name, *words, "--output", self.folder)


def _check_known(name: str, suites: dict[str, Suite]) -> None:
    if name not in suites:
        raise ConfigError(f"no suite {name!r}; there are: {', '.join(sorted(suites)) or 'none'}.")
