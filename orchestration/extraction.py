"""Extraction on Ray Data: batches of photographs stream through a pool of actors, to this process.

This process alone writes. Names go out and packed batches come back, so every node has to see the
photographs, and models that are folders.
"""

from __future__ import annotations

import logging
import os
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
_COLUMNS = ("number", "content", "error")  # of what a worker gives


class OnRay:
    """Runs batches on a cluster that is joined, or on this machine, where Ray is started for them.

    Args:
        settings: with the address of a cluster, or without.
        workers: actors, of one GPU each or of one CPU where there is none; None: all that fit.
        make_extractor: makes the extractor of an actor, on its node.
        provenance: what every extractor has to tell of itself.
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
        self._extractor = (make_extractor, provenance)
        self._folders = folders
        self._say = say
        self._cluster: Cluster | None = None

    def __enter__(self) -> OnRay:
        if self._settings.address is not None:
            # That actors can be restarted is no error to be printed among the progress.
            os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
            self._join()  # what the cluster has is to be known at once
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
            CpfeanError: as `extract_batch`; more workers than there is room for, nodes that do not
                see what they need or have other versions, or a cluster that is lost.
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
        readers = max(1, min(READERS, cluster.cpus // workers)) if self.device == "cuda" else 1
        rows = [{"batch": sent(batch)} for batch in batches]
        results = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
            Worker,
            fn_constructor_args=self._extractor,
            fn_constructor_kwargs={"device": self.device, "readers": readers},
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(size=min(workers, len(rows))),
            **options,
        )
        by_number = {batch.number: batch for batch in batches}
        try:
            # A block is a batch, and is here as soon as it is done.
            for block in results.iter_batches(batch_size=None, prefetch_batches=0):
                for number, content, error in zip(*map(block.get, _COLUMNS), strict=True):
                    if error:
                        raise received(error)
                    yield by_number[number], content
        except RayTaskError:  # a defect of ours, with its traceback
            raise
        except RayError as lost:
            raise ServiceError(
                f"a worker or the cluster is lost: {message_of(lost)} What is done is kept: the "
                "same command again goes on."
            ) from lost

    def _demand(self, cluster: Cluster) -> tuple[int, dict[str, Any]]:
        """How many actors there are to be, and what each asks of Ray."""
        use_gpu = self.device == "cuda"
        workers = self._workers or (cluster.gpus if use_gpu else cluster.cpus)
        allocate(cluster, workers=workers, trials=1)  # refuses what can never be
        where, each = self._settings.address or "this machine", "GPU" if use_gpu else "CPU"
        self._say(f"{workers} worker(s) of 1 {each} start on {where}, which takes a while.")
        # What ended an actor on this machine, such as a lack of memory, would end it again.
        times = 0 if cluster.is_local else _RESTARTS
        again = {"max_restarts": times, "max_task_retries": times}
        return workers, {f"num_{each.lower()}s": 1, "ray_remote_args_fn": lambda: again}

    def _join(self) -> Cluster:
        cluster = connection.connect(self._settings)
        if not cluster.is_local:
            cluster = workers_awaited(
                cluster, say=self._say, now=lambda: cluster_now(is_local=False)
            )
        self._cluster = cluster
        return cluster


def check_nodes(paths: Sequence[str], nodes: Nodes | None = None) -> None:
    """Raises ServiceError if a node of the cluster has other versions, or does not see a path."""
    nodes = nodes or RayNodes()
    if drift := among_nodes(ask_nodes(None, nodes=nodes), allowed=True):
        raise ServiceError(
            f"nodes have other versions than this one: {drift}. `ray up` again installs the same."
        )
    local = sorted({path for path in paths if "://" not in path})
    answers = nodes.ask(
        nodes.living(), lambda: {path: "" for path in local if not os.path.exists(path)}
    )
    lacking = [
        f"  {host}: {answer if isinstance(answer, str) else ', '.join(answer)}"
        for host, answer in answers.items()
        if answer
    ]
    if lacking:
        raise ServiceError(
            "nodes of the cluster do not see what they are to work on:\n"
            + "\n".join(lacking)
            + "\nPut it on s3:// or on a disk that all of them have under the same path, or work "
            "on this machine alone: --address local, or --in-process."
        )
