"""Trials whose hosts are taken away, with and without notice, on a cluster of several raylets."""

import re
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from orchestration.cluster import connection
from orchestration.cluster.capacity import Resources
from orchestration.runners import tuner
from orchestration.settings import ENVIRONMENT, Settings
from orchestration.study.records import TrialRecord
from tests.orchestration.samples import TINY

pytestmark = [pytest.mark.slow, pytest.mark.drill, pytest.mark.timeout(900)]

# An epoch of some seconds: long enough to be told in the middle of one.
CONFIG = TINY.with_overrides(
    {"model.dim": 64, "data.synthetic.train_images": 1600, "optim.epochs": 3}
)
PREEMPTED = 2  # DRAIN_NODE_REASON_PREEMPTION


class Hosts:
    """A head without CPUs, and hosts of one CPU each that come and go."""

    def __init__(self) -> None:
        from ray.cluster_utils import Cluster

        self.cluster = Cluster(
            initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False}
        )
        self.by_id: dict[str, Any] = {}

    def add(self) -> None:
        node = self.cluster.add_node(num_cpus=1, object_store_memory=100 * 2**20)
        self.by_id[node.node_id] = node

    def of_workers(self) -> list[str]:
        """Ids of the hosts that workers are on."""
        from ray.util import placement_group_table

        groups = [g for g in placement_group_table().values() if g["state"] == "CREATED"]
        placed = {host for group in groups for host in group["bundles_to_node_id"].values()}
        return sorted(placed & self.by_id.keys())

    def notify(self, host: str, *, seconds: float) -> None:
        """Word that a host will be taken away in so many seconds."""
        from ray._raylet import GcsClient

        deadline = int((time.time() + seconds) * 1000)
        taken = GcsClient(address=self.cluster.address).drain_node(
            host, PREEMPTED, "spot", deadline
        )
        assert taken[0], taken

    def remove(self, host: str) -> None:
        """Its power is cut."""
        self.cluster.remove_node(self.by_id.pop(host), allow_graceful=False)


@pytest.fixture
def hosts(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hosts]:
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S", "0.5")
    hosts = Hosts()
    yield hosts
    connection.disconnect()
    hosts.cluster.shutdown()


class Script:
    """Hooks that do something to the hosts once a trial has come to the end of its first epoch."""

    def __init__(self, deeds: dict[int, Callable[[], None]], *, trials: int) -> None:
        self.deeds = deeds
        self.records = [
            TrialRecord(number=number, name=f"t{number}", config=CONFIG.to_dict())
            for number in range(trials)
        ]
        self.waiting = list(self.records)
        self.outcomes: list[str] = []
        self.notes: dict[int, list[str]] = {number: [] for number in range(trials)}

    def next_trial(self) -> TrialRecord | None:
        return self.waiting.pop(0) if self.waiting else None

    def started(self, number: int) -> None: ...

    def begun(self, number: int, crew: str) -> None: ...

    def reported(self, number: int, metrics: dict[str, Any]) -> None:
        self.records[number].history = metrics["history"]
        if metrics["epoch"] == 1 and number in self.deeds:
            self.deeds.pop(number)()

    def ended(self, number: int, *, pruned: bool) -> None:
        self.outcomes.append("finished")

    def failed(self, number: int, failure: str, message: str) -> None:
        self.outcomes.append(f"{failure}: {message}")

    def lost(self, number: int, message: str) -> None:
        raise AssertionError(message)

    def noted(self, number: int, line: str) -> None:
        self.notes[number].append(line)

    def tick(self) -> None: ...

    def run(self, where: Settings, *, name: str, workers: int, min_workers: int) -> None:
        tuner.run_trials(
            self,
            num_trials=len(self.records),
            resources=Resources(
                workers=workers, min_workers=min_workers, cpus=1, use_gpu=False, concurrent=1
            ),
            settings=where,
            run_name=name,
            train_storage=str(where.output / "train"),
            tune_storage=str(where.output / "tune"),
            test=False,
            early_stopping=None,
            past=[],
        )


def test_notice_moves_a_trial_in_mid_epoch_and_a_lost_host_leaves_fewer_workers(
    tmp_path: Path, hosts: Hosts
) -> None:
    for _ in range(2):
        hosts.add()
    where = Settings(
        output=tmp_path,
        cache_dir=tmp_path / "cache",
        tracking_uri="",
        address=hosts.cluster.address,
        silence=60,
    )
    connection.connect(where)

    def notify_in_time() -> None:
        (host,) = hosts.of_workers()
        # Not before the next epoch has begun: then it would be told to stop between two.
        threading.Timer(1.0, hosts.notify, (host,), {"seconds": 120}).start()

    def notify_too_late() -> None:
        hosts.add()
        (host,) = hosts.of_workers()
        hosts.notify(host, seconds=-1)

    # The same training three times: left alone, with notice, and with notice that is too late.
    script = Script({1: notify_in_time, 2: notify_too_late}, trials=3)
    script.run(where, name="s", workers=1, min_workers=1)
    assert script.outcomes == ["finished"] * 3
    assert script.notes[0] == []
    (note,) = script.notes[1]
    assert re.fullmatch(
        r"preempted: told to stop, saved at step [1-9]\d* of epoch [23]\. It goes on there\.", note
    )
    (note,) = script.notes[2]
    assert note.startswith("preempted")
    alone, moved, late = (
        [(row["epoch"], row["train/loss"], row["val/rsum"]) for row in record.history]
        for record in script.records
    )
    assert len(alone) == CONFIG.optim.epochs
    assert moved == late == alone

    hosts.add()

    def cut_power() -> None:
        hosts.remove(hosts.of_workers()[0])

    # The first trial takes what is known of hosts by then, the second all that there are.
    script = Script({1: cut_power}, trials=2)
    script.run(where, name="e", workers=2, min_workers=1)
    assert script.outcomes == ["finished"] * 2
    lost, fewer = script.notes[1][-2:]
    assert re.fullmatch(
        r"worker lost.*, fenced; retry 1/3 from epoch 1\.|preempted; goes on from epoch 1\.", lost
    )
    assert fewer == "trained by 1 of 2 workers; the batch is the same."
    history = script.records[1].history
    assert [(row["epoch"], row["train/workers"]) for row in history] == [(1, 2), (2, 1), (3, 1)]
