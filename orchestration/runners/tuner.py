"""Ray and Tune: the trials of a study as Tune sees them; imported when a study starts.

Tune runs a small process for each trial at a time, and that process has a crew of Ray Train workers
(`orchestration.runners.worker_pool`); both stay for the next trial. What a trial is, what is known
of it and what comes next is the study's business, behind `Hooks`; Tune's own snapshots are not read
back, so that a restart depends on nothing but our records and the checkpoints.
"""

from __future__ import annotations

import json
import logging
import os
import time
import uuid
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import ray
from ray import tune
from ray.exceptions import RayActorError
from ray.train import TrainingFailedError
from ray.tune.experiment import Trial
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from cpfean.errors import (
    CheckpointError,
    ServiceError,
    StoppedError,
)
from orchestration.cluster.capacity import Resources
from orchestration.proposals.search import METRIC
from orchestration.runners.ray_errors import (
    causes_of,
    classify,
    has_waited,
    lost_ranks,
    refusal,
    waiting_ranks,
)
from orchestration.runners.worker_pool import HEAD, Crew, free
from orchestration.settings import (
    Settings,
    prepare_environment,
)
from orchestration.storage.checkpoints import CheckpointFolder
from orchestration.study.records import TrialRecord

_RETRIED = ("infra", "preempted")
MAX_RETRIES = 3
_PAUSE_SECONDS = 2.0  # times the number of the retry, where a disk or a store has refused
_CLOSE_SECONDS = 10.0
_ELASTIC_START_SECONDS = 30


class Hooks(Protocol):
    """What a study does as its trials come and go; called in the driver's main thread."""

    def next_trial(self) -> TrialRecord | None: ...

    def started(self, number: int) -> None: ...

    def begun(self, number: int, crew: str) -> None: ...

    def reported(self, number: int, metrics: dict[str, Any]) -> None: ...

    def ended(self, number: int, *, pruned: bool) -> None: ...

    def failed(self, number: int, failure: str, message: str) -> None: ...

    def lost(self, number: int, message: str) -> None: ...

    def noted(self, number: int, line: str) -> None: ...

    def tick(self) -> None: ...


@dataclass(frozen=True, kw_only=True, slots=True)
class EarlyStopping:
    """Successive halving: what is clearly behind after `grace` epochs, and so on, is stopped."""

    grace: int
    epochs: int
    reduction: float = 2.0


def run_trials(
    hooks: Hooks,
    *,
    num_trials: int,
    resources: Resources,
    settings: Settings,
    run_name: str,
    train_storage: str,
    tune_storage: str,
    early_stopping: EarlyStopping | None,
    test: bool,
    past: Iterable[TrialRecord],
) -> None:
    """Runs trials until the hooks have no more.

    Args:
        num_trials: at most so many are asked for.
        train_storage: folder or URL of the checkpoints; all nodes reach it.
        tune_storage: folder of Tune's own files.
        test: whether workers test each trial's best epoch on the test split.
        past: trials of earlier drivers; the scheduler compares with them.
    """
    job = {
        "cache_dir": str(settings.cache_dir),
        "workers": resources.workers,
        "min_workers": resources.min_workers or resources.workers,
        "silence": settings.silence,
        "cpus": resources.cpus,
        "use_gpu": resources.use_gpu,
        "is_local": settings.address is None,
        "storage": train_storage,
        "run_name": run_name,
        "test": test,
    }

    # Tune repeats as an error what the study has said of its trials.
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)
    scheduler: _Halving | FIFOScheduler = FIFOScheduler()
    if early_stopping is not None:
        scheduler = _Halving(early_stopping, list(past))
    # On one machine the processes of several trials only slow each other down as they start.
    source = _Source(hooks, first_alone=settings.address is None)
    watcher = _Watcher(hooks, scheduler, begun=source.begun)
    tuner = tune.Tuner(
        tune.with_resources(
            tune.with_parameters(_Trial, job=job), tune.PlacementGroupFactory([{HEAD: 0.001}])
        ),
        tune_config=tune.TuneConfig(
            search_alg=source,
            scheduler=scheduler,
            num_samples=(1 + MAX_RETRIES) * num_trials,  # what is lost is a new trial to Tune
            max_concurrent_trials=resources.concurrent,
            reuse_actors=True,
            trial_dirname_creator=lambda trial: f"{trial.config['number']:03d}",
        ),
        run_config=tune.RunConfig(
            name=f"attempt-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}",
            storage_path=tune_storage,
            callbacks=[watcher],
            checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
            verbose=0,
        ),
    )
    try:
        tuner.fit()
    finally:
        watcher.free_all()


class _Trial(tune.Trainable):
    """One trial after another, each trained by the crew; one step is one piece of news.

    Tune keeps the process for the next trial, and with it the crew.
    """

    def setup(self, config: dict[str, Any], job: dict[str, Any] | None = None) -> None:
        prepare_environment()
        assert job is not None
        os.environ.setdefault("RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S", str(job["silence"]))
        if job["min_workers"] < job["workers"]:
            # Right after a host is lost it is still counted on; the next count will be right.
            os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = str(_ELASTIC_START_SECONDS)
        if job["is_local"]:
            # Nobody takes this machine away; that is one process less.
            os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
        self._job = job
        self._crew: Crew | None = None
        self._workers = job["workers"]
        self._begin()

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self._begin()
        return True

    def _begin(self) -> None:
        self._given = False
        self._epoch = 0
        self._retries = 0
        self._first_loss = ""

    def step(self) -> dict[str, Any]:
        try:
            return self._news()
        except (TrainingFailedError, RayActorError, ServiceError, CheckpointError) as error:
            refused = refusal(error)
            what = refused or self._lost(error)
            self._dismiss()
            if has_waited(error):
                return {"done": False}  # how long that may go on is for the study to say
            failure, message = classify(error)
            self._retries += failure == "infra"
            if failure not in _RETRIED or self._retries > MAX_RETRIES:
                if self._first_loss not in ("", what):
                    message = f"It began with: {self._first_loss}.\n{message}"
                # As news and not as an error, which would cost this process as well.
                return {"failure": failure, "message": message, "done": True}
            if failure == "infra":
                self._first_loss = self._first_loss or what
                line = f"{what}; retry {self._retries}/{MAX_RETRIES} from epoch {self._epoch}."
                if refused:
                    time.sleep(_PAUSE_SECONDS * self._retries)
            elif any(isinstance(cause, StoppedError) for cause in causes_of(error)):
                line = f"preempted: {message} It goes on there."
            else:
                line = f"preempted; goes on from epoch {self._epoch}."
            return {"note": line, "done": False}

    def cleanup(self) -> None:
        self._dismiss()

    def _news(self) -> dict[str, Any]:
        name = f"{self._job['run_name']}-{self.config['number']:03d}"
        if not self._given and self._workers < self._job["workers"] and self._has_room():
            self._dismiss()
        if self._crew is None:
            self._crew = Crew(self._job, name=f"crew-{uuid.uuid4().hex[:8]}")
        if self._given:
            self._crew.go_on(self._epoch)
        else:
            folder = CheckpointFolder(f"{self._job['storage']}/{name}")
            folder.create()
            trial = {
                "config": json.loads(self.config["config"]),
                "folder": folder.uri,
                "attempt": folder.new_attempt(),
                "test": self._job["test"],
            }
            self._crew.train(trial)
            self._given = True
        news = self._crew.news()
        self._epoch = int(news.get("epoch", news.get("resumed", self._epoch)))
        if "begun" in news:
            news |= {"crew": self._crew.name}
        workers, most = news.get("workers", self._workers), self._job["workers"]
        if workers != self._workers:
            self._workers = workers
            news |= {"note": f"trained by {workers} of {most} workers; the batch is the same."}
        return news | {"done": bool(news.get("ended"))}

    def _has_room(self) -> bool:
        """Whether one more worker would fit; only between trials is it worth a new crew."""
        kind, number = ("GPU", 1) if self._job["use_gpu"] else ("CPU", self._job["cpus"])
        return bool(ray.available_resources().get(kind, 0) >= number)

    def _lost(self, error: BaseException) -> str:
        """Who is lost, as far as it is known; what may come back of them is fenced."""
        silent, gone = lost_ranks(error)
        hosts = {} if self._crew is None else self._crew.hosts()
        if not (silent or gone):
            # Those who waited in vain are told of first; if all but one did, it is that one.
            missing = sorted(set(hosts) - waiting_ranks(error))
            gone = missing if len(missing) == 1 else []
        what = "worker lost" if gone or not silent else f"node silent {self._job['silence']} s"
        named = ", ".join(f"rank {rank} on {hosts.get(rank, '?')}" for rank in gone or silent)
        return f"{what} ({named}), fenced" if named else f"{what}, fenced"

    def _dismiss(self) -> None:
        crew, self._crew, self._given = self._crew, None, False
        if crew is not None:
            crew.close(seconds=_CLOSE_SECONDS)


class _Source(Searcher):
    """Hands the study's trials to Tune, one at a time."""

    def __init__(self, hooks: Hooks, *, first_alone: bool = False) -> None:
        super().__init__(metric=METRIC, mode="max")
        self._hooks = hooks
        self._running: set[str] = set()
        self._waits = first_alone

    def begun(self) -> None:
        """A trial has its workers: the others may be started."""
        self._waits = False

    def suggest(self, trial_id: str) -> Any:  # FINISHED is a text, whatever Tune's types say
        if self._waits and self._running:
            return None  # not now
        record = self._hooks.next_trial()
        if record is None:
            # Tune takes that as final, and a trial that runs may be lost and come back.
            return None if self._running else Searcher.FINISHED
        self._running.add(trial_id)
        return {"number": record.number, "config": json.dumps(record.config)}

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
        return (_Source, (None,))  # in a snapshot: nothing of the driver's state


class _Halving(ASHAScheduler):
    """ASHA that knows the trials of earlier drivers, and which trials it stopped itself."""

    def __init__(self, rule: EarlyStopping, past: list[TrialRecord]) -> None:
        # One epoch more than there are: a trial that reaches its end ends by itself, which frees
        # its workers in good order.
        super().__init__(
            time_attr="epoch",
            metric=METRIC,
            mode="max",
            max_t=rule.epochs + 1,
            grace_period=rule.grace,
            reduction_factor=rule.reduction,
        )
        self.stopped: set[str] = set()
        self._past = {record.number: record for record in past}
        for record in past:
            if record.settled and record.history:
                settled: Any = _Settled(f"settled-{record.number}")
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
        if decision == TrialScheduler.STOP and not result.get("ended"):
            self.stopped.add(trial.trial_id)
            return decision
        # What has come to its end anyway is finished, however it compares.
        return TrialScheduler.CONTINUE if decision == TrialScheduler.STOP else decision


@dataclass(frozen=True, slots=True)
class _Settled:
    """All that ASHA asks of a trial."""

    trial_id: str


class _Watcher(tune.Callback):
    """Tells the study what happens, and frees what a lost crew holds."""

    def __init__(
        self, hooks: Hooks, scheduler: Any, *, begun: Callable[[], None] = lambda: None
    ) -> None:
        self._hooks = hooks
        self._begun = begun
        self._scheduler = scheduler
        self._groups: dict[int, str] = {}

    def __reduce__(self) -> tuple[type, tuple[None, None]]:
        return (_Watcher, (None, None))  # in a snapshot: nothing of the driver's state

    def on_step_end(self, iteration: int, trials: list[Trial], **info: Any) -> None:
        self._hooks.tick()

    def on_trial_start(
        self, iteration: int, trials: list[Trial], trial: Trial, **info: Any
    ) -> None:
        self._hooks.started(trial.config["number"])

    def on_trial_result(
        self, iteration: int, trials: list[Trial], trial: Trial, result: dict, **info: Any
    ) -> None:
        number = trial.config["number"]
        if "note" in result:
            self._hooks.noted(number, result["note"])
        if "begun" in result:
            group = result["placement_group"]
            others = {n: known for n, known in self._groups.items() if known != group}
            self._groups = others | {number: group}
            self._begun()
            self._hooks.begun(number, result["crew"])
        elif "history" in result:
            self._hooks.reported(number, result)

    def on_trial_complete(
        self, iteration: int, trials: list[Trial], trial: Trial, **info: Any
    ) -> None:
        number = trial.config["number"]
        last = trial.last_result or {}
        if "failure" in last:
            self._free(number)
            self._hooks.failed(number, last["failure"], last["message"])
        else:
            pruned = trial.trial_id in getattr(self._scheduler, "stopped", ())
            self._hooks.ended(number, pruned=pruned)

    def on_trial_error(
        self, iteration: int, trials: list[Trial], trial: Trial, **info: Any
    ) -> None:
        number = trial.config["number"]
        self._free(number)
        failure, message = classify(_error_of(trial))
        if failure == "infra":
            self._hooks.lost(number, message)
        else:
            self._hooks.failed(number, failure, message)

    def free_all(self) -> None:
        """At the end: crews that Tune has not let end by themselves."""
        for number in list(self._groups):
            self._free(number)

    def _free(self, number: int) -> None:
        """Removes the workers of a trial, which failed or whose process is gone."""
        free(self._groups.pop(number, ""))


def _error_of(trial: Trial) -> BaseException:
    """What a trial failed with, by the text that Tune leaves on this machine before it calls back.

    Beside it is a pickle of the error, which is not read: that would run what is in it.
    """
    if not trial.error_file or not Path(trial.error_file).is_file():
        return RuntimeError("no error was left behind")
    text = Path(trial.error_file).read_text(encoding="utf-8", errors="replace")
    _, _, message = text.rpartition("Failure # ")[2].partition("\n")
    # All of Ray's errors about a lost process begin so; what code of ours raises, with "ray::".
    is_lost = message.startswith("The actor ")
    return RayActorError(error_msg=message) if is_lost else RuntimeError(message)
