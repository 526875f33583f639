"""Trainings in this very process, one after another: no Ray, the same records and tracking."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from cpfean.errors import CpfeanError, StoppedError
from orchestration.cluster.version_drift import since_start
from orchestration.runners.worker import metrics_of, test_metrics, this_device
from orchestration.settings import Settings
from orchestration.storage.checkpoints import CheckpointFolder
from orchestration.study.budget import OTHER
from orchestration.study.conclusion import StudyResult, conclude, keep_model
from orchestration.study.failures import known_failure
from orchestration.study.follower import Follower
from orchestration.study.plan import (
    StudyPlan,
    check_room_for_checkpoints,
    meter_of,
    planned_record,
    resume_line,
)
from orchestration.study.records import RunFolder, State, TrialRecord
from orchestration.study.sinks import follower_of
from orchestration.study.stopping import (
    SAVE_SECONDS,
    Interrupted,
    seconds_to_stop,
    stopped_by_signals,
)
from orchestration.study.study import follow_places, opened_folder, reopen_failed

if TYPE_CHECKING:
    from cpfean.training.checkpoint import Checkpoint
    from cpfean.training.loop import EpochReport

_MEET_SECONDS = 5.0  # for the tracker's first answer; what is wrong with it is told by then


def run_here(
    plan: StudyPlan, settings: Settings, *, resume: bool, say: Callable[[str], None]
) -> StudyResult:
    """Trains the configurations of a plan, or trains them on from their newest checkpoints.

    Of several, one that fails is recorded and the next one follows.

    Raises:
        ConfigError: the folder exists, or does not, or was made for another plan, or by other
            versions.
        ServiceError: the checkpoints do not fit where they go.
        CpfeanError: what `fit` raises, if there is only one configuration.
        Interrupted: after SIGINT or SIGTERM, once everything is written.
    """
    check_room_for_checkpoints(plan, settings)
    plan.budget.check_prices([OTHER])
    folder = opened_folder(plan, settings, resume=resume)
    stop = _Stop()
    with folder.lock(), stopped_by_signals(stop.tell, say):
        follow_places(plan, folder, say)
        drift = since_start(folder, allowed=plan.allow_drift)
        reopen_failed(plan, folder, say)
        tracker = follower_of(plan, settings, folder, say=say, needs_mlflow=False)
        tracker.start()
        tracker.meet(seconds=_MEET_SECONDS)
        return _Here(plan, settings, folder, tracker, say, stop=stop, drift=drift).run()


class _Stop:
    """A signal, which a training hears of before its next step, so that it can save."""

    def __init__(self) -> None:
        self.signal = 0
        self.told = 0.0
        self._checkpoints: CheckpointFolder | None = None
        self._timer: threading.Timer | None = None

    def tell(self, number: int) -> None:
        """Ends the work of this process: where it is, or once the training has saved.

        Raises:
            Interrupted: nothing is being trained.
        """
        self.signal = number
        self.told = time.monotonic()
        if self._checkpoints is None:
            raise Interrupted(number)
        # It may be long before there is a next step: after this time it ends where it is.
        signal.signal(signal.SIGUSR1, self._end)
        self._timer = threading.Timer(SAVE_SECONDS, os.kill, (os.getpid(), signal.SIGUSR1))
        self._timer.daemon = True
        self._timer.start()

    def _end(self, _number: int, _frame: object) -> None:
        if self._checkpoints is not None:
            raise Interrupted(self.signal)

    @contextmanager
    def heard(self, checkpoints: CheckpointFolder) -> Iterator[None]:
        """A training that asks for notice, and where it saves."""
        self._checkpoints = checkpoints
        try:
            yield
            if self.signal:  # since the last step of all
                raise Interrupted(self.signal)
        except StoppedError:
            raise Interrupted(self.signal) from None
        finally:
            self._checkpoints = None
            if self._timer is not None:
                self._timer.cancel()

    def given(self) -> bool:
        return self.signal != 0

    def save(self, checkpoint: Checkpoint | None) -> None:
        assert self._checkpoints is not None
        if checkpoint is not None:
            self._checkpoints.save(checkpoint)


class _Here:
    """The study while it runs."""

    def __init__(
        self,
        plan: StudyPlan,
        settings: Settings,
        folder: RunFolder,
        tracker: Follower,
        say: Callable[[str], None],
        *,
        stop: _Stop,
        drift: str,
    ) -> None:
        self._stop = stop
        self._plan = plan
        self._settings = settings
        self._folder = folder
        self._tracker = tracker
        self._say = say
        self._drift = drift
        self._results = plan.known_results(folder)
        self._meter = meter_of(plan, folder)
        prices = plan.budget.prices
        if prices is not None and not prices.unknown([OTHER]):
            self._meter.look(prices.hourly([OTHER]))
        self._used_up = ""
        known = {record.number: record for record in folder.records()}
        self._records = [
            known.get(number) or planned_record(number, trial)
            for number, trial in enumerate(plan.fixed)
        ]

    def run(self) -> StudyResult:
        outcome: State = "failed"
        self._tracker.update_study("running", {})
        try:
            for record in self._records:
                self._bring_to_end(record)
            result = self._conclude()
            outcome = "finished"
            return result
        except (Interrupted, KeyboardInterrupt):
            outcome = "interrupted"
            self._say(f"Stopped; continue with:\n{resume_line(self._plan)}")
            raise
        finally:
            self._count()
            tags = {"cpfean.used_up": self._used_up or "no"}
            if self._drift:
                tags["cpfean.drift"] = self._drift
            self._tracker.update_study(outcome, self._meter.metrics(), tags)
            seconds = seconds_to_stop(self._stop.told) if outcome == "interrupted" else 60.0
            if not self._tracker.close(seconds=seconds):
                self._say(
                    f"tracking: not everything is sent; {self._tracker.first}the rest is sent by:\n"
                    f"{resume_line(self._plan)}"
                )

    def _bring_to_end(self, record: TrialRecord) -> None:
        tests = self._plan.tested == "all"
        if not record.settled and self._results is not None:
            self._results.fill(record, tested=tests)
        # A training that failed is asked for again; in a study a failure is for good.
        if record.state == "finished" or (record.settled and self._plan.kind != "train"):
            self._write(record)
            return
        if self._is_used_up():
            return
        if len(self._records) > 1:
            self._say(f"{record.name}: run {record.number + 1} of {len(self._records)}")
        try:
            self._train(record)
            if tests:
                self._test(record, self._folder.path / "models" / f"{record.number:03d}")
            record.state = "finished"
        except (Interrupted, KeyboardInterrupt):
            record.state = "interrupted"
            raise
        # The record has to tell of any failure, whoever raises what.
        except Exception as error:
            failure, message = known_failure([error]) or ("bug", f"{type(error).__name__}: {error}")
            record.state, record.failure, record.message = "failed", failure, message
            if len(self._records) == 1 or not isinstance(error, CpfeanError):
                raise
            self._say(f"{record.name}: failed: {error}")
        finally:
            self._write(record)
        # What two versions have trained is the result of neither.
        if record.state == "finished" and self._results is not None and not record.drift:
            self._results.keep(record)

    def _train(self, record: TrialRecord) -> None:
        from cpfean.training.checkpoint import check_same_run
        from cpfean.training.loop import fit

        record.state, record.failure, record.message = "running", "", ""
        record.drift = self._drift or record.drift
        self._write(record)
        if record.complete:
            return
        name = "checkpoints" if self._plan.kind == "train" else f"train/{record.number:03d}"
        checkpoints = CheckpointFolder(str(self._folder.path / name))
        newest = checkpoints.newest_valid(
            fits=lambda state: check_same_run(state, record.experiment, self._plan.data_fingerprint)
        )
        if newest is not None:
            self._say(f"resuming from {checkpoints.at(newest)}")
        with self._stop.heard(checkpoints):
            fit(
                record.experiment,
                data_folder=self._plan.data_folder,
                cache_dir=self._settings.cache_dir,
                reporter=_LocalReporter(record, self._write_and_count, checkpoints, self._say),
                resume_from=None if newest is None else Path(checkpoints.at(newest)),
                device=this_device(),
                notice=self._stop,
            )

    def _test(self, record: TrialRecord, keep: Path) -> None:
        if record.test:
            return
        self._say("testing the best epoch ...")
        keep.parent.mkdir(parents=True, exist_ok=True)
        record.test = test_metrics(
            keep_model(record, keep),
            record.experiment,
            data_folder=self._plan.data_folder,
            cache_dir=self._settings.cache_dir,
            device=this_device(),
        )

    def _conclude(self) -> StudyResult:
        def test(best: TrialRecord) -> None:
            self._test(best, self._folder.path / "best_model")
            self._write(best)

        records = tuple(record for record in self._records if record.state != "waiting")
        return conclude(
            self._plan,
            self._folder,
            records,
            self._tracker,
            self._meter,
            test=test,
            used_up=self._used_up,
        )

    def _is_used_up(self) -> bool:
        """Whether the budget allows no further training; says so once."""
        self._count()
        phrase = self._plan.budget.used_up(
            hours=self._meter.hours, dollars=self._meter.dollars or 0.0
        )
        if phrase and not self._used_up:
            self._used_up = phrase
            self._say(f"{phrase}: what is left is not begun.")
        return bool(phrase)

    def _count(self) -> None:
        self._meter.look()
        self._meter.save()

    def _write_and_count(self, record: TrialRecord) -> None:
        self._write(record)
        self._count()

    def _write(self, record: TrialRecord) -> None:
        self._folder.write(record)
        self._tracker.update(record)


class _LocalReporter:
    """Writes each epoch's record and checkpoint."""

    def __init__(
        self,
        record: TrialRecord,
        write: Callable[[TrialRecord], None],
        checkpoints: CheckpointFolder,
        say: Callable[[str], None],
    ) -> None:
        self._record = record
        self._write = write
        self._say = say
        self._checkpoints = checkpoints
        self._since = time.monotonic()

    def report(self, report: EpochReport, checkpoint: Checkpoint | None) -> None:
        record = self._record
        if checkpoint is not None:
            record.checkpoint = self._checkpoints.save(checkpoint)
        metrics = metrics_of(report)
        record.history, record.complete = metrics["history"], metrics["ended"]
        now = time.monotonic()
        record.seconds += now - self._since
        self._since = now
        self._write(record)
        left = report.seconds * (report.epochs - report.epoch)
        self._say(
            f"epoch {report.epoch}/{report.epochs}  rSum {report.metrics.rsum:.1f}  best "
            f"{report.best_rsum:.1f}  loss {report.loss:.4g}  {report.seconds:.0f} s, "
            f"{left / 60:.0f} min left"
        )
