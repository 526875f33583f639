"""The runner on Ray, where it can be seen without one: heads that go, nodes that differ or come."""

import socket
import threading
from pathlib import Path
from typing import Any

import pytest

from cpfean.errors import ServiceError
from orchestration.cluster.capacity import Cluster, Node
from orchestration.runners.on_ray import OnRay, workers_awaited
from orchestration.study.stopping import Deadlines
from orchestration.versions import versions
from tests.orchestration.study.scripted import Driven, on_disk


@pytest.mark.parametrize("tune_ends", [True, False])
def test_a_head_that_is_lost_is_seen_and_ends_the_study(tmp_path: Path, tune_ends: bool) -> None:
    has_left = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as head:
        address = f"127.0.0.1:{head.getsockname()[1]}"
        driven = Driven(tmp_path, address=address, deadlines=Deadlines(ended=0.01))
        runner = OnRay(driven.settings, look_seconds=0.01)
        driven.begin()
        watch = threading.Thread(target=runner.watch_head, args=(driven, has_left))
        watch.start()
        for _ in range(3):
            head.accept()[0].close()
        assert watch.is_alive()
        assert not driven.stop.is_asked
        if tune_ends:
            driven.stop.deadlines = Deadlines(ended=60.0)
    if tune_ends:
        while not driven.stop.is_asked:
            has_left.wait(0.01)
        has_left.set()
    watch.join(timeout=60)
    assert not watch.is_alive()
    assert isinstance(driven.stop.error, ServiceError)
    for words in (address, "run_ablations.py --resume --name s"):
        assert words in str(driven.stop.error)
    assert [r.state for r in on_disk(tmp_path)] == ["running" if tune_ends else "interrupted"]
    assert driven.codes == ([] if tune_ends else [5])
    assert (str(driven.stop.error) in driven.said) != tune_ends


@pytest.mark.parametrize(
    ("answer", "drift"),
    [
        (versions() | {"torch": "1.0"}, f"three: torch 1.0 there, {versions()['torch']} here"),
        ("no module", "three does not tell its versions: no module"),
    ],
)
@pytest.mark.parametrize("allowed", [False, True])
def test_nodes_that_come_later_with_other_versions_are_refused_unless_allowed(
    tmp_path: Path, allowed: bool, answer: Any, drift: str
) -> None:
    nodes: dict[str, Any] = {"one": versions(), "two": versions()}

    def ask(storage: object, *, known: set[str]) -> dict[str, Any]:
        return {host: answer for host, answer in nodes.items() if host not in known}

    driven = Driven(tmp_path, trials=3, allow_drift=allowed)
    runner = OnRay(driven.settings, ask=ask)
    runner.look_at_nodes(driven)
    driven.begin()
    nodes["three"] = answer
    if not allowed:
        with pytest.raises(ServiceError, match="other versions") as refused:
            runner.look_at_nodes(driven)
        assert drift in str(refused.value)
        return
    runner.look_at_nodes(driven)
    runner.look_at_nodes(driven)  # it has been asked
    assert driven.said == [f"versions differ, which is allowed: {drift}"]
    driven.begin()
    assert [record.drift for record in on_disk(tmp_path)] == ["", drift]


def test_a_study_waits_for_the_workers_that_a_cluster_is_to_have() -> None:
    head, worker = Node(cpus=4, gpus=0), Node(cpus=4, gpus=1)
    said: list[str] = []

    def missing(there: int) -> str:
        return f"{there} of 2 worker(s) have joined" if there < 2 else ""

    def cluster(*nodes: Node) -> Cluster:
        gpus = sum(node.gpus for node in nodes)
        return Cluster(cpus=8, gpus=gpus, is_local=False, nodes=nodes)

    coming = [cluster(head, worker), cluster(head, worker, worker)]
    came = workers_awaited(
        cluster(head), say=said.append, now=lambda: coming.pop(0), missing=missing, pause=0.0
    )
    assert came.gpus == 2
    assert said == ["0 of 2 worker(s) have joined: waiting for the others, ten minutes at most."]

    alone = workers_awaited(
        cluster(head),
        say=said.append,
        now=lambda: cluster(head),
        missing=missing,
        pause=0.0,
        seconds=0.01,
    )
    assert alone.gpus == 0
    assert said[-1] == "0 of 2 worker(s) have joined: starting with what is there."
