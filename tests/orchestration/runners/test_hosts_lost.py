"""Trials whose hosts are taken away, with and without notice, on a cluster of several raylets."""

import re
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from orchestration.cluster import connection
from orchestration.settings import ENVIRONMENT, Settings
from tests.orchestration.runners.by_hand import ByHand
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


class Script(ByHand):
    """Does something to the hosts once a trial has come to the end of its first epoch."""

    def __init__(
        self, folder: Path, deeds: dict[int, Callable[[], None]], *, trials: int, name: str
    ) -> None:
        super().__init__(folder, [CONFIG] * trials, name=name)
        self.deeds = deeds
        self.sizes: dict[int, list[int]] = {number: [] for number in range(trials)}

    def begun(self, number: int, workers: int) -> None:
        self.sizes[number].append(workers)

    def after_epoch(self, number: int, epoch: int) -> None:
        if epoch == 1 and number in self.deeds:
            self.deeds.pop(number)()


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
    script = Script(tmp_path, {1: notify_in_time, 2: notify_too_late}, trials=3, name="s")
    script.run(cache_dir=where.cache_dir, is_local=False, silence=60)
    assert [outcome for _, outcome in script.outcomes] == ["finished"] * 3
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
    script = Script(tmp_path, {1: cut_power}, trials=2, name="e")
    script.run(cache_dir=where.cache_dir, is_local=False, silence=60, workers=2)
    assert [outcome for _, outcome in script.outcomes] == ["finished"] * 2
    lost = script.notes[1][-1]
    assert re.fullmatch(
        r"worker lost.*, fenced; retry 1/3 from epoch 1\.|preempted; goes on from epoch 1\.", lost
    )
    assert script.sizes[1] == [2, 1]
    history = script.records[1].history
    assert [(row["epoch"], row["train/workers"]) for row in history] == [(1, 2), (2, 1), (3, 1)]
