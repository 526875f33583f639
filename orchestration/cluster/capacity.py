"""What the trials of a study demand, beside what a cluster has and may come to have.

The workers of a trial may be on different nodes, one worker is on one. Only people know whether
somebody is about to start another host by hand.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cpfean import commands
from cpfean.errors import ServiceError
from cpfean.threads import usable_cpus


@dataclass(frozen=True, kw_only=True, slots=True)
class Node:
    """What one node has, in use or not."""

    cpus: int
    gpus: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Demand:
    """What one trial demands, beside what the cluster has.

    Attributes:
        workers, cpus, use_gpu: of the trial: so many, with so many CPUs each, and a GPU each.
        nodes: that live now.
        grows: whether the cluster adds nodes by itself until the trial fits; None: not known.
    """

    workers: int
    cpus: int
    use_gpu: bool
    nodes: Sequence[Node]
    grows: bool | None = None

    @property
    def workers_that_fit(self) -> int:
        """Workers that there is room for when nothing else runs."""
        return workers_that_fit(self.nodes, cpus=self.cpus, use_gpu=self.use_gpu)

    @property
    def never_fits(self) -> bool:
        """Whether the trial can wait for ever."""
        return self.grows is False and self.workers_that_fit < self.workers

    def __str__(self) -> str:
        each = f"{self.cpus} CPU(s) and 1 GPU" if self.use_gpu else f"{self.cpus} CPU(s)"
        cpus, gpus = sum(n.cpus for n in self.nodes), sum(n.gpus for n in self.nodes)
        text = (
            f"asked for: {self.workers} worker(s) of {each}; there is: {len(self.nodes)} node(s) "
            f"with {cpus} CPUs and {gpus} GPUs, room for {self.workers_that_fit}"
        )
        if self.workers_that_fit >= self.workers:
            return text + " if nothing else runs"
        if self.grows is None:
            status = commands.cluster_status()
            return text + f"; whether the cluster grows is not known here, see {status}"
        return text + ("; it is growing" if self.grows else ", and the cluster does not grow to it")


def workers_that_fit(nodes: Sequence[Node], *, cpus: int, use_gpu: bool) -> int:
    """Workers of that size that fit on empty nodes."""
    return sum(
        min(node.cpus // cpus, node.gpus) if use_gpu else node.cpus // cpus for node in nodes
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Cluster:
    """What there is to run on.

    Attributes:
        is_local: Ray was started by this process, on this machine.
        nodes: that live now; without them all is taken to be one node.
    """

    cpus: int
    gpus: int
    is_local: bool
    nodes: tuple[Node, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Resources:
    """What the trials take: so many workers each, with CPUs and perhaps a GPU each.

    Attributes:
        concurrent: trials at a time. Tune does not count the workers of a trial: without this
            limit trials hold each other up for ever.
        min_workers: with which a trial may go on; 0: no fewer than `workers`.
    """

    workers: int
    cpus: int
    use_gpu: bool
    concurrent: int
    min_workers: int = 0


def this_machine() -> Cluster:
    """What Ray would find here, without starting it."""
    import torch

    cpus, gpus = usable_cpus(), torch.cuda.device_count()
    return Cluster(cpus=cpus, gpus=gpus, is_local=True, nodes=(Node(cpus=cpus, gpus=gpus),))


def allocate(cluster: Cluster, *, workers: int, trials: int, min_workers: int = 0) -> Resources:
    """How many trials run at a time, and the CPUs and GPUs of each of their workers.

    Raises:
        ServiceError: one trial alone asks for more than there is.
    """
    use_gpu = cluster.gpus > 0
    there, what = (cluster.gpus, "GPUs") if use_gpu else (cluster.cpus, "CPUs")
    if workers > there and cluster.is_local:
        raise ServiceError(
            f"{workers} workers need {workers} {what} and this machine has {there}; lower "
            "--workers or give a cluster with --address."
        )
    # A cluster may grow to what a first trial waits for; one trial at a time is always right.
    concurrent = max(1, min(trials, there // workers))
    cpus = max(1, cluster.cpus // (workers * concurrent))
    if not cluster.is_local:
        cpus = min(cpus, 8)  # the nodes that join later may be smaller
    # A worker is on one node: what all nodes have together is no measure of it.
    fitting = min(workers * concurrent, workers_that_fit(cluster.nodes, cpus=1, use_gpu=use_gpu))
    while cpus > 1 and workers_that_fit(cluster.nodes, cpus=cpus, use_gpu=use_gpu) < fitting:
        cpus -= 1
    return Resources(
        workers=workers, cpus=cpus, use_gpu=use_gpu, concurrent=concurrent, min_workers=min_workers
    )
