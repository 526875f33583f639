"""Ray Tune's side of a study: trials are handed to it, and what it tells is passed on.

Tune runs a small process for each trial at a time (`orchestration.runners.trial_process`), which
has a pool of Ray Train workers; both stay for the next trial. What a trial is, what is known of it
and what comes next is the study's business; Tune's own snapshots are not read back, so that a
restart depends on nothing but our records and the checkpoints.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from ray import tune
from ray.tune.experiment import Trial
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from cpfean.records.trial_record import METRIC, TrialRecord
from orchestration.runners.messages import Begun, Ended, Failed, Lost, Message
from orchestration.runners.protocol import Driver
from orchestration.runners.ray_errors import last_lines
from orchestration.runners.trial_process import MESSAGE, TrialProcess
from orchestration.runners.worker_pool import HEAD, PoolOptions, free, stop_all
from orchestration.study.trials import MAX_LOSSES


def run_trials(
    study: Driver,
    options: PoolOptions,
    *,
    begun: Callable[[], None] = lambda: None,
    trainable: type[Any] | None = None,
) -> None:
    """Runs trials until the study has no more.

    Args:
        begun: called when a trial's workers are there.
        trainable: that runs one trial after another; None: a process with its workers.
    """
    # Tune repeats as an error what the study has said of its trials.
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)
    scheduler: Halving | FIFOScheduler = FIFOScheduler()
    if study.plan.grace:
        epochs = study.plan.base.optim.epochs
        scheduler = Halving(study.records, grace=study.plan.grace, epochs=epochs)
    # On one machine the processes of several trials only slow each other down as they start.
    source = Source(study, first_alone=options.is_local)
    callbacks = Callbacks(study, scheduler, begun=[source.begun, begun])
    trial_process = tune.with_parameters(trainable or TrialProcess, options=options)
    tuner = tune.Tuner(
        tune.with_resources(trial_process, tune.PlacementGroupFactory([{HEAD: 0.001}])),
        tune_config=tune.TuneConfig(
            search_alg=source,
            scheduler=scheduler,
            # What is lost is a new trial to Tune.
            num_samples=(1 + MAX_LOSSES) * study.num_open,
            max_concurrent_trials=options.resources.concurrent,
            reuse_actors=True,
            trial_dirname_creator=lambda trial: f"{trial.config['number']:03d}",
        ),
        run_config=tune.RunConfig(
            name=f"attempt-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}",
            storage_path=str(study.folder.path / "tune"),
            callbacks=[callbacks],
            checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
            verbose=0,
        ),
    )
    try:
        with study.stop.at_work(callbacks.save_all):
            tuner.fit()
    finally:
        callbacks.free_all()


class Source(Searcher):
    """Hands the study's trials to Tune, one at a time."""

    def __init__(self, study: Driver, *, first_alone: bool = False) -> None:
        super().__init__(metric=METRIC, mode="max")
        self._study = study
        self._running: set[str] = set()
        self._waits = first_alone

    def begun(self) -> None:
        """A trial has its workers: the others may be started."""
        self._waits = False

    def suggest(self, trial_id: str) -> Any:  # FINISHED is a text, whatever Tune's types say
        if self._waits and self._running:
            return None  # not now
        record = None
        with self._study.stop.errors_of(self._study.folder.path):
            record = self._study.next_trial()
        if record is None:
            # Tune takes that as final, and a trial that runs may be lost and come back.
            return None if self._running else Searcher.FINISHED
        self._running.add(trial_id)
        return {
            "number": record.number,
            "config": json.dumps(record.config),
            "folder": self._study.checkpoints_of(record.number),
            "test": self._study.plan.tests_all,
        }

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        # What came of it the study tells itself, with states that Tune does not pass on.
        self._running.discard(trial_id)

    def save(self, checkpoint_path: str) -> None:
        """Tune takes snapshots; ours are the records."""

    def restore(self, checkpoint_path: str) -> None:
        raise RuntimeError("a study is resumed from its records, not from Tune's snapshot")

    def __reduce__(self) -> tuple[type, tuple[None]]:
        return (Source, (None,))  # in a snapshot: nothing of the driver's state


class Halving(ASHAScheduler):
    """ASHA that knows the trials of earlier drivers, and which trials it stopped itself.

    What is behind half of the others after `grace` epochs, twice as many and so on, is stopped.

    Args:
        past: trials of earlier drivers.
        epochs: of a trial that is not stopped.
    """

    def __init__(self, past: Sequence[TrialRecord], *, grace: int, epochs: int) -> None:
        # One epoch more than there are: a trial that reaches its end ends by itself, which frees
        # its workers in good order.
        super().__init__(
            time_attr="epoch",
            metric=METRIC,
            mode="max",
            max_t=epochs + 1,
            grace_period=grace,
            reduction_factor=2.0,
        )
        self.stopped: set[str] = set()
        self._past = {record.number: record for record in past}
        for record in past:
            if record.settled and record.history:
                # All that ASHA asks of a trial, and of the controller nothing.
                settled: Any = SimpleNamespace(trial_id=f"settled-{record.number}")
                nobody: Any = None
                super().on_trial_add(nobody, settled)
                for row in record.history:
                    super().on_trial_result(nobody, settled, row)

    def on_trial_add(self, tune_controller: Any, trial: Trial) -> None:
        super().on_trial_add(tune_controller, trial)
        known = self._past.get(trial.config["number"])
        # The epochs before a restart were judged when they came.
        for row in known.history if known else ():
            super().on_trial_result(tune_controller, trial, row)

    def on_trial_result(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> str:
        decision = super().on_trial_result(tune_controller, trial, result)
        if decision == TrialScheduler.STOP:
            if result.get("ended"):  # it is finished, however it compares
                return TrialScheduler.CONTINUE
            self.stopped.add(trial.trial_id)
        return decision


class Callbacks(tune.Callback):
    """Passes on to the study what Tune tells, and frees what a lost pool holds.

    Tune would make a text of an error that comes out of a callback: the study is stopped by it.

    Args:
        begun: called when a trial's workers are there.
    """

    def __init__(
        self, study: Driver, scheduler: Any, *, begun: Sequence[Callable[[], None]] = ()
    ) -> None:
        self._study = study
        self._scheduler = scheduler
        self._begun = begun
        self._teams: dict[int, Begun] = {}  # of each trial

    def __reduce__(self) -> tuple[type, tuple[None, None]]:
        return (Callbacks, (None, None))  # in a snapshot: nothing of the driver's state

    def on_step_end(self, iteration: int, trials: list[Trial], **_: Any) -> None:
        with self._study.stop.errors_of(self._study.folder.path):
            self._study.tick()

    def on_trial_start(self, iteration: int, trials: list[Trial], trial: Trial, **_: Any) -> None:
        with self._study.stop.errors_of(self._study.folder.path):
            self._study.started(trial.config["number"])

    def on_trial_result(
        self, iteration: int, trials: list[Trial], trial: Trial, result: dict, **_: Any
    ) -> None:
        message = result.get(MESSAGE)
        # None: nothing new. A failure Tune tells of next, as the end of the trial.
        if message is not None and not isinstance(message, Failed):
            self._tell(trial, message)

    def on_trial_complete(
        self, iteration: int, trials: list[Trial], trial: Trial, **_: Any
    ) -> None:
        last = (trial.last_result or {}).get(MESSAGE)
        pruned = trial.trial_id in getattr(self._scheduler, "stopped", ())
        self._tell(trial, last if isinstance(last, Failed) else Ended(pruned=pruned))

    def on_trial_error(self, iteration: int, trials: list[Trial], trial: Trial, **_: Any) -> None:
        """The trial's process is gone: what goes wrong in it otherwise is a message."""
        with self._study.stop.errors_of(self._study.folder.path):
            self._tell(trial, _gone(trial))

    def save_all(self, seconds: float) -> bool:
        """Lets trials save where they are; Tune has to be interrupted then."""
        teams = list(self._teams.values())  # this is not the thread that Tune calls back in
        stop_all({team.pool for team in teams}, seconds=seconds)
        return False

    def free_all(self) -> None:
        """At the end: pools that Tune has not let end by themselves."""
        for team in self._teams.values():
            free(team.placement_group)

    def _tell(self, trial: Trial, message: Message) -> None:
        number = trial.config["number"]
        with self._study.stop.errors_of(self._study.folder.path):
            if isinstance(message, Begun):
                # Trials that had the same pool before have it no more.
                others = {n: team for n, team in self._teams.items() if team.pool != message.pool}
                self._teams = others | {number: message}
                for told in self._begun:
                    told()
            elif isinstance(message, Failed | Lost) and number in self._teams:
                free(self._teams.pop(number).placement_group)
            self._study.tell(number, message)


def _gone(trial: Trial) -> Lost | Failed:
    """What is told of a trial whose process has gone with an error.

    Tune leaves the error as a text on this machine before it calls back. Beside that is a pickle of
    it, which is not read: that would run what is in it.
    """
    if not trial.error_file or not Path(trial.error_file).is_file():
        return Lost(message="no error was left behind")
    text = Path(trial.error_file).read_text(encoding="utf-8", errors="replace")
    _, _, message = text.rpartition("Failure # ")[2].partition("\n")
    last = last_lines(message)
    if "low on memory" in message:  # Ray has ended it before the system would
        return Failed(failure="oom", message=last)
    # All of Ray's errors about a lost process begin so; what code of ours raises, with "ray::".
    is_lost = message.startswith("The actor ")
    return Lost(message=last) if is_lost else Failed(failure="bug", message=last)
