"""Studies on a Ray that is not theirs: many in a row, a head that is lost, a node that is lost."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from cpfean.records.run_folder import RunFolder
from orchestration.settings import ENVIRONMENT
from tests.orchestration.runners.test_sweep import (
    LONGER,
    SHORT,
    Driver,
    check_the_three_records_agree,
)

pytestmark = [pytest.mark.slow, pytest.mark.drill, pytest.mark.timeout(3600)]

SWEEPS = 20
OPEN = {"RAY_AUTH_MODE": "disabled"}  # whatever token this user may have


@contextmanager
def head(*, cpus: int) -> Iterator["Head"]:
    """`ray start --head`, and its end."""
    # Ray's sockets want a short path.
    folder = Path(tempfile.mkdtemp(prefix="r-", dir="/tmp"))
    started = Head(folder, cpus=cpus)
    try:
        yield started
    finally:
        started.cut_power()
        shutil.rmtree(folder, ignore_errors=True)


class Head:
    """The processes of one Ray."""

    def __init__(self, folder: Path, *, cpus: int) -> None:
        port, dashboard = free_ports(2)
        self.address = f"127.0.0.1:{port}"
        self._folder = folder
        words = ["start", "--head", "--block", "--node-ip-address=127.0.0.1", f"--port={port}"]
        words += [f"--dashboard-port={dashboard}", f"--num-cpus={cpus}", f"--temp-dir={folder}"]
        words += [f"--object-store-memory={150 * 2**20}"]
        with (folder / "log").open("wb") as log:
            self._process = subprocess.Popen(
                [str(Path(sys.executable).with_name("ray")), *words],
                env=os.environ | ENVIRONMENT | OPEN | {"RAY_TMPDIR": str(folder)},
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        end = time.monotonic() + 120
        while "Ray runtime started" not in (folder / "log").read_text():
            assert self._process.poll() is None, (folder / "log").read_text()
            assert time.monotonic() < end, (folder / "log").read_text()
            time.sleep(0.2)

    def cut_power(self) -> None:
        """Kills all of its processes at once."""
        for process in self._processes():
            os.kill(process, signal.SIGKILL)
        self._process.wait()

    def _processes(self) -> list[int]:
        """Those that it has started: its session, and what names its folder."""
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                process = int(folder.name)
                named = str(self._folder).encode() in (folder / "cmdline").read_bytes()
                if named or os.getsid(process) == self._process.pid:
                    found.append(process)
            except OSError:
                continue  # it has ended in the meantime
        return found


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()


def new_driver(home: Path, address: str, **more) -> Driver:
    home.mkdir()
    return Driver(home, RAY_ADDRESS=address, **OPEN, **more)


def test_twenty_sweeps_in_a_row_on_one_ray_all_end_and_leave_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray

    for name, value in (ENVIRONMENT | OPEN).items():
        monkeypatch.setenv(name, value)
    pruned = 0
    with head(cpus=2) as cluster:
        ray.init(address=cluster.address, log_to_driver=False)
        try:
            for number in range(SWEEPS):
                config = SHORT.with_overrides({"seed": number})
                home = tmp_path / f"{number:02d}"
                driver = new_driver(home, cluster.address, config=config, trials=4, workers=1)
                started = time.monotonic()
                assert driver.start().wait(timeout=300) == 0, driver.log.read_text()
                seconds = time.monotonic() - started
                check_the_three_records_agree(driver)
                stopped = sum(record.state == "pruned" for record in driver.records())
                pruned += stopped
                print(f"sweep {number + 1}: {seconds:.0f} s, {stopped} of 4 stopped early")
                end = time.monotonic() + 30
                while ray.available_resources().get("CPU", 0) < 2:
                    assert time.monotonic() < end, ray.available_resources()
                    time.sleep(0.2)
                groups = ray.util.placement_group_table().values()
                assert {group["state"] for group in groups} == {"REMOVED"}
        finally:
            ray.shutdown()
    assert pruned > 0


def test_a_sweep_whose_head_is_lost_with_its_disk_goes_on_with_another(tmp_path: Path) -> None:
    storage = {"CPFEAN_STORAGE": str(tmp_path / "storage")}
    with head(cpus=2) as first:
        before = new_driver(
            tmp_path / "home", first.address, config=LONGER, trials=4, workers=1, **storage
        )
        process = before.start()
        before.wait_until(process, lambda: before.epochs_recorded() >= 3)
        first.cut_power()
        lost = time.monotonic()
        assert process.wait(timeout=300) == 5, before.log.read_text()
        print(f"the driver noticed within {time.monotonic() - lost:.0f} s")
    said = before.log.read_text()
    assert re.search(r"sweep\.py .*--resume --name s$", said, re.MULTILINE), said
    assert "Traceback" not in said
    records = before.records()
    assert not any(record.state == "failed" for record in records)
    # The records, MLflow's database and its artifacts: all that was on the head.
    shutil.rmtree(before.home / "runs")
    with head(cpus=2) as second:
        after = Driver(
            before.home,
            config=LONGER,
            trials=4,
            workers=1,
            RAY_ADDRESS=second.address,
            **OPEN,
            **storage,
        )
        after.snapshots.append(records)
        assert after.start("--resume").wait(timeout=600) == 0, after.log.read_text()
    copy = tmp_path / "storage" / "studies" / "s"
    assert f"fetched from {copy}, with {len(records)} trial(s)" in after.log.read_text()
    check_the_three_records_agree(after)
    assert RunFolder(copy).records() == after.records()


def test_a_trial_whose_node_is_lost_goes_on_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ray.cluster_utils import Cluster

    for name, value in (ENVIRONMENT | OPEN).items():
        monkeypatch.setenv(name, value)
    cluster = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 1, "include_dashboard": True, "object_store_memory": 10**8},
    )
    try:
        nodes = [cluster.add_node(num_cpus=1, object_store_memory=10**8) for _ in range(2)]
        driver = new_driver(tmp_path / "home", cluster.address, config=LONGER, trials=4, workers=1)
        process = driver.start()
        driver.wait_until(process, lambda: driver.epochs_recorded() >= 3)
        (node, *_) = [node for node in nodes if trains(node)]
        cluster.remove_node(node, allow_graceful=False)
        driver.snapshots.append(driver.records())
        assert process.wait(timeout=900) == 0, driver.log.read_text()
    finally:
        cluster.shutdown()
    print(driver.log.read_text())
    check_the_three_records_agree(driver)


def trains(node) -> bool:
    """Whether a Ray Train worker runs on a node."""
    (raylet,) = node.all_processes["raylet"]
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            stat = (folder / "stat").read_text(encoding="utf-8")
            if (
                int(stat.rpartition(")")[2].split()[1]) == raylet.process.pid
                and b"RayTrainWorker" in (folder / "cmdline").read_bytes()
            ):
                return True
        except OSError:
            continue
    return False
