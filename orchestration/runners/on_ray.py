"""Trials on Ray: on a cluster that is joined, or on this machine, where Ray is started for them."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from cpfean.errors import CpfeanError, ServiceError
from cpfean.records.budget import OTHER
from orchestration.cluster.capacity import Cluster, Demand, Resources, allocate
from orchestration.cluster.versions import among_nodes, ask_nodes, missing_workers
from orchestration.runners.protocol import Driver
from orchestration.settings import Settings
from orchestration.study.plan import StudyPlan, checkpoint_root, resume_line

_JOIN_SECONDS = 600.0  # for workers that are to be there at least
_LOOK_SECONDS = 5.0  # between two looks at whether the cluster's head still answers
_LOOKS = 3  # in vain: the head is gone


class OnRay:
    """A runner that hands the trials to Ray Tune, and their training to Ray Train.

    Args:
        settings: with the address of a cluster, or without.
        look_seconds: between two looks at whether the head of the cluster still answers.
        ask: asks nodes for their versions, as `orchestration.cluster.versions.ask_nodes`.
        trainable: as of `orchestration.runners.tune.run_trials`.
    """

    meet_seconds = 0.0
    needs_mlflow = True

    def __init__(
        self,
        settings: Settings,
        *,
        look_seconds: float = _LOOK_SECONDS,
        ask: Callable[..., dict[str, Any]] = ask_nodes,
        trainable: type[Any] | None = None,
    ) -> None:
        self._settings = settings
        self._look_seconds = look_seconds
        self._ask = ask
        self._trainable = trainable
        self._resources: Resources | None = None
        self._is_joined = False
        self._known_nodes: set[str] = set()

    def check(self, plan: StudyPlan) -> None:
        if self._settings.address is None:
            plan.budget.check_prices([OTHER])

    def wait_for_start(self) -> None:
        from orchestration.cluster.connection import wait_for_start

        wait_for_start()

    def run(self, study: Driver) -> None:
        from orchestration.cluster import connection
        from orchestration.cluster.nodes import cluster_now
        from orchestration.runners.tune import run_trials
        from orchestration.runners.worker_pool import PoolOptions

        def begun() -> None:
            if not cluster.is_local:  # it may have got other nodes for the workers
                self.look_at_nodes(study)

        cluster = connection.connect(self._settings, give_up=study.stop.leave)
        self._is_joined = True
        has_left = threading.Event()
        try:
            if not cluster.is_local:
                threading.Thread(
                    target=self.watch_head, args=(study, has_left), name="head", daemon=True
                ).start()
                cluster = workers_awaited(
                    cluster, say=study.say, now=lambda: cluster_now(is_local=False)
                )
                self.look_at_nodes(study)
            resources = allocate(
                cluster,
                workers=study.plan.workers,
                trials=study.num_open,
                min_workers=study.plan.min_workers,
            )
            study.say(self._plan_of(resources, trials=study.num_open))
            study.expect(is_local=cluster.is_local)
            if not cluster.is_local:
                self._resources = resources
            options = PoolOptions(
                resources=resources,
                cache_dir=str(self._settings.cache_dir),
                storage=checkpoint_root(study.folder, self._settings),
                is_local=cluster.is_local,
                silence=self._settings.silence,
            )
            run_trials(study, options, begun=begun, trainable=self._trainable)
        # Of a cluster that is lost Ray tells in many ways.
        except Exception as error:
            if isinstance(error, CpfeanError) or (gone := self.gone(study.plan)) is None:
                raise
            study.stop.fail(gone)
        finally:
            connection.disconnect()
            self._is_joined = False
            has_left.set()
        study.stop.check()

    def node_types(self) -> Sequence[str]:
        if not self._is_joined:
            return [OTHER]
        from orchestration.cluster.nodes import node_types

        return node_types()

    def demand(self) -> Demand | None:
        if self._resources is None:
            return None
        from orchestration.cluster.nodes import demand_of

        return demand_of(self._resources)

    def gone(self, plan: StudyPlan) -> ServiceError | None:
        try:
            self._settings.check_address()
        except ServiceError:
            return ServiceError(
                f"the cluster is gone: its head at {self._settings.address} does not answer any "
                "more. Everything so far is recorded; start it, or another, and continue with:\n"
                f"{resume_line(plan)}"
            )
        return None

    def _plan_of(self, resources: Resources, *, trials: int) -> str:
        address = self._settings.address
        where = "this machine" if address is None else f"the cluster at {address}"
        device = "1 GPU" if resources.use_gpu else f"{resources.cpus} CPU(s)"
        return (
            f"{trials} trial(s) to run on {where}, {resources.concurrent} at a time, each with "
            f"{resources.workers} worker(s) of {device}; the first processes are started, which "
            "takes a while."
        )

    def watch_head(self, study: Driver, has_left: threading.Event) -> None:
        """Ends the study when the head of the cluster is gone; runs in a thread of its own.

        The main thread hangs in Ray then, which ends the process after a minute without a word.
        """
        in_vain = 0
        while not has_left.wait(self._look_seconds):
            gone = self.gone(study.plan)
            in_vain = 0 if gone is None else in_vain + 1
            if gone is not None and in_vain == _LOOKS:
                study.stop.fail(gone)
                if not has_left.wait(study.stop.deadlines.ended):
                    study.stop.leave()
                return

    def look_at_nodes(self, study: Driver) -> None:
        """Compares the versions of nodes that have not been asked with those here.

        Raises:
            ServiceError: they differ, or a node cannot tell them, and may not.
        """
        answers = self._ask(None, known=self._known_nodes)
        self._known_nodes |= set(answers)
        drift = among_nodes(answers, allowed=study.plan.allow_drift)
        if drift:
            study.say(f"versions differ, which is allowed: {drift}")
            study.differs(drift)


def workers_awaited(
    cluster: Cluster,
    *,
    say: Callable[[str], None],
    now: Callable[[], Cluster],
    missing: Callable[[int], str] = missing_workers,
    seconds: float = _JOIN_SECONDS,
    pause: float = 1.0,
) -> Cluster:
    """The cluster once the workers that it is to have at least are there.

    Whether trials have GPUs, and how many run at a time, is settled by what is there when they
    start, and `ray up` returns when the head is up.

    Args:
        missing: what is missing if so many workers are there; empty if nothing is.
        seconds: that they are waited for at most.
    """
    end = time.monotonic() + seconds
    told = False
    while lacks := missing(len(cluster.nodes) - 1):
        if time.monotonic() > end:
            say(f"{lacks}: starting with what is there.")
            break
        if not told:
            told = True
            say(f"{lacks}: waiting for the others, ten minutes at most.")
        time.sleep(pause)
        cluster = now()
    return cluster
