"""Which suites of ablations are due, and that two rounds never overlap.

A suite is a selection of ablations that runs at the times of a cron expression, in UTC. Each such
time is a slot, and a slot is one round: a Ray job whose id is made of suite and slot. Ray refuses a
second job of the same id, so a slot is run once, however many schedulers look after the suite and
however often they are killed and started. A slot whose predecessor still runs is skipped; of slots
that passed while no scheduler ran, the last is caught up with.

    <folder>/schedule.db       APScheduler's: suites and when they are next due
    <folder>/schedule.jsonl    one line for each slot: submitted, already there, or skipped, and why
"""

from __future__ import annotations

import json
import os
import re
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from cpfean.errors import ConfigError
from orchestration.settings import ServiceError

if TYPE_CHECKING:
    from apscheduler.schedulers.base import BaseScheduler
    from apscheduler.triggers.cron import CronTrigger

_NAME = re.compile(r"[a-z0-9][a-z0-9_]{0,39}")
_RETRY = timedelta(seconds=60)
_LONGEST = timedelta(days=366 * 5)  # between two slots: 29 February
_SLOT = "%Y%m%dT%H%M%SZ"


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

    def round(self, slot: str) -> str:
        """The name of one round: of its Ray job, its folder and its tracking run."""
        return f"{self.name}-{slot}"


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
        last, following = None, trigger.get_next_fire_time(None, start)
        while following is not None and following <= now:
            last = following
            following = trigger.get_next_fire_time(last, last + timedelta(microseconds=1))
        if last is not None and last > since:
            return last
        if start == since or reach > _LONGEST:
            return None
        reach *= 4


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
        client = self._client()
        try:
            client.submit_job(entrypoint=command, submission_id=job)
        except RuntimeError as error:
            if "already exists" in str(error):
                return False
            raise ServiceError(f"{self._address} refuses job {job}: {error}") from None
        return True

    def running(self, prefix: str) -> Sequence[str]:
        return [
            job.submission_id
            for job in self._client().list_jobs()
            if (job.submission_id or "").startswith(prefix) and not job.status.is_terminal()
        ]

    def _client(self) -> Any:
        from ray.job_submission import JobSubmissionClient

        try:
            return JobSubmissionClient(self._address)
        # Ray raises its own kinds, requests' and plain ones.
        except Exception as error:
            line = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ServiceError(
                f"no Ray cluster takes jobs at {self._address} ({line}); start one, or name its "
                "dashboard with --jobs."
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
                raise ConfigError(f"there is a suite {name!r} already; remove it first.")
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
        return suite

    def remove(self, name: str) -> None:
        """Removes a suite; a round that runs goes on.

        Raises:
            ConfigError: there is none of that name.
        """
        with self._store() as scheduler:
            if scheduler.get_job(name) is None:
                known = ", ".join(job.id for job in scheduler.get_jobs()) or "none"
                raise ConfigError(f"no suite {name!r}; there are: {known}.")
            scheduler.remove_job(name)

    def suites(self) -> list[Suite]:
        """All of them, by name."""
        if not self._file.exists():
            return []
        with self._store() as scheduler:
            return [Suite(**job.args[1]) for job in sorted(scheduler.get_jobs(), key=_id)]

    def last(self, name: str) -> Mapping[str, str]:
        """What became of the suite's newest slot; empty if it has had none."""
        return next((row for row in reversed(self._rows()) if row["suite"] == name), {})

    def fire(self, suite: Suite, jobs: Jobs, say: Callable[[str], None]) -> bool:
        """Brings a suite up to date: submits its newest slot unless that has been dealt with.

        Returns:
            whether a slot was due.

        Raises:
            ServiceError: no cluster answers.
        """
        slot = suite.slot(self._now())
        if slot is None or self._is_dealt_with(suite.name, slot):
            return False
        job = suite.round(slot)
        others = [other for other in jobs.running(f"{suite.name}-") if other != job]
        if others:
            self._note(suite.name, slot, "skipped", f"{others[0]} still runs")
            say(f"{job}: skipped, {others[0]} still runs")
        elif jobs.submit(job, self._command(suite, slot)):
            self._note(suite.name, slot, "submitted", "")
            say(f"{job}: submitted")
        else:
            self._note(suite.name, slot, "known", "another scheduler had submitted it")
            say(f"{job}: the cluster has it already")
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
        """Submits rounds when they are due, until interrupted."""
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
                bring_up_to_date, args=[suite], id=f"start-{suite.name}", jobstore="retries"
            )
        try:
            scheduler.start()
        finally:
            del _RUNNING[str(self.folder)]

    @property
    def _file(self) -> Path:
        return self.folder / "schedule.db"

    def _command(self, suite: Suite, slot: str) -> str:
        words = [self._python, self._script, "round", suite.name, slot, "--output", self.folder]
        return shlex.join([*map(str, words), "--", *suite.arguments])

    @contextmanager
    def _store(self) -> Iterator[BaseScheduler]:
        """The stored suites; nothing is run."""
        from apscheduler.schedulers.base import BaseScheduler

        class Shelf(BaseScheduler):
            """The others look for what is due when they are shut down, even if they are paused."""

            def wakeup(self) -> None: ...

            def shutdown(self, wait: bool = True) -> None:
                super().shutdown(wait)

        scheduler = self._with_store(Shelf(timezone=UTC))
        scheduler.start(paused=True)
        try:
            yield scheduler
        finally:
            scheduler.shutdown()

    def _with_store(self, scheduler: Any) -> Any:
        from apscheduler.jobstores.sqlalchemy import SQLAlchemyJobStore

        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            # What is stored is unpickled: nobody else may write to it.
            os.close(os.open(self._file, os.O_CREAT | os.O_RDWR, 0o600))
            if self._file.stat().st_uid != os.geteuid() or self._file.stat().st_mode & 0o022:
                raise ServiceError(f"{self._file}: others may write to it; chmod 600 and own it.")
        except OSError as error:
            raise ServiceError(f"{self._file}: cannot be written: {error}") from None
        store = SQLAlchemyJobStore(
            url=f"sqlite:///{self._file}", engine_options={"connect_args": {"timeout": 30}}
        )
        scheduler.add_jobstore(store)
        return scheduler

    def _note(self, suite: str, slot: str, what: str, why: str) -> None:
        row = {
            "time": self._now().isoformat(timespec="seconds"),
            "suite": suite,
            "slot": slot,
            "what": what,
            "why": why,
        }
        # One write to the end of the file: lines of two schedulers do not mix.
        with self._journal.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def _rows(self) -> list[dict[str, str]]:
        if not self._journal.exists():
            return []
        rows = []
        for line in self._journal.read_text(encoding="utf-8").splitlines():
            try:
                rows.append(json.loads(line))
            except ValueError:
                continue  # cut off by a power cut
        return rows

    def _is_dealt_with(self, suite: str, slot: str) -> bool:
        return any(row["suite"] == suite and row["slot"] == slot for row in self._rows())


# Functions of running schedulers, by folder: what APScheduler stores has to be found by name.
_RUNNING: dict[str, Callable[[Suite], None]] = {}


def _fire(folder: str, suite: dict[str, Any]) -> None:
    _RUNNING[folder](Suite(**suite))


def _id(job: Any) -> str:
    return str(job.id)
