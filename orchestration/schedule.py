"""Which suites of ablations are due, and that two rounds never overlap.

A suite is a selection of ablations that runs at the times of a cron expression, in UTC. Each such
time is a slot, and a slot is one round: a Ray job whose id is made of suite and slot. Ray refuses a
second job of the same id, so a slot is run once, however many schedulers look after the suite and
however often they are killed and started. A slot whose predecessor still runs is skipped; of slots
that passed while no scheduler ran, the last is caught up with. A suite whose last rounds all failed
is paused until somebody resumes it.

Schedulers hold no lock: one that is stopped for an hour holds nobody up. What it submits when it
wakes may be late, so a round looks itself whether another one of its suite runs.

    <folder>/schedule.db       APScheduler's: suites and when they are next due
    <folder>/schedule.jsonl    what became of each slot, and why; lines are only added
    <folder>/.SUITE.lock       held by the round that runs
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import re
import shlex
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from cpfean import commands
from cpfean.errors import ConfigError, message_of
from cpfean.files import is_there, open_file, read_file
from cpfean.json_files import LARGEST, aside, checked, of_type
from orchestration.settings import ServiceError

if TYPE_CHECKING:
    from apscheduler.schedulers.base import BaseScheduler
    from apscheduler.triggers.cron import CronTrigger

logger = logging.getLogger("cpfean.schedule")

_NAME = re.compile(r"[a-z0-9][a-z0-9_]{0,39}")
_RETRY = timedelta(seconds=60)
_LOOK = timedelta(seconds=30)  # for suites that were added, and for clocks that were set
_FAILURES = 3  # rounds in a row, then a suite is paused
_WRONG_CLOCK = timedelta(days=1)  # a slot further ahead was noted by a clock that was wrong
_MOST_MISSED = 100  # that are noted after one pause
_LONGEST = timedelta(days=366 * 5)  # between two slots: 29 February
_SLOT = "%Y%m%dT%H%M%SZ"
_ROW = ("time", "suite", "slot", "what", "why")  # of the journal

Ended = Literal["done", "changed", "failed", "stopped"]
_ENDED: tuple[Ended, ...] = ("done", "changed", "failed", "stopped")
_OPEN = ("submitted", "known")
_NOT_RUN = ("skipped", "missed", "paused")


@dataclass(frozen=True, kw_only=True, slots=True)
class Suite:
    """What runs, and when.

    Attributes:
        name: lower-case letters, digits and underscores.
        cron: five fields (minute, hour, day, month, day of the week), or six with seconds first.
        arguments: of `run_ablations.py`.
        added: when, as ISO 8601; earlier slots are not caught up with.
    """

    name: str
    cron: str
    arguments: tuple[str, ...]
    added: str

    def slot(self, now: datetime) -> str | None:
        """The newest slot that is due; None before the first."""
        added = datetime.fromisoformat(self.added)
        slot = last_fire_time(trigger_of(self.cron), now, since=added)
        return None if slot is None else slot.strftime(_SLOT)

    def next(self, now: datetime) -> datetime:
        """When it is due next."""
        return trigger_of(self.cron).get_next_fire_time(None, now)

    def slots_between(self, newest: str, slot: str) -> list[str]:
        """The slots that passed after one that was dealt with ("": none was) and before another."""
        since = datetime.fromisoformat(self.added)
        if newest:
            since = max(since, _time_of(newest))
        times = _fire_times(trigger_of(self.cron), since, _time_of(slot) - timedelta(seconds=1))
        return [time.strftime(_SLOT) for time in deque(times, maxlen=_MOST_MISSED)]

    def round(self, slot: str) -> str:
        """The name of one round: of its Ray job, its folder and its tracking run."""
        return f"{self.name}-{slot}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Standing:
    """What became of a suite's slots lately; rows of the journal, empty if there was none.

    Attributes:
        last: the round that was run or heard of last.
        not_run: the last slot that was not run.
        is_paused: until somebody resumes it.
    """

    last: Mapping[str, str]
    not_run: Mapping[str, str]
    is_paused: bool


def _time_of(slot: str) -> datetime:
    return datetime.strptime(slot, _SLOT).replace(tzinfo=UTC)


def trigger_of(cron: str) -> CronTrigger:
    """The times of a cron expression.

    Raises:
        ConfigError: it is none.
    """
    from apscheduler.triggers.cron import CronTrigger

    fields = cron.split()
    names = ("second", "minute", "hour", "day", "month", "day_of_week")[-len(fields) :]
    try:
        if len(fields) == 5:
            return CronTrigger.from_crontab(cron, timezone=UTC)
        if len(fields) == 6:
            return CronTrigger(timezone=UTC, **dict(zip(names, fields, strict=True)))
    except ValueError as error:
        raise ConfigError(f"--cron {cron!r}: {error}.") from None
    raise ConfigError(
        f"--cron needs five fields (minute hour day month weekday), e.g. '0 2 * * *' for two "
        f"o'clock every night, UTC; got {cron!r}."
    )


def last_fire_time(trigger: CronTrigger, now: datetime, *, since: datetime) -> datetime | None:
    """The newest time of a trigger that is after `since` and not after `now`; None if none is."""
    reach = timedelta(minutes=2)
    while True:
        start = max(since, now - reach)
        last = deque(_fire_times(trigger, start, now), maxlen=1)
        if last:
            return last[0]
        if start == since or reach > _LONGEST:
            return None
        reach *= 4


def _fire_times(trigger: CronTrigger, since: datetime, until: datetime) -> Iterator[datetime]:
    """The times of a trigger after `since` and not after `until`."""
    last, tick = since, timedelta(microseconds=1)
    while (last := trigger.get_next_fire_time(None, last + tick)) and last <= until:
        yield last


class Jobs(Protocol):
    """Where rounds run."""

    def submit(self, job: str, command: str) -> bool:
        """Starts a job; False if there was one of that id before."""

    def running(self, prefix: str) -> Sequence[str]:
        """The jobs that have not ended and whose id starts so."""


class RayJobs:
    """A Ray cluster, reached through its dashboard.

    Args:
        address: http://host:port; on the head 127.0.0.1:8265.

    Raises:
        ServiceError: nobody answers, at any call.
    """

    def __init__(self, address: str) -> None:
        self._address = address

    def submit(self, job: str, command: str) -> bool:
        with self._client() as client:
            try:
                client.submit_job(entrypoint=command, submission_id=job)
            except RuntimeError as error:
                if "already exists" in str(error):
                    return False
                raise
        return True

    def running(self, prefix: str) -> Sequence[str]:
        with self._client() as client:
            return [
                job.submission_id
                for job in client.list_jobs()
                if (job.submission_id or "").startswith(prefix) and not job.status.is_terminal()
            ]

    @contextmanager
    def _client(self) -> Iterator[Any]:
        from ray.job_submission import JobSubmissionClient

        try:
            yield JobSubmissionClient(self._address)
        # Ray raises its own kinds, requests' and plain ones, at any call.
        except Exception as error:
            raise ServiceError(
                f"no Ray cluster takes jobs at {self._address} ({message_of(error)}); start one, "
                "or name its dashboard with --jobs."
            ) from None


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
        self._journal = folder / "schedule.jsonl"
        self._one_by_one = threading.Lock()
        self._told = False

    def add(self, name: str, *, cron: str, arguments: Sequence[str]) -> Suite:
        """Adds a suite.

        Raises:
            ConfigError: a name that cannot be one or is taken, or no cron expression.
        """
        if not _NAME.fullmatch(name):
            raise ConfigError(
                "a suite's name is 1 to 40 lower-case letters, digits and underscores, and starts "
                f"with a letter or digit; got {name[:100]!r}."
            )
        trigger = trigger_of(cron)
        suite = Suite(
            name=name, cron=cron, arguments=tuple(arguments), added=self._now().isoformat()
        )
        with self._store() as scheduler:
            if scheduler.get_job(name) is not None:
                raise ConfigError(
                    f"there is a suite {name!r} already; remove it first: "
                    f"{self._line('remove', name)}"
                )
            scheduler.add_job(
                _fire,
                trigger,
                id=name,
                args=[str(self.folder), asdict(suite)],
                # Of slots that have passed the last is run, however late.
                coalesce=True,
                misfire_grace_time=None,
                max_instances=1,
            )
        self._note(name, "", "added")
        return suite

    def remove(self, name: str) -> None:
        """Removes a suite; a round that runs goes on.

        Raises:
            ConfigError: there is none of that name.
        """
        self._check_known(name)
        with self._store() as scheduler, suppress(LookupError):  # somebody else was faster
            scheduler.remove_job(name)

    def resume(self, name: str) -> None:
        """Forgets the failed rounds of a suite: its next slot is run.

        Raises:
            ConfigError: there is none of that name.
        """
        self._check_known(name)
        self._note(name, "", "resumed")

    def suites(self) -> list[Suite]:
        """All of them, by name."""
        if not is_there(self._file):
            return []
        with self._store() as scheduler:
            return [self._suite(job) for job in sorted(scheduler.get_jobs(), key=_id)]

    def standing(self, name: str) -> Standing:
        """What became of the suite's slots lately."""
        rows = [row for row in self._rows() if row["suite"] == name]
        ran = [row for row in rows if row["what"] in (*_OPEN, *_ENDED)]
        others = [row for row in rows if row["what"] in _NOT_RUN]
        return Standing(
            last=ran[-1] if ran else {},
            not_run=others[-1] if others else {},
            is_paused=bool(rows) and rows[-1]["what"] == "paused",
        )

    def fire(self, suite: Suite, jobs: Jobs, say: Callable[[str], None]) -> bool:
        """Brings a suite up to date: submits its newest slot unless that has been dealt with.

        Returns:
            whether a slot was due.

        Raises:
            ServiceError: no cluster answers, or the journal cannot be written.
        """
        with self._one_by_one:
            slot = suite.slot(self._now())
            newest = self._newest(suite.name)
            if slot is None or slot <= newest:
                return False
            job = suite.round(slot)
            others = [other for other in jobs.running(f"{suite.name}-") if other != job]
            failed = self._failed(suite.name)
            if others:
                what, why = "skipped", f"{others[0]} still runs"
            elif len(failed) >= _FAILURES:
                what = "paused"
                why = (
                    f"the last {_FAILURES} rounds failed, {suite.round(failed[0])} the last of "
                    f"them; when it is mended: {self._line('resume', suite.name)}"
                )
            elif jobs.submit(job, self._command(suite, slot)):
                what, why = "submitted", ""
            else:
                what, why = "known", "another scheduler had submitted it"
            for missed in suite.slots_between(newest, slot):
                self._note(suite.name, missed, "missed", "no scheduler and cluster were there")
            self._note(suite.name, slot, what, why)
            say(f"{job}: {what}{f', {why}' if why else ''}")
            return True

    def fire_all(self, jobs: Jobs, say: Callable[[str], None]) -> None:
        """Brings every suite up to date, once.

        Raises:
            ServiceError: no cluster answers.
        """
        due = [self.fire(suite, jobs, say) for suite in self.suites()]
        if not any(due):
            say("nothing is due.")

    def run(self, jobs: Jobs, say: Callable[[str], None]) -> None:
        """Submits rounds when they are due, until interrupted.

        Raises:
            ServiceError: the store cannot be used.
        """
        from apscheduler.jobstores.memory import MemoryJobStore
        from apscheduler.schedulers.blocking import BlockingScheduler

        scheduler = self._with_store(BlockingScheduler(timezone=UTC))
        scheduler.add_jobstore(MemoryJobStore(), alias="retries")

        def bring_up_to_date(suite: Suite) -> None:
            try:
                self.fire(suite, jobs, say)
            except ServiceError as error:
                say(f"{suite.name}: {error} Trying again in {_RETRY.seconds} s.")
                scheduler.add_job(
                    bring_up_to_date,
                    "date",
                    args=[suite],
                    run_date=datetime.now(UTC) + _RETRY,
                    id=f"retry-{suite.name}",
                    jobstore="retries",
                    replace_existing=True,
                    misfire_grace_time=None,
                )

        _RUNNING[str(self.folder)] = bring_up_to_date
        # APScheduler moves on to the next slot before it has dealt with one: a scheduler that was
        # killed in between has left one behind.
        for suite in self.suites():
            scheduler.add_job(
                bring_up_to_date,
                args=[suite],
                id=f"start-{suite.name}",
                jobstore="retries",
                misfire_grace_time=None,
            )
        # APScheduler sleeps until what it knew to be due: a suite that is added meanwhile, or a
        # clock that is set, would go unnoticed.
        scheduler.add_job(
            _look,
            "interval",
            seconds=_LOOK.seconds,
            jobstore="retries",
            coalesce=True,
            misfire_grace_time=None,
        )
        try:
            scheduler.start()
        finally:
            del _RUNNING[str(self.folder)]

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
                    self._note(suite, slot, "skipped", f"{suite}-{holder} still runs")
                yield False
                return
            file.truncate(0)
            file.write(slot)
            file.flush()
            yield True

    def ended(self, suite: str, slot: str, what: Ended, why: str = "") -> None:
        """Takes note of how a round ended; one that is killed is not heard of again.

        Raises:
            ServiceError: the journal cannot be written.
        """
        self._note(suite, slot, what, why)

    @property
    def _file(self) -> Path:
        return self.folder / "schedule.db"

    def _line(self, *words: str) -> str:
        """What to type to tell this schedule something."""
        return commands.script(self._script.name, *words, "--output", self.folder)

    def _command(self, suite: Suite, slot: str) -> str:
        words = [self._python, self._script, "round", suite.name, slot, "--output", self.folder]
        return shlex.join([*map(str, words), "--", *suite.arguments])

    @contextmanager
    def _store(self) -> Iterator[BaseScheduler]:
        """The stored suites; nothing is run."""
        from apscheduler.schedulers.base import BaseScheduler
        from sqlalchemy.exc import SQLAlchemyError

        class Shelf(BaseScheduler):
            """The others look for what is due when they are shut down, even if they are paused."""

            def wakeup(self) -> None: ...

            def shutdown(self, wait: bool = True) -> None:
                super().shutdown(wait)

        scheduler = self._with_store(Shelf(timezone=UTC))
        try:
            scheduler.start(paused=True)
            yield scheduler
        except SQLAlchemyError as error:
            line = str(getattr(error, "orig", None) or error).splitlines()[0]
            raise ServiceError(
                f"{self._file}: cannot be used as the schedule's database: {line}. It was left as "
                "it is. Where it is damaged, put it aside and add the suites again:\n"
                f"  {commands.move(self._file, aside(self._file))}"
            ) from None
        finally:
            if scheduler.running:
                scheduler.shutdown()

    def _with_store(self, scheduler: Any) -> Any:
        from apscheduler.jobstores.sqlalchemy import SQLAlchemyJobStore
        from sqlalchemy import select
        from sqlalchemy.exc import OperationalError

        file = self._file

        class Store(SQLAlchemyJobStore):
            """A suite that was removed, or a database that is busy, must not end a scheduler.

            Nor is a suite of another release thrown away because it cannot be understood.
            """

            def _get_jobs(self, *conditions: Any) -> Any:
                with self.engine.begin() as connection:
                    rows = connection.execute(select(self.jobs_t.c.id, self.jobs_t.c.job_state))
                    for row in rows.all():
                        try:
                            self._reconstitute_job(row.job_state)
                        except Exception as error:  # whatever unpickling raises
                            raise ServiceError(
                                f"{file}: the suite {row.id!r} is damaged, or of another release: "
                                f"{(str(error) or type(error).__name__).splitlines()[0]}. It was "
                                "left as it is; go on with that release, or put the file aside:\n"
                                f"  {commands.move(file, aside(file))}"
                            ) from None
                return super()._get_jobs(*conditions)

            def update_job(self, job: Any) -> None:
                with suppress(LookupError, OperationalError):
                    super().update_job(job)

        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            # What is stored is unpickled: nobody else may write to it.
            if not is_there(self._file):
                os.close(os.open(self._file, os.O_CREAT | os.O_RDWR, 0o600))
            if self._file.stat().st_uid != os.geteuid() or self._file.stat().st_mode & 0o022:
                raise ServiceError(
                    f"{self._file}: others may write to it; own it, and "
                    f"{commands.for_owner_alone(self._file)}"
                )
            open_file(self._file).close()
        except OSError as error:
            raise ServiceError(f"{self._file}: cannot be written: {error}") from None
        store = Store(
            url=f"sqlite:///{self._file}", engine_options={"connect_args": {"timeout": 30}}
        )
        scheduler.add_jobstore(store)
        return scheduler

    def _suite(self, job: Any) -> Suite:
        """The suite of a stored job.

        Raises:
            ServiceError: it is none of this release.
        """
        try:
            _, given = job.args
            # As JSON would have it, in which a tuple is a list.
            if isinstance(given["arguments"], tuple):
                given = given | {"arguments": list(given["arguments"])}
            suite = Suite(**checked(given, Suite))
            trigger_of(suite.cron)
            datetime.fromisoformat(suite.added)
        except (ConfigError, TypeError, ValueError, KeyError) as error:
            raise ServiceError(
                f"{self._file}: the suite {_id(job)!r} is damaged, or of another release: {error}. "
                "It was left as it is; take it out, and add it again: "
                f"{self._line('remove', _id(job))}"
            ) from None
        return suite

    def _check_known(self, name: str) -> None:
        known: list[str] = []
        if is_there(self._file):
            with self._store() as scheduler:
                known = sorted(map(_id, scheduler.get_jobs()))
        if name not in known:
            raise ConfigError(f"no suite {name!r}; there are: {', '.join(known) or 'none'}.")

    def _note(self, suite: str, slot: str, what: str, why: str = "") -> None:
        row = {
            "time": self._now().isoformat(timespec="seconds"),
            "suite": suite,
            "slot": slot,
            "what": what,
            "why": why,
        }
        try:
            with self._journal.open("ab+") as file:
                # A line that a power cut left unfinished must not spoil this one.
                size = file.seek(0, os.SEEK_END)
                file.seek(max(0, size - 1))
                start = b"\n" if file.read(1) not in (b"", b"\n") else b""
                # One write to the end of the file: lines of two schedulers do not mix.
                file.write(start + json.dumps(row).encode() + b"\n")
        except OSError as error:
            raise ServiceError(f"{self._journal}: cannot be written: {error}") from None

    def _rows(self) -> list[dict[str, str]]:
        if not is_there(self._journal):
            return []
        try:
            text = read_file(self._journal, limit=LARGEST).decode("utf-8", errors="replace")
        except OSError as error:
            raise ServiceError(
                f"{self._journal}: cannot be read: {error.strerror}. It was left as it is; without "
                "it what has been run is not known, and Ray refuses what it still knows."
            ) from None
        rows, unknown = [], 0
        for line in text.split("\n"):
            if line.strip():
                try:
                    row = json.loads(line)
                    rows.append({name: of_type(row[name], str, path=name) for name in _ROW})
                # Cut off by a power cut, damaged, or of a release that writes others.
                except (ValueError, RecursionError, KeyError, TypeError, ConfigError):
                    unknown += 1
        if unknown and not self._told:
            self._told = True
            logger.warning("%s: %d line(s) are damaged and left out.", self._journal, unknown)
        return rows

    def _newest(self, suite: str) -> str:
        """The newest slot that was dealt with; "" before the first.

        Older ones count as dealt with too: a clock that is set back brings none of them back.
        """
        limit = (self._now() + _WRONG_CLOCK).strftime(_SLOT)
        slots = [row["slot"] for row in self._rows() if row["suite"] == suite]
        return max((slot for slot in slots if slot <= limit), default="")

    def _failed(self, suite: str) -> list[str]:
        """The slots of the newest rounds, as far back as all failed; newest first.

        Asked while none runs: a round that was submitted and did not say how it ended was killed.
        """
        became: dict[str, set[str]] = {}
        for row in self._rows():
            if row["suite"] == suite:
                if row["what"] in ("added", "resumed"):
                    became.clear()
                else:
                    became.setdefault(row["slot"], set()).add(row["what"])
        failed = []
        for slot in sorted(became, reverse=True):
            if became[slot] & {"done", "changed"}:
                break
            # One that was stopped by hand, or not run after all, says nothing.
            if became[slot] & {"failed", *_OPEN} and not became[slot] & {"stopped", "skipped"}:
                failed.append(slot)
        return failed


# Functions of running schedulers, by folder: what APScheduler stores has to be found by name.
_RUNNING: dict[str, Callable[[Suite], None]] = {}


def _fire(folder: str, suite: dict[str, Any]) -> None:
    _RUNNING[folder](Suite(**suite))


def _look() -> None: ...


def _id(job: Any) -> str:
    return str(job.id)
