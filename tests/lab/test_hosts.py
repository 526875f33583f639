"""The lab itself: its hosts are apart, reach each other and nothing else, and can be lost."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.lab.hosts import HOSTS, Lab, address, missing, wait_until

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(missing()), reason=f"the lab needs {missing()}"),
]


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    lab = Lab(tmp_path_factory.mktemp("lab") / "hosts")
    lab.up()
    yield lab
    lab.down()
    assert not lab.folder.exists()
    assert not list(Path("/run/netns").glob("lab-*"))


def pings(lab: Lab, host: str, other: str) -> bool:
    probe = f"timeout 2 bash -c 'exec 3<>/dev/tcp/{other}/22'"
    return lab.run(host, probe, check=False).returncode == 0


def test_hosts_have_processes_files_and_names_of_their_own(lab: Lab) -> None:
    for host in HOSTS:
        assert lab.run(host, "hostname").stdout.strip() == host
        lab.run(host, f"for d in /tmp /root /run /dev/shm; do echo {host} > $d/mine; done")
        assert lab.processes(host) == []
        # The machine's Python, with this project, wherever they lie.
        here = "~/venv/bin/python -c 'import cpfean; print(cpfean.__file__)'"
        assert Path(lab.run(host, here).stdout.strip()).is_file()
    for host in HOSTS:
        seen = lab.run(host, "cat /tmp/mine /root/mine /run/mine /dev/shm/mine").stdout
        assert seen.split() == [host] * 4
    lab.run("head", "echo here > /mnt/ours")
    assert lab.run("worker-2", "cat /mnt/ours").stdout.strip() == "here"


def test_hosts_reach_each_other_by_ssh_and_nothing_else(lab: Lab) -> None:
    ssh = "ssh -o StrictHostKeyChecking=no -o LogLevel=ERROR"
    assert lab.run("laptop", f"{ssh} worker-1 hostname").stdout.strip() == "worker-1"
    # A head has no key until somebody gives it one.
    assert lab.run("head", f"{ssh} -o BatchMode=yes worker-1 true", check=False).returncode != 0
    routes = lab.run("head", "ip route").stdout.splitlines()
    assert [line.split()[0] for line in routes] == ["10.77.0.0/24"]


def test_a_network_that_is_cut_comes_back(lab: Lab) -> None:
    assert pings(lab, "head", address("worker-2"))
    lab.cut_network("worker-2")
    assert not pings(lab, "head", address("worker-2"))
    lab.join_network("worker-2")
    wait_until(lambda: pings(lab, "head", address("worker-2")), seconds=20, what="the network")


def test_power_that_is_cut_takes_everything_and_leaves_the_disk(lab: Lab, tmp_path: Path) -> None:
    lab.run("worker-1", "echo kept > /root/disk; echo lost > /tmp/volatile; echo lost > /dev/shm/x")
    running = lab.start("worker-1", "sleep 600", log=tmp_path / "log")
    wait_until(lambda: bool(lab.processes("worker-1")), seconds=10, what="sleep to run")
    lab.cut_power("worker-1")
    assert running.wait(timeout=10) != 0
    assert not lab.is_up("worker-1")
    assert not pings(lab, "head", address("worker-1"))
    with pytest.raises(RuntimeError, match="worker-1 is down"):
        lab.run("worker-1", "true")
    lab.boot("worker-1")
    assert lab.run("worker-1", "cat /root/disk; ls -A /dev/shm").stdout.split() == ["kept"]
    # Not empty where this project lies below the machine's /tmp.
    assert "volatile" not in lab.run("worker-1", "ls -A /tmp").stdout.split()
    assert lab.processes("worker-1") == []
    assert pings(lab, "head", address("worker-1"))
    # And the machine's Python is there again, for Ray to be started.
    lab.run("worker-1", "~/venv/bin/python -c 'import cpfean'")
