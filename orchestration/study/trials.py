"""The trials of a study: what is settled, what runs, what is next.

The records on disk are the truth. Every change of a trial is one method here, which writes the
record and lets the followers know. A driver that is started again reads the records and goes on
with what is not settled; it makes no difference whether the last one ended, was stopped or was
killed, nor when.
"""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Callable, Sequence

from cpfean.errors import CpfeanError, ServiceError
from cpfean.records.results import Results
from cpfean.records.run_folder import RunFolder
from cpfean.records.trial_record import State, TrialRecord
from orchestration.proposals.optuna_study import Proposals
from orchestration.runners.messages import History
from orchestration.study.plan import StudyPlan, TrialPlan, planned_record, resume_line

MAX_LOSSES = 3  # of a trial's process, before the trial counts as failed
_SAME_FAILURES = 3
_DUPLICATES = 3  # of one search for a proposal, told one by one; more are counted


class StudyError(CpfeanError):
    """A study in which nothing but failures is to be expected."""

    exit_code = 4


class Trials:
    """The state of every trial.

    Args:
        folder: of the study; its records are read once, and written from then on.
        changed: told of each record that has changed.
        say: shows the user a line.
        clock: seconds from any origin; never goes back.
    """

    def __init__(
        self,
        plan: StudyPlan,
        folder: RunFolder,
        *,
        changed: Callable[[TrialRecord], None],
        say: Callable[[str], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._plan = plan
        self._folder = folder
        self._changed = changed
        self._say = say
        self._clock = clock
        self._records = {record.number: record for record in folder.records()}
        self._waiting = [record for record in self._records.values() if not record.settled]
        self._since: dict[int, float] = {}  # the running ones, and up to when they are counted
        self._losses: Counter[int] = Counter()
        self._failures: list[tuple[str, str]] = []
        self._is_exhausted = False
        self._results: Results | None = plan.known_results(folder)
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
    def waiting(self) -> Sequence[TrialRecord]:
        """Begun once, and to be run on."""
        return self._waiting

    @property
    def num_open(self) -> int:
        """How many are not settled, those included that are not begun."""
        return self._plan.trials - len(self.settled)

    @property
    def epochs_left(self) -> int:
        """Epochs still to come, if no further trial is stopped early."""
        each = self._plan.base.optim.epochs
        begun = sum(each - r.epochs for r in self._records.values() if not r.settled)
        return begun + each * (self._plan.trials - len(self._records))

    def prepare(self) -> None:
        """Takes over what is known already, and says what was found."""
        if self._plan.space is not None:
            self._proposals = Proposals(
                self._plan.space,
                name=self._folder.first_name,
                seed=self._plan.base.seed,
                baseline=self._plan.space.baseline(self._plan.base),
                trials=self._plan.trials,
            )
            if self._records:
                self.export_search()
        # The driver of these was lost between their last epoch and their end.
        ended = [r for r in self._waiting if r.complete and (r.test or not self._plan.tests_all)]
        for record in ended:
            self.settle(record.number, "finished")
        self._waiting = [record for record in self._waiting if not record.settled]
        reused = self._reuse()
        self._failures = [_kind_of_failure(r) for r in self.settled if r.state == "failed"]
        if reused:
            self._say(f"{reused} of {self._plan.trials} run(s) are known already.")
        if len(self._records) > reused:
            cut_off = ", ".join(record.name for record in self._waiting) or "none"
            self._say(
                f"resuming {self._plan.name}: {len(self.settled)} settled, cut off: {cut_off}, "
                f"{self._plan.trials - len(self._records)} new."
            )

    def has_next(self) -> bool:
        """Whether there may be one more to run."""
        return bool(self._waiting) or (
            len(self._records) < self._plan.trials and not self._is_exhausted
        )

    def next(self) -> TrialRecord | None:
        """The next one to run: one that was cut off first, then a new one; None: no more."""
        if not self.has_next():
            return None
        if self._waiting:
            return self._waiting.pop(0)
        number = next(n for n in range(self._plan.trials) if n not in self._records)
        plan = self._plan.fixed[number] if self._proposals is None else self._proposed(number)
        if plan is None:
            self._is_exhausted = True
            self._say(f"the search space has no more than {number} different configurations.")
            return None
        record = planned_record(number, plan)
        self._records[number] = record
        self._folder.write(record)
        return record

    def started(self, number: int, *, drift: str) -> None:
        """It is underway, by versions that differ so."""
        record = self._records[number]
        record.drift = drift or record.drift
        self._since[number] = self._clock()
        self._set_state(record, "running")

    def trained(
        self,
        number: int,
        history: History,
        checkpoint: str,
        *,
        ended: bool,
        test: dict[str, float] | None = None,
    ) -> int:
        """It has come so far, and to this on the test split if that was shown to it.

        Returns:
            How many epochs are new.
        """
        record = self._records[number]
        known = record.epochs
        record.history = [dict(row) for row in history]
        record.checkpoint = checkpoint or record.checkpoint
        record.complete = ended
        record.test = dict(test or record.test)
        self._count_seconds(record)
        self._write(record)
        return record.epochs - known

    def settle(self, number: int, state: State) -> None:
        """It has come to an end, for good unless a failure is asked for again."""
        record = self._records[number]
        self._count_seconds(record)
        self._since.pop(number, None)
        self._set_state(record, state)
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
        last = message.strip().splitlines()[-1] if message.strip() else ""
        self._say(f"{record.name}: failed ({failure}): {last}")
        self._failures.append(_kind_of_failure(record))
        if (
            len(self._failures) == len(self.settled) == _SAME_FAILURES
            and len(set(self._failures)) == 1
        ):
            raise StudyError(
                f"the first {_SAME_FAILURES} trials failed alike ({failure}), so the rest is not "
                f"tried:\n{message}\nOnce that is mended, continue with:\n"
                f"{resume_line(self._plan, retry_failed=True)}"
            )

    def lost(self, number: int) -> int:
        """Its process is gone: it waits to be run on; returns how often that has happened, or 0 if
        that was once too often.
        """
        self._losses[number] += 1
        if self._losses[number] > MAX_LOSSES:
            return 0
        self._cut_off(self._records[number])
        self._waiting.append(self._records[number])
        return self._losses[number]

    def cut_off_all(self) -> None:
        """The study ends while they run: they are left as to be run on."""
        for record in self._records.values():
            if record.state == "running":
                self._cut_off(record)

    def export_search(self) -> None:
        """Writes what optuna-dashboard shows, if there is a search; a study can do without."""
        if self._proposals is None:
            return
        try:
            self._proposals.export(self._folder.path / "study.db", self.records)
        except ServiceError as error:
            self._say(f"nothing new for optuna-dashboard: {error}")

    def _cut_off(self, record: TrialRecord) -> None:
        self._count_seconds(record)
        self._since.pop(record.number, None)
        self._set_state(record, "interrupted")

    def _set_state(self, record: TrialRecord, state: State) -> None:
        record.state = state
        self._write(record)

    def _write(self, record: TrialRecord) -> None:
        self._folder.write(record)
        self._changed(record)

    def _count_seconds(self, record: TrialRecord) -> None:
        now = self._clock()
        if record.number in self._since:
            record.seconds += now - self._since[record.number]
            self._since[record.number] = now

    def _proposed(self, number: int) -> TrialPlan | None:
        assert self._proposals is not None
        before = len(self._proposals.duplicates)
        drawn = self._proposals.ask(number, self.records)
        for line in _about_duplicates(self._proposals.duplicates[before:]):
            self._say(line)
        if drawn is None:
            return None
        config = self._plan.base.with_overrides(drawn)
        return TrialPlan(name=f"trial-{number:03d}", overrides=drawn, config=config)

    def _reuse(self) -> int:
        """Takes over trials whose runs are known; returns how many."""
        taken = 0
        for number, plan in enumerate(self._plan.fixed):
            if number not in self._records and self._results is not None:
                record = planned_record(number, plan)
                if self._results.fill(record, tested=self._plan.tests_all):
                    self._records[number] = record
                    self._write(record)
                    taken += 1
        return taken


def _about_duplicates(names: Sequence[str]) -> list[str]:
    """What to say of proposals that were repeats of these trials."""
    if len(names) > _DUPLICATES:
        counted = ", ".join(f"{count} of {name}" for name, count in Counter(names).items())
        return [f"{len(names)} proposals were duplicates ({counted}), not trained again."]
    return [f"a proposal was a duplicate of {name}, not trained again." for name in names]


def _kind_of_failure(record: TrialRecord) -> tuple[str, str]:
    """What failures have in common; steps, rates and norms in the message need not be the same."""
    last = (record.message.strip().splitlines() or [""])[-1]
    return record.failure, re.sub(r"[-+]?\b(\d[\d.]*(e[-+]?\d+)?|nan|inf)\b", "#", last)
