"""What the trials of a study ask for, beside what a cluster has and may come to have.

Workers of a trial may be on different nodes, one worker may not. What nobody but people can know:
whether somebody is about to start another host by hand.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cpfean import commands


@dataclass(frozen=True, kw_only=True, slots=True)
class Node:
    """What one node has, in use or not."""

    cpus: int
    gpus: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Room:
    """One trial, and the cluster.

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
    def places(self) -> int:
        """Workers that there is room for when nothing else runs."""
        return places(self.nodes, cpus=self.cpus, use_gpu=self.use_gpu)

    @property
    def never_fits(self) -> bool:
        """Whether the trial can wait for ever."""
        return self.grows is False and self.places < self.workers

    def __str__(self) -> str:
        each = f"{self.cpus} CPU(s) and 1 GPU" if self.use_gpu else f"{self.cpus} CPU(s)"
        cpus, gpus = sum(n.cpus for n in self.nodes), sum(n.gpus for n in self.nodes)
        text = (
            f"asked for: {self.workers} worker(s) of {each}; there is: {len(self.nodes)} node(s) "
            f"with {cpus} CPUs and {gpus} GPUs, room for {self.places}"
        )
        if self.places >= self.workers:
            return text + " if nothing else runs"
        if self.grows is None:
            status = commands.cluster_status()
            return text + f"; whether the cluster grows is not known here, see {status}"
        return text + ("; it is growing" if self.grows else ", and the cluster does not grow to it")


def places(nodes: Sequence[Node], *, cpus: int, use_gpu: bool) -> int:
    """Workers of that size that fit on empty nodes."""
    return sum(
        min(node.cpus // cpus, node.gpus) if use_gpu else node.cpus // cpus for node in nodes
    )
