"""One training in this very process: no Ray, the same records and the same tracking."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from orchestration.checkpoints import CheckpointFolder
from orchestration.records import RunFolder, TrialRecord, write_json, write_text
from orchestration.settings import Settings
from orchestration.study import (
    StudyPlan,
    StudyResult,
    keep_model,
    summary,
    test_metrics,
    tracked_run,
)
from orchestration.tracking import Tracker, git_commit
from orchestration.worker import metrics_of

if TYPE_CHECKING:
    from cpfean.training.checkpoint import Checkpoint
    from cpfean.training.loop import EpochReport


def run_here(
    plan: StudyPlan, settings: Settings, *, resume: bool, say: Callable[[str], None]
) -> StudyResult:
    """Trains the one configuration of a plan, or trains it on from its newest checkpoint.

    Raises:
        ConfigError: the folder exists, or does not, or was made for another plan.
        CpfeanError: what `fit` raises.
    """
    folder = RunFolder(settings.output / plan.name)
    if resume:
        folder.check_same(plan.identity())
    else:
        folder.create(plan.identity(), commit=git_commit())
    with folder.lock():
        records = folder.records()
        record = records[0] if records else _first_record(plan)
        tracker = Tracker(settings.tracking_uri, tracked_run(plan, folder), say=say)
        tracker.start()
        try:
            _train(plan, settings, folder, record, tracker, say)
            result = _conclude(plan, settings, folder, record, say)
            record.state = "finished"
        except KeyboardInterrupt:
            record.state = "interrupted"
            say(f"stopped; go on with `train.py --resume --name {plan.name}` and the same flags.")
            raise
        # The record has to tell of any failure, whoever raises what.
        except Exception as error:
            record.state, record.failure = "failed", type(error).__name__
            record.message = str(error)
            raise
        finally:
            folder.write(record)
            tracker.update(record)
            if not tracker.close():
                say("tracking: not everything is sent; --resume with this --name sends the rest.")
        return result


class _LocalReporter:
    """Writes each epoch's record and checkpoint."""

    def __init__(
        self,
        folder: RunFolder,
        record: TrialRecord,
        tracker: Tracker,
        checkpoints: CheckpointFolder,
        say: Callable[[str], None],
    ) -> None:
        self._folder = folder
        self._record = record
        self._tracker = tracker
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
        self._folder.write(record)
        self._tracker.update(record)
        left = report.seconds * (report.epochs - report.epoch)
        self._say(
            f"epoch {report.epoch}/{report.epochs}  rSum {report.metrics.rsum:.1f}  best "
            f"{report.best_rsum:.1f}  loss {report.loss:.4g}  {report.seconds:.0f} s, "
            f"{left / 60:.0f} min left"
        )


def _first_record(plan: StudyPlan) -> TrialRecord:
    only = plan.fixed[0]
    return TrialRecord(
        number=0, name=only.name, overrides=dict(only.overrides), config=only.config.to_dict()
    )


def _train(
    plan: StudyPlan,
    settings: Settings,
    folder: RunFolder,
    record: TrialRecord,
    tracker: Tracker,
    say: Callable[[str], None],
) -> None:
    import torch

    from cpfean.training.loop import fit

    record.state, record.failure, record.message = "running", "", ""
    folder.write(record)
    tracker.update(record)
    if record.complete:
        return
    checkpoints = CheckpointFolder(str(folder.path / "checkpoints"))
    newest = checkpoints.newest_valid()
    if newest is not None:
        say(f"resuming from {checkpoints.at(newest)}")
    fit(
        record.experiment,
        data_folder=plan.data_folder,
        cache_dir=settings.cache_dir,
        reporter=_LocalReporter(folder, record, tracker, checkpoints, say),
        resume_from=None if newest is None else Path(checkpoints.at(newest)),
        device=torch.device("cuda" if torch.cuda.is_available() else "cpu"),
    )


def _conclude(
    plan: StudyPlan,
    settings: Settings,
    folder: RunFolder,
    record: TrialRecord,
    say: Callable[[str], None],
) -> StudyResult:
    write_text(folder.path / "best_config.toml", record.experiment.to_toml())
    if not record.test:
        say("testing the best epoch ...")
        model = keep_model(record, folder.path / "best_model")
        record.test = test_metrics(
            model,
            record.experiment,
            data_folder=plan.data_folder,
            cache_dir=settings.cache_dir,
        )
    record.state = "finished"
    result = StudyResult(folder=Path(folder.path), records=(record,), best=record, test=record.test)
    write_json(folder.path / "summary.json", summary(result))
    return result
