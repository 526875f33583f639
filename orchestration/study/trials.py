"""The trials of a study: what is settled, what runs, what is next.

The records on disk are the truth. Every change of a trial is one method here, which writes the
record and lets the followers know. A driver that is started again reads the records and goes on
with what is not settled; it makes no difference whether the last one ended, was stopped or was
killed, nor when.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from cpfean.errors import CpfeanError, ServiceError
from cpfean.records.run_folder import RunFolder
from cpfean.records.trial_record import State, TrialRecord
from orchestration.proposals.optuna_study import Proposals
from orchestration.runners.messages import Epoch
from orchestration.study.plan import StudyPlan, TrialPlan, known_records, resume_line

MAX_LOSSES = 3  # of a trial's process, before the trial counts as failed
_SAME_FAILURES = 3
_DUPLICATES = 3  # of one search for a proposal, told one by one; more are counted


class StudyError(CpfeanError):
    """A study in which nothing but failures is to be expected."""

    exit_code = 4


@dataclass(eq=False)
class Trials:
    """The state of every trial.

    Attributes:
        folder: of the study; its records are read once, and written from then on.
        changed: told of each record that has changed.
        waiting: trials that were begun once, and are to be run on.
    """

    plan: StudyPlan
    folder: RunFolder
    changed: Callable[[TrialRecord], None]
    say: Callable[[str], None]
    clock: Callable[[], float]

    def __post_init__(self) -> None:
        self._records = {record.number: record for record in self.folder.records()}
        self.waiting = [record for record in self._records.values() if not record.settled]
        self._since: dict[int, float] = {}  # the running ones, and up to when they are counted
        self._losses: Counter[int] = Counter()
        self._failures: list[tuple[str, str]] = []
        self._is_exhausted = False
        self._results = self.plan.known_results(self.folder)
        self._proposals: Proposals | None = None

    def __getitem__(self, number: int) -> TrialRecord:
        return self._records[number]

    @property
    def records(self) -> tuple[TrialRecord, ...]:
        """All that there are, by number."""
        return tuple(self._records[number] for number in sorted(self._records))

    @property
    def settled(self) -> list[TrialRecord]:
        return [record for record in self._records.values() if record.settled]

    @property
    def running(self) -> list[TrialRecord]:
        return [self._records[number] for number in self._since]

    @property
    def num_open(self) -> int:
        """How many are not settled, those included that are not begun."""
        return self.plan.trials - len(self.settled)

    @property
    def epochs_left(self) -> int:
        """Epochs still to come, if no further trial is stopped early."""
        each = self.plan.base.optim.epochs
        begun = sum(each - r.epochs for r in self._records.values() if not r.settled)
        return begun + each * (self.plan.trials - len(self._records))

    def prepare(self) -> None:
        """Takes over what is known already, and says what was found."""
        if self.plan.space is not None:
            self._proposals = Proposals(
                self.plan.space,
                name=self.folder.first_name,
                seed=self.plan.base.seed,
                baseline=self.plan.space.baseline(self.plan.base),
                trials=self.plan.trials,
            )
            if self._records:
                self.export_search()
        # The driver of these was lost between their last epoch and their end.
        for record in self.waiting:
            if record.complete and (record.test or not self.plan.tests_all):
                self.settle(record.number, "finished")
        self.waiting = [record for record in self.waiting if not record.settled]
        known = known_records(self.plan, self._results, begun=self._records)
        for record in known:
            self._records[record.number] = record
            self._write(record)
        self._failures = [_kind_of_failure(r) for r in self.settled if r.state == "failed"]
        if known:
            self.say(f"{len(known)} of {self.plan.trials} run(s) are known already.")
        if len(self._records) > len(known):
            cut_off = ", ".join(record.name for record in self.waiting) or "none"
            self.say(
                f"resuming {self.plan.name}: {len(self.settled)} settled, cut off: {cut_off}, "
                f"{self.plan.trials - len(self._records)} new."
            )

    def has_next(self) -> bool:
        """Whether there may be one more to run."""
        has_new = len(self._records) < self.plan.trials and not self._is_exhausted
        return has_new or bool(self.waiting)

    def next(self) -> TrialRecord | None:
        """The next one of which `has_next` tells, cut-off ones first; None: no more after all."""
        if self.waiting:
            return self.waiting.pop(0)
        number = next(n for n in range(self.plan.trials) if n not in self._records)
        search = self._proposals
        plan = self.plan.fixed[number] if search is None else self._proposed(search, number)
        if plan is None:
            self._is_exhausted = True
            self.say(f"the search space has no more than {number} different configurations.")
            return None
        record = plan.record(number)
        self._records[number] = record
        self.folder.write(record)
        return record

    def started(self, number: int, *, drift: str) -> None:
        """It is underway, by versions that differ so."""
        record = self._records[number]
        record.drift = drift or record.drift
        record.state = "running"
        self._since[number] = self.clock()
        self._write(record)

    def trained(self, number: int, news: Epoch) -> int:
        """It has come so far; returns how many epochs are new."""
        record = self._records[number]
        known = record.epochs
        record.history = [dict(row) for row in news.history]
        record.checkpoint = news.checkpoint or record.checkpoint
        record.complete = news.ended
        record.test = dict(news.test or record.test)
        self._count_seconds(record)
        self._write(record)
        return record.epochs - known

    def settle(self, number: int, state: State) -> None:
        """It has come to an end, for good unless a failure is asked for again."""
        record = self._records[number]
        self._end(record, state)
        # What two versions have trained is the result of neither.
        if state == "finished" and self._results is not None and not record.drift:
            self._results.keep(record)

    def fail(self, number: int, failure: str, message: str) -> None:
        """It has failed.

        Raises:
            StudyError: so did all before, and alike.
        """
        record = self._records[number]
        record.failure, record.message = failure, message
        self.settle(number, "failed")
        self.say(f"{record.name}: failed ({failure}): {_last_line(message)}")
        self._failures.append(_kind_of_failure(record))
        are_alike = len(set(self._failures)) == 1
        if are_alike and len(self._failures) == len(self.settled) == _SAME_FAILURES:
            raise StudyError(
                f"the first {_SAME_FAILURES} trials failed alike ({failure}), so the rest is not "
                f"tried:\n{message}\nOnce that is mended, continue with:\n"
                f"{resume_line(self.plan, retry_failed=True)}"
            )

    def lost(self, number: int) -> int:
        """Its process is gone, so often: it waits to be run on; 0 if that was once too often."""
        self._losses[number] += 1
        if self._losses[number] > MAX_LOSSES:
            return 0
        self._end(self._records[number], "interrupted")
        self.waiting.append(self._records[number])
        return self._losses[number]

    def cut_off_all(self) -> None:
        """The study ends while they run: they are left as to be run on."""
        for record in self._records.values():
            if record.state == "running":
                self._end(record, "interrupted")

    def export_search(self) -> None:
        """Writes what optuna-dashboard shows, if there is a search; a study can do without."""
        if self._proposals is None:
            return
        try:
            self._proposals.export(self.folder.path / "study.db", self.records)
        except ServiceError as error:
            self.say(f"nothing new for optuna-dashboard: {error}")

    def _end(self, record: TrialRecord, state: State) -> None:
        """It is not underway any more."""
        self._count_seconds(record)
        self._since.pop(record.number, None)
        record.state = state
        self._write(record)

    def _write(self, record: TrialRecord) -> None:
        self.folder.write(record)
        self.changed(record)

    def _count_seconds(self, record: TrialRecord) -> None:
        now = self.clock()
        if record.number in self._since:
            record.seconds += now - self._since[record.number]
            self._since[record.number] = now

    def _proposed(self, search: Proposals, number: int) -> TrialPlan | None:
        before = len(search.duplicates)
        drawn = search.ask(number, self.records)
        repeated = search.duplicates[before:]
        if len(repeated) > _DUPLICATES:
            counted = ", ".join(f"{count} of {name}" for name, count in Counter(repeated).items())
            self.say(f"{len(repeated)} proposals were duplicates ({counted}), not trained again.")
        else:
            for name in repeated:
                self.say(f"a proposal was a duplicate of {name}, not trained again.")
        if drawn is None:
            return None
        config = self.plan.base.with_overrides(drawn)
        return TrialPlan(name=f"trial-{number:03d}", overrides=drawn, config=config)


def _kind_of_failure(record: TrialRecord) -> tuple[str, str]:
    """What failures have in common; steps, rates and norms in the message need not be the same."""
    numbers = r"[-+]?\b(\d[\d.]*(e[-+]?\d+)?|nan|inf)\b"
    return record.failure, re.sub(numbers, "#", _last_line(record.message))


def _last_line(message: str) -> str:
    return (message.strip().splitlines() or [""])[-1]
