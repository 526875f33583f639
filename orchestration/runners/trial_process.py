"""The process that Tune runs for each trial at a time; it looks after the workers that train it."""

from __future__ import annotations

import json
import os
import time
import uuid
from collections.abc import Callable
from typing import Any

import ray
from ray import tune
from ray.exceptions import RayActorError
from ray.train import TrainingFailedError

from cpfean.errors import CheckpointError, ServiceError, StoppedError
from cpfean.records.trial_record import METRIC
from cpfean.storage.checkpoints import CheckpointFolder
from orchestration.runners.messages import Begun, Epoch, Failed, Message, Note, Order, Resumed
from orchestration.runners.ray_errors import cause_of, classify, has_waited, lost_ranks
from orchestration.runners.worker_pool import PoolOptions, WorkerPool
from orchestration.settings import prepare_environment

MAX_RETRIES = 3  # of a trial from its newest checkpoint, after something was lost
MESSAGE = "message"  # what a result of Tune's holds, beside what its schedulers look at
_RETRIED = ("infra", "preempted")
_PAUSE_SECONDS = 2.0  # times the number of the retry, where a disk or a store has refused
_CLOSE_SECONDS = 10.0
_ELASTIC_START_SECONDS = 30


def result_of(message: Message) -> dict[str, Any]:
    """A message as a result of Tune's.

    On top there is only what a scheduler looks at: Tune keeps statistics of every number there.
    """
    if isinstance(message, Epoch):
        judged = {name: message.history[-1][name] for name in ("epoch", METRIC)}
        return judged | {MESSAGE: message, "ended": message.ended, "done": message.ended}
    # A failure is a result and not an error, which would cost this process as well.
    return {MESSAGE: message, "done": isinstance(message, Failed)}


class TrialProcess(tune.Trainable):
    """One trial after another, each trained by the workers of a pool; one step is one message.

    Tune keeps the process for the next trial, and with it the pool.
    """

    def setup(
        self,
        config: dict[str, Any],
        options: PoolOptions | None = None,
        make_pool: Callable[..., WorkerPool] = WorkerPool,
        available: Callable[[], dict[str, float]] = ray.available_resources,
        pause: Callable[[float], None] = time.sleep,
    ) -> None:
        """Prepares the process; called by Tune.

        Args:
            config: of the first trial.
            make_pool: makes one, of options and a name.
            available: what of the cluster is not in use.
            pause: waits so many seconds.
        """
        prepare_environment()
        assert options is not None
        os.environ.setdefault("RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S", str(options.silence))
        if options.is_elastic:
            # Right after a host is lost it is still counted on; the next count will be right.
            os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = str(_ELASTIC_START_SECONDS)
        if options.is_local:
            # Nobody takes this machine away; that is one process less.
            os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
        self._options = options
        self._make_pool, self._available, self._pause = make_pool, available, pause
        self._pool: WorkerPool | None = None
        self._workers = options.resources.workers
        self.reset_config(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self._is_given = False
        self._epoch = 0
        self._retries = 0
        self._first_loss = ""
        return True

    def step(self) -> dict[str, Any]:
        try:
            return result_of(self._message())
        except (TrainingFailedError, RayActorError, ServiceError, CheckpointError) as error:
            message = self._after(error)
            # How long workers may be waited for is for the study to say.
            return {"done": False} if message is None else result_of(message)
        # What is none of these is a defect of ours, which fails the trial and not this process.
        except Exception as error:
            self.cleanup()
            failure, text = classify(error)
            return result_of(Failed(failure=failure, message=text))

    def _message(self) -> Message:
        if not self._is_given and self._has_room_for_more():
            self.cleanup()
        if self._pool is None:
            self._pool = self._make_pool(self._options, name=f"pool-{uuid.uuid4().hex[:8]}")
        if self._is_given:
            self._pool.go_on(self._epoch)
        else:
            folder = CheckpointFolder(self.config["folder"])
            folder.create()
            self._pool.train(
                Order(
                    config=json.loads(self.config["config"]),
                    folder=folder.uri,
                    attempt=folder.new_attempt(),
                    test=self.config["test"],
                )
            )
            self._is_given = True
        message = self._pool.message()
        match message:
            case Begun(workers=workers):
                self._workers = workers
            case Resumed(epoch=epoch):
                self._epoch = epoch
            case Epoch(history=history):
                self._epoch = int(history[-1]["epoch"])
        return message

    def _after(self, error: BaseException) -> Message | None:
        """What becomes of the trial after an error: a note on how it goes on, or its failure."""
        refused = cause_of(error, ServiceError)  # by a disk or a store
        what = str(refused).splitlines()[0].rstrip(".") if refused else self._lost(error)
        self.cleanup()
        if has_waited(error):
            return None
        failure, message = classify(error)
        self._retries += failure == "infra"
        if failure not in _RETRIED or self._retries > MAX_RETRIES:
            if self._first_loss not in ("", what):
                message = f"It began with: {self._first_loss}.\n{message}"
            return Failed(failure=failure, message=message)
        if failure == "infra":
            self._first_loss = self._first_loss or what
            if refused:
                self._pause(_PAUSE_SECONDS * self._retries)
            retry = f"retry {self._retries}/{MAX_RETRIES}"
            return Note(line=f"{what}; {retry} from epoch {self._epoch}.")
        if cause_of(error, StoppedError):
            return Note(line=f"preempted: {message} It goes on there.")
        return Note(line=f"preempted; goes on from epoch {self._epoch}.")

    def _has_room_for_more(self) -> bool:
        """Whether a worker is missing and would fit; only between trials is it worth a new pool."""
        asked = self._options.resources
        kind, number = ("GPU", 1) if asked.use_gpu else ("CPU", asked.cpus)
        return self._workers < asked.workers and self._available().get(kind, 0) >= number

    def _lost(self, error: BaseException) -> str:
        """Who is lost, as far as it is known; what may come back of them is fenced."""
        silent, gone, waiting = lost_ranks(error)
        hosts = {} if self._pool is None else self._pool.hosts()
        if self._pool is not None and (gone or not silent):
            gone = self._pool.listener.culprits(gone, waiting=waiting)
        what = "worker lost" if gone or not silent else f"node silent {self._options.silence} s"
        named = ", ".join(f"rank {rank} on {hosts.get(rank, '?')}" for rank in gone or silent)
        return f"{what} ({named}), fenced" if named else f"{what}, fenced"

    def cleanup(self) -> None:
        """Sends the workers home; Tune calls it at the end."""
        pool, self._pool, self._is_given = self._pool, None, False
        if pool is not None:
            pool.close(seconds=_CLOSE_SECONDS)
