"""Extraction on Ray Data: names of photographs go to a pool of actors, packed batches come back."""

from __future__ import annotations

import functools
import logging
import os
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from cpfean.errors import ServiceError, message_of
from cpfean.extraction.batches import Batch
from cpfean.extraction.in_process import Made
from cpfean.extraction.worker import MakeExtractor, Worker, received, sent
from orchestration.cluster import connection
from orchestration.cluster.capacity import Cluster, allocate, this_machine
from orchestration.cluster.nodes import cluster_now
from orchestration.cluster.versions import Nodes, RayNodes, among_nodes
from orchestration.runners.on_ray import workers_awaited
from orchestration.settings import Settings
from orchestration.versions import versions

_RESTARTS = 10  # of an actor whose node has gone
End = Callable[[ServiceError], None]
_LOOKS = 3  # for the head, in vain: it is gone
_GONE, _AGAIN = "the cluster, or a part of it, is lost", "The same command again goes on."


class OnRay:
    """Runs batches on a cluster that is joined, or on this machine, where Ray is started for them.

    Args:
        workers: actors, of one GPU each or of one CPU where there is none; None: all that fit.
        make_extractor, provenance: as of `Worker`.
        folders: that every node has to see beside the photographs.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        workers: int | None,
        make_extractor: MakeExtractor,
        provenance: Mapping[str, Any],
        folders: Sequence[str] = (),
        say: Callable[[str], None] = print,
    ) -> None:
        self._settings, self._workers, self._folders, self._say = settings, workers, folders, say
        self._worker, self._has_left = (make_extractor, provenance), threading.Event()
        self._cluster: Cluster | None = None

    def __enter__(self) -> OnRay:
        if self._settings.address is not None:  # what the cluster has is to be known at once
            os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # that actors can be restarted
            self._join()
        return self

    def __exit__(self, *error: object) -> None:
        self._has_left.set()
        if self._cluster is not None:
            connection.disconnect()

    @property
    def device(self) -> str:
        """Where the actors compute: "cuda" or "cpu"."""
        return "cuda" if (self._cluster or this_machine()).gpus else "cpu"

    def __call__(self, batches: Sequence[Batch]) -> Iterator[Made]:
        """Gives each batch, packed, as soon as it is done, in whatever order.

        Raises CpfeanError: what a worker tells of, or what is wrong with the cluster.
        """
        import ray.data

        cluster = self._cluster or self._join()
        workers, options = self._demand(cluster)
        if not cluster.is_local:
            check_nodes([batches[0].paths[0], batches[-1].paths[-1], *self._folders])
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = context.print_on_execution_start = False
        logging.getLogger("ray.data").setLevel(logging.ERROR)
        # Left to itself Ray restarts actors without end, one that needs too much memory too.
        warnings.filterwarnings("ignore", "`ray_remote_args` is deprecated")
        rows = [{"batch": sent(batch)} for batch in batches]
        results = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
            Worker,
            fn_constructor_args=(*self._worker, self.device),
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(size=min(workers, len(rows))),
            **options,
        )
        by_number = {batch.number: batch for batch in batches}
        try:  # a block is a batch, and is here as soon as it is done
            for block in results.iter_batches(batch_size=None, prefetch_batches=0):
                for number, content in received(block):
                    yield by_number[number], content
        except ray.exceptions.RayError as lost:
            if isinstance(lost, ray.exceptions.RayTaskError):  # a defect of ours
                raise
            raise ServiceError(f"{_GONE}: {message_of(lost)} {_AGAIN}") from lost

    def _demand(self, cluster: Cluster) -> tuple[int, dict[str, int]]:
        """How many actors there are to be, and what each asks of Ray."""
        each, there = ("gpu", cluster.gpus) if cluster.gpus else ("cpu", cluster.cpus)
        workers = self._workers or there
        allocate(cluster, workers=workers, trials=1)  # refuses what can never be
        at = self._settings.address or "this machine"
        self._say(f"{workers} worker(s) of 1 {each.upper()} start on {at}: it takes a while.")
        times = 0 if cluster.is_local else _RESTARTS
        return workers, {f"num_{each}s": 1, "max_restarts": times, "max_task_retries": times}

    def _join(self) -> Cluster:
        self._cluster = cluster = connection.connect(self._settings)
        if not cluster.is_local:
            watch = (self._settings, self._has_left)
            threading.Thread(target=watch_head, args=watch, daemon=True).start()
            now = functools.partial(cluster_now, is_local=False)
            self._cluster = workers_awaited(cluster, say=self._say, now=now)
        return self._cluster


def watch_head(
    settings: Settings, left: threading.Event, end: End = connection.end_process, pause: float = 5.0
) -> None:
    """Ends the process when the head is gone, as Ray would a minute later without a word."""
    in_vain = 0
    while not left.wait(pause):
        try:
            settings.check_address()
            in_vain = 0
        except ServiceError:
            if (in_vain := in_vain + 1) == _LOOKS:
                return end(ServiceError(f"{_GONE}: the head at {settings.address}. {_AGAIN}"))


def check_nodes(paths: Sequence[str], nodes: Nodes | None = None) -> None:
    """Raises ServiceError if a node has other versions, or does not see a path."""
    local = [path for path in paths if "://" not in path]
    nodes = nodes or RayNodes()
    answers = nodes.ask(
        nodes.living(), lambda: versions() | {p: "" for p in local if not os.path.lexists(p)}
    )
    unseen = {f"{host} does not see {p}" for p in local for host in answers if p in answers[host]}
    if told := "\n  ".join([among_nodes(answers, allowed=True), *sorted(unseen)]).lstrip():
        raise ServiceError(
            f"nodes lack what they need:\n  {told}\n`ray up` installs the versions. Photographs "
            "have to be on s3:// or, as models, on a disk that all have; or work --in-process."
        )
