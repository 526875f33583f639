"""Extraction on Ray Data: names of photographs go to a pool of actors, packed batches come back."""

from __future__ import annotations

import functools
import logging
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from cpfean.errors import ServiceError, message_of
from cpfean.extraction.batches import Batch
from cpfean.extraction.in_process import READERS, Made
from cpfean.extraction.worker import MakeExtractor, Worker, received, sent
from orchestration.cluster import connection
from orchestration.cluster.capacity import Cluster, allocate, this_machine
from orchestration.cluster.nodes import cluster_now
from orchestration.cluster.versions import Nodes, RayNodes, among_nodes, ask_nodes
from orchestration.runners.on_ray import workers_awaited
from orchestration.settings import Settings

_RESTARTS = 10  # of an actor whose node has gone


class OnRay:
    """Runs batches on a cluster that is joined, or on this machine, where Ray is started for them.

    Args:
        workers: actors, of one GPU each or of one CPU where there is none; None: all that fit.
        make_extractor, provenance: as of `Worker`.
        folders: that every node has to see beside the photographs.
        say: shows the user a line.
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
        self._settings = settings
        self._workers = workers
        self._worker = (make_extractor, provenance)
        self._folders = folders
        self._say = say
        self._cluster: Cluster | None = None

    def __enter__(self) -> OnRay:
        if self._settings.address is not None:  # what the cluster has is to be known at once
            # Or Ray prints as an error that actors can be restarted.
            os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
            self._join()
        return self

    def __exit__(self, *error: object) -> None:
        if self._cluster is not None:
            connection.disconnect()

    @property
    def device(self) -> str:
        """Where the actors compute: "cuda" or "cpu"."""
        return "cuda" if (self._cluster or this_machine()).gpus else "cpu"

    def __call__(self, batches: Sequence[Batch]) -> Iterator[Made]:
        """Gives each batch, packed, as soon as it is done, in whatever order.

        Raises:
            CpfeanError: what a worker tells of, or what is wrong with the cluster.
        """
        import ray.data
        from ray.exceptions import RayError, RayTaskError

        cluster = self._cluster or self._join()
        workers, options = self._demand(cluster)
        if not cluster.is_local:
            check_nodes([batches[0].paths[0], batches[-1].paths[-1], *self._folders])
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = context.print_on_execution_start = False
        logging.getLogger("ray.data").setLevel(logging.ERROR)  # told by who takes the results
        # Left to itself Ray restarts actors without end, one that needs too much memory too.
        warnings.filterwarnings("ignore", "`ray_remote_args` is deprecated")
        readers = max(1, min(READERS, cluster.cpus // workers)) if self.device == "cuda" else 1
        rows = [{"batch": sent(batch)} for batch in batches]
        results = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
            Worker,
            fn_constructor_args=self._worker,
            fn_constructor_kwargs={"device": self.device, "readers": readers},
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(size=min(workers, len(rows))),
            **options,
        )
        by_number = {batch.number: batch for batch in batches}
        try:  # a block is a batch, and is here as soon as it is done
            for block in results.iter_batches(batch_size=None, prefetch_batches=0):
                columns = (block[name] for name in ("number", "content", "error"))
                for number, content, error in zip(*columns, strict=True):
                    if error:
                        raise received(error)
                    yield by_number[number], content
        except RayTaskError:  # a defect of ours, with its traceback
            raise
        except RayError as lost:
            told = f"a worker or the cluster is lost: {message_of(lost)}"
            raise ServiceError(f"{told} The same command again goes on.") from lost

    def _demand(self, cluster: Cluster) -> tuple[int, dict[str, int]]:
        """How many actors there are to be, and what each asks of Ray."""
        each, there = ("gpu", cluster.gpus) if cluster.gpus else ("cpu", cluster.cpus)
        workers = self._workers or there
        allocate(cluster, workers=workers, trials=1)  # refuses what can never be
        where = self._settings.address or "this machine"
        self._say(f"{workers} worker(s) of 1 {each.upper()} start on {where}: it takes a while.")
        times = 0 if cluster.is_local else _RESTARTS
        return workers, {f"num_{each}s": 1, "max_restarts": times, "max_task_retries": times}

    def _join(self) -> Cluster:
        cluster = connection.connect(self._settings)
        if not cluster.is_local:  # it may be growing
            now = functools.partial(cluster_now, is_local=False)
            cluster = workers_awaited(cluster, say=self._say, now=now)
        self._cluster = cluster
        return cluster


def check_nodes(paths: Sequence[str], nodes: Nodes | None = None) -> None:
    """Raises ServiceError if a node has other versions, or does not see a path."""
    nodes = nodes or RayNodes()
    if drift := among_nodes(ask_nodes(None, nodes=nodes), allowed=True):
        raise ServiceError(
            f"nodes have other versions than this one: {drift}. `ray up` again installs the same."
        )
    local = sorted({path for path in paths if "://" not in path})

    def look() -> dict[str, str]:
        return {path: "" for path in local if not os.path.exists(path)}

    answers = nodes.ask(nodes.living(), look)
    lacking = {host: ", ".join(there) for host, there in answers.items() if isinstance(there, dict)}
    if told := "\n".join(f"  {host}: {paths}" for host, paths in lacking.items() if paths):
        raise ServiceError(
            f"nodes do not see what they are to work on:\n{told}\nPut it on s3:// or a disk that "
            "all have under the same path, or work here: --in-process."
        )
