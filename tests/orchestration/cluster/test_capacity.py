"""What trials are given of a cluster, and whether what they demand is there."""

import pytest

from cpfean.errors import ServiceError
from orchestration.cluster.capacity import Cluster, Demand, Node, allocate, workers_that_fit


@pytest.mark.parametrize(
    ("cpus", "gpus", "workers", "trials", "concurrent", "cpus_each"),
    [
        (2, 0, 1, 6, 2, 1),
        (2, 0, 2, 6, 1, 1),
        (16, 0, 2, 3, 3, 2),
        (16, 4, 2, 6, 2, 4),
        (16, 0, 1, 1, 1, 16),
    ],
)
def test_trials_at_a_time_never_need_more_than_there_is(
    cpus: int, gpus: int, workers: int, trials: int, concurrent: int, cpus_each: int
) -> None:
    cluster = Cluster(cpus=cpus, gpus=gpus, is_local=True)
    given = allocate(cluster, workers=workers, trials=trials)
    assert (given.concurrent, given.cpus, given.use_gpu) == (concurrent, cpus_each, gpus > 0)
    assert given.concurrent * given.workers * given.cpus <= cpus


@pytest.mark.parametrize(
    ("nodes", "workers", "trials", "concurrent", "cpus_each"),
    [
        # The head of cluster.yaml and its first worker: eight CPUs, of which no node has more
        # than four.
        ([Node(cpus=4, gpus=0), Node(cpus=4, gpus=1)], 1, 6, 1, 4),
        ([Node(cpus=4, gpus=0)] * 4, 1, 1, 1, 4),
        ([Node(cpus=0, gpus=0), Node(cpus=2, gpus=0), Node(cpus=2, gpus=0)], 2, 1, 1, 2),
        ([Node(cpus=3, gpus=0), Node(cpus=3, gpus=0)], 4, 1, 1, 1),
        ([Node(cpus=16, gpus=2), Node(cpus=2, gpus=2)], 4, 1, 1, 1),
        ([Node(cpus=4, gpus=0)], 8, 1, 1, 1),  # to grow, or to be told that it does not
    ],
)
def test_a_worker_asks_for_no_more_than_fits_on_a_node(
    nodes: list[Node], workers: int, trials: int, concurrent: int, cpus_each: int
) -> None:
    cluster = Cluster(
        cpus=sum(node.cpus for node in nodes),
        gpus=sum(node.gpus for node in nodes),
        is_local=False,
        nodes=tuple(nodes),
    )
    given = allocate(cluster, workers=workers, trials=trials)
    assert (given.concurrent, given.cpus) == (concurrent, cpus_each)
    there = workers_that_fit(nodes, cpus=1, use_gpu=given.use_gpu)
    fit = workers_that_fit(nodes, cpus=given.cpus, use_gpu=given.use_gpu)
    assert fit >= min(there, given.concurrent * given.workers)


@pytest.mark.parametrize(
    ("grows", "said"),
    [(None, "not known here"), (True, "it is growing"), (False, "does not grow to it")],
)
def test_a_demand_says_what_is_asked_for_what_there_is_and_what_may_come(
    grows: bool | None, said: str
) -> None:
    nodes = [Node(cpus=4, gpus=0), Node(cpus=4, gpus=1)]
    demand = Demand(workers=4, cpus=2, use_gpu=True, nodes=nodes, grows=grows)
    assert "4 worker(s) of 2 CPU(s) and 1 GPU" in str(demand)
    assert "2 node(s) with 8 CPUs and 1 GPUs, room for 1" in str(demand)
    assert said in str(demand)
    assert demand.never_fits == (grows is False)
    fits = Demand(workers=1, cpus=2, use_gpu=True, nodes=nodes, grows=grows)
    assert not fits.never_fits
    assert "if nothing else runs" in str(fits)


def test_more_workers_than_this_machine_has_are_refused_with_the_numbers() -> None:
    with pytest.raises(ServiceError, match="4 workers need 4 CPUs and this machine has 2"):
        allocate(Cluster(cpus=2, gpus=0, is_local=True), workers=4, trials=1)
