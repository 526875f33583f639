"""Extraction on Ray Data: batches of photographs stream through a pool of actors, to this process.

The actors compute what `cpfean.extraction.in_process` computes, with one torch thread each; this
process alone writes. Nothing but names goes out and nothing but packed batches comes back, so every
node has to see the photographs, and models that are folders.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import torch

from cpfean import errors
from cpfean.errors import CpfeanError, ServiceError
from cpfean.extraction.batches import Batch, Extractor, extract_batch, packed
from cpfean.extraction.in_process import READERS, Made
from cpfean.extraction.plan import differences
from orchestration.cluster.capacity import Cluster, allocate, this_machine
from orchestration.settings import Settings

Make = Callable[[torch.device], Extractor]


class OnRay:
    """Runs batches on a cluster that is joined, or on this machine, where Ray is started for them.

    Args:
        settings: with the address of a cluster, or without.
        workers: actors, of one GPU each or of one CPU where there is none; None: all that fit.
        make_extractor: makes the extractor of an actor, on its node.
        provenance: what every extractor has to tell of itself.
        folders: that every node has to see beside the photographs.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        workers: int | None,
        make_extractor: Make,
        provenance: Mapping[str, Any],
        folders: Sequence[str] = (),
        say: Callable[[str], None] = print,
    ) -> None:
        self._settings = settings
        self._workers = workers
        self._make = make_extractor
        self._provenance = provenance
        self._folders = folders
        self._say = say
        self._cluster: Cluster | None = None

    def __enter__(self) -> OnRay:
        if self._settings.address is not None:  # what the cluster has is to be known at once
            self._join()
        return self

    def __exit__(self, *error: object) -> None:
        if self._cluster is not None:
            from orchestration.cluster import connection

            connection.disconnect()

    @property
    def device(self) -> str:
        """Where the actors compute: "cuda" or "cpu"."""
        there = self._cluster or this_machine()
        return "cuda" if there.gpus else "cpu"

    def __call__(self, batches: Sequence[Batch]) -> Iterator[Made]:
        """Gives each batch, packed, as soon as it is done, in whatever order.

        Raises:
            CpfeanError: as `extract_batch`; more workers than there is room for, nodes that do not
                see what they need or have other versions, or a cluster that is lost.
        """
        import pyarrow
        import ray.data

        cluster = self._cluster or self._join()
        use_gpu = cluster.gpus > 0
        workers = self._workers or (cluster.gpus if use_gpu else cluster.cpus)
        allocate(cluster, workers=workers, trials=1)  # refuses what can never be
        if not cluster.is_local:
            _check_nodes([batches[0].paths[0], batches[-1].paths[-1], *self._folders])
        workers = min(workers, len(batches))
        readers = max(1, min(READERS, cluster.cpus // workers)) if use_gpu else 1
        _quieten()
        device = "GPU" if use_gpu else "CPU"
        where = "this machine" if cluster.is_local else f"the cluster at {self._settings.address}"
        self._say(f"{workers} worker(s) of 1 {device} on {where} start, which takes a while.")
        rows = [{"batch": json.dumps(asdict(batch))} for batch in batches]
        results = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
            _Actor,
            fn_constructor_args=[self._make, self._provenance, use_gpu, readers],
            batch_size=1,
            batch_format="pyarrow",
            compute=ray.data.ActorPoolStrategy(size=workers),
            **({"num_gpus": 1} if use_gpu else {"num_cpus": 1}),
        )
        by_number = {batch.number: batch for batch in batches}
        try:
            for table in results.iter_batches(
                batch_size=None, batch_format="pyarrow", prefetch_batches=0
            ):
                assert isinstance(table, pyarrow.Table)
                for row in table.to_pylist():
                    if row["error"] is not None:
                        raise _error(row["error"])
                    yield by_number[row["number"]], row["content"]
        except ray.exceptions.RayError as error:
            if isinstance(error, ray.exceptions.RayTaskError):
                raise
            raise ServiceError(
                f"Ray has lost what it needs: {errors.message_of(error)} What is done is kept: the "
                "same command again goes on."
            ) from error

    def _join(self) -> Cluster:
        from orchestration.cluster import connection

        self._cluster = connection.connect(self._settings)
        return self._cluster


class _Actor:
    """Looks at batches, with an extractor of its own; errors of ours come back as rows."""

    def __init__(
        self, make: Make, provenance: Mapping[str, Any], use_gpu: bool, readers: int
    ) -> None:
        torch.set_num_threads(1)
        self._readers = readers
        self._failure: CpfeanError | None = None
        try:
            self._extractor = make(torch.device("cuda" if use_gpu else "cpu"))
            found = differences(provenance, json.loads(json.dumps(self._extractor.provenance())))
            if found:
                host = os.uname().nodename
                raise ServiceError(
                    f"{host} has another extractor than this machine: {'; '.join(found)}. Give all "
                    "nodes the same models and versions."
                )
        except CpfeanError as error:
            self._failure = error

    def __call__(self, rows: Any) -> Any:
        import pyarrow

        plain = json.loads(rows["batch"][0].as_py())
        batch = Batch(**plain | {"paths": tuple(plain["paths"])})
        content, failure = None, self._failure
        if failure is None:
            try:
                content = packed(extract_batch(self._extractor, batch, readers=self._readers))
            except CpfeanError as error:
                failure = error
        told = None if failure is None else json.dumps([type(failure).__name__, str(failure)])
        return pyarrow.table(
            {
                "number": pyarrow.array(np.array([batch.number])),
                "content": pyarrow.array([content], pyarrow.large_binary()),
                "error": pyarrow.array([told], pyarrow.string()),
            }
        )


def _check_nodes(paths: Sequence[str]) -> None:
    """Raises ServiceError if a node has other versions, or does not see a path."""
    from orchestration.cluster.versions import RayNodes, among_nodes, ask_nodes

    if drift := among_nodes(ask_nodes(None), allowed=True):
        raise ServiceError(
            f"nodes of the cluster have other versions than this one: {drift}. `ray up` again "
            "installs the same on all nodes."
        )
    local = sorted({path for path in paths if "://" not in path})

    def look() -> dict[str, str]:
        return {path: "absent" for path in local if not os.path.exists(path)}

    nodes = RayNodes()
    absent = [
        f"{host}: {answer if isinstance(answer, str) else ', '.join(sorted(answer))}"
        for host, answer in nodes.ask(nodes.living(), look).items()
        if answer
    ]
    if absent:
        raise ServiceError(
            "nodes of the cluster do not see what they are to work on:\n"
            + "\n".join(f"  {line}" for line in absent)
            + "\nPut it on s3:// or on a disk that all of them have under the same path, or work "
            "on this machine alone: --address local, or --in-process."
        )


def _error(told: str) -> CpfeanError:
    """An error of ours, as an actor has told it."""
    name, message = json.loads(told)
    kind = getattr(errors, name, ServiceError)
    error: CpfeanError = kind(message)
    return error


def _quieten() -> None:
    """Progress is told by whoever takes the results."""
    import ray.data

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
