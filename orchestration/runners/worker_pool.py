"""Workers that stay: one Ray Train run that trains one trial after another.

To start a Train run takes ten seconds and more: a controller and workers are made, and each imports
torch. So the run of a pool does not end with a trial. Its workers take their orders from a mailbox,
an actor of a few lines; each epoch's numbers come back through it, and the answer, whether there is
to be a next epoch. A pool ends with the first failure in it: what comes after has fresh processes,
and as many of them as there is room for by then, if their number may vary. The batch stays that of
the configuration, split anew.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass

import ray
from ray.exceptions import RayError
from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
from ray.util.placement_group import PlacementGroup, remove_placement_group

from cpfean.last_words import LOOPBACK, Listener
from orchestration.cluster.capacity import Resources
from orchestration.runners.mailbox import Mailbox
from orchestration.runners.messages import Begun, Message, Order
from orchestration.runners.worker import work

# What holds no CPU has to be kept off nodes that may be taken away.
HEAD = "node:__internal_head__"
_LOOK_SECONDS = 1.0
_NEVER_SECONDS = 1e9


@dataclass(frozen=True, kw_only=True, slots=True)
class PoolOptions:
    """What the workers of trials are.

    Attributes:
        cache_dir: on their nodes.
        storage: folder or URL that all nodes reach.
        is_local: all is on one machine, which nobody takes away.
        silence: seconds to wait for a worker that does not answer.
    """

    resources: Resources
    cache_dir: str
    storage: str
    is_local: bool
    silence: int

    @property
    def is_elastic(self) -> bool:
        """Whether a trial may go on with fewer workers."""
        return 0 < self.resources.min_workers < self.resources.workers


class WorkerPool:
    """The workers, and the way to them.

    Args:
        name: of the Train run and of the mailbox; no other may have it.
    """

    def __init__(self, options: PoolOptions, *, name: str) -> None:
        from ray.train.torch import TorchConfig, TorchTrainer  # the driver does without torch

        asked = options.resources
        gpus = {"GPU": 1} if asked.use_gpu else {}
        self._group = ""
        self.listener = Listener(LOOPBACK if options.is_local else ray.util.get_node_ip_address())
        self._mailbox = (
            ray.remote(Mailbox)
            .options(name=name, num_cpus=0, resources={HEAD: 0.001}, scheduling_strategy="DEFAULT")
            .remote()
        )
        self._trainer = TorchTrainer(
            work,
            train_loop_config={
                "mailbox": self._mailbox,
                "last_words": self.listener.address,
                "pool": name,
                "cache_dir": options.cache_dir,
                "cpus": asked.cpus,
                "is_local": options.is_local,
            },
            torch_config=TorchConfig(timeout_s=options.silence),
            scaling_config=ScalingConfig(
                num_workers=(asked.min_workers, asked.workers)
                if options.is_elastic
                else asked.workers,
                # To grow costs what is done of an epoch: a pool stays as it has begun.
                elastic_resize_monitor_interval_s=_NEVER_SECONDS,
                use_gpu=asked.use_gpu,
                resources_per_worker={"CPU": asked.cpus} | gpus,
            ),
            run_config=RunConfig(
                name=name,
                storage_path=options.storage,
                failure_config=FailureConfig(
                    max_failures=0, max_preemption_failures=0, controller_failure_limit=3
                ),
            ),
        )
        self._error: Exception = TrainingFailedError("the workers have gone without an error")
        self._thread = threading.Thread(target=self._run, name="pool", daemon=True)
        self._thread.start()

    def train(self, order: Order) -> None:
        """Gives the workers their next trial, instead of the one they may be at."""
        ray.get(self._mailbox.give.remote(order))

    def go_on(self, epoch: int) -> None:
        """Lets the trial go on after that epoch."""
        ray.get(self._mailbox.go_on.remote(epoch))

    def message(self) -> Message:
        """The next thing that the workers tell; waits for it.

        Raises:
            TrainingFailedError: the workers have failed.
            RayActorError: the mailbox was lost.
        """
        told = self._mailbox.message.remote()
        while not ray.wait([told], timeout=_LOOK_SECONDS)[0]:
            if not self._thread.is_alive():
                raise self._error
        message: Message = ray.get(told)
        if isinstance(message, Begun):
            self._group = message.placement_group
        return message

    def hosts(self) -> dict[int, str]:
        """Where each worker is or was, by rank; empty if nobody knows."""
        hosts: dict[int, str] = {}
        with suppress(RayError, TimeoutError):
            hosts = ray.get(self._mailbox.hosts.remote(), timeout=_LOOK_SECONDS)
        return hosts

    def close(self, *, seconds: float) -> None:
        """Sends the workers home and waits for that, but no longer than this."""
        # Without the mailbox the workers go as well.
        with suppress(RayError, TimeoutError):
            ray.get(self._mailbox.close.remote(), timeout=seconds)
            self._thread.join(seconds)
        free(self._group)
        self.listener.close()

    def _run(self) -> None:
        try:
            self._trainer.fit()
        # It is raised where somebody waits for a message.
        except Exception as error:
            self._error = error


def stop_all(names: Iterable[str], *, seconds: float) -> None:
    """Lets the workers of pools save where they are and go; waits for that so long at most."""
    told = []
    for name in names:
        with suppress(ValueError, RayError):  # a pool that has gone already
            told.append(ray.get_actor(name).stop.remote())
    if told:
        ray.wait(told, num_returns=len(told), timeout=seconds)


def free(group: str) -> None:
    """Removes a placement group and the workers in it, unless that has been done.

    A pool whose controller is killed does not tidy up; Train's own cleaner asks the State API,
    which is not there without a dashboard. Then the CPUs would be lost, and the next trial would
    wait for ever.

    Args:
        group: id in hexadecimal digits; empty for none.
    """
    if group:
        remove_placement_group(PlacementGroup(ray.PlacementGroupID(bytes.fromhex(group))))
