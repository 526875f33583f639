"""The notice of AWS is passed on to Ray once, by what cluster.yaml starts on a worker."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest
import yaml

from orchestration.aws.preemption_notice import listen
from tests.faults import Metadata
from tests.lab.hosts import wait_until

CLUSTER = yaml.safe_load((Path(__file__).parents[3] / "cluster.yaml").read_text(encoding="utf-8"))
DRAIN = "drain-node --reason DRAIN_NODE_REASON_PREEMPTION --reason-message"


@pytest.fixture
def metadata() -> Iterator[Metadata]:
    metadata = Metadata(timedelta(seconds=120))
    yield metadata
    metadata.close()


@pytest.fixture
def ray(tmp_path: Path) -> Path:
    """A folder with a `ray` that notes down its flags, and fails as often as a file says."""
    programs = tmp_path / "venv/bin"
    programs.mkdir(parents=True)
    program = programs / "ray"
    program.write_text(
        f'#!/bin/sh\necho "$@" >> {tmp_path}/calls\n'
        f"test -s {tmp_path}/away || exit 0\nsed -i 1d {tmp_path}/away\nexit 1\n"
    )
    program.chmod(0o755)
    (programs / "python").symlink_to(sys.executable)
    return programs


def calls(folder: Path) -> list[str]:
    noted = folder / "calls"
    return noted.read_text().splitlines() if noted.exists() else []


def seconds_left(call: str) -> int:
    match = re.fullmatch(rf"{DRAIN} .* --deadline-remaining-seconds (\d+)", call)
    assert match, call
    return int(match[1])


def test_the_notice_is_passed_on_once_whatever_the_metadata_said_before(
    metadata: Metadata, ray: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", f"{ray}:/usr/bin:/bin")
    metadata.answers[:0] = [404, 500, "garbage", "hang", 401, 404]
    listen(metadata.url, pause=0.01)
    assert metadata.looks == 7
    (call,) = calls(tmp_path)
    assert 105 <= seconds_left(call) <= 110  # some are kept in reserve


def test_a_notice_that_comes_late_is_passed_on_all_the_same(
    metadata: Metadata, ray: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", f"{ray}:/usr/bin:/bin")
    metadata.answers = [timedelta(seconds=-30)]
    listen(metadata.url, pause=0.01)
    assert [seconds_left(call) for call in calls(tmp_path)] == [1]


def test_a_ray_that_is_not_up_is_told_when_it_is(
    metadata: Metadata, ray: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", f"{ray}:/usr/bin:/bin")
    (tmp_path / "away").write_text("not up\nnot up\n")
    listen(metadata.url, pause=0.01)
    assert len(calls(tmp_path)) == 3


def test_workers_of_the_cluster_listen_once_and_go_on_with_their_setup(
    metadata: Metadata, ray: Path, tmp_path: Path
) -> None:
    """The very command of cluster.yaml, with a systemd that starts what it is told to."""
    (command,) = [line for line in CLUSTER["worker_setup_commands"] if "notice" in line]
    # It runs the program apart from whoever asked for it.
    apart = '{ timeout 60 "$@"; echo $? > $HOME/ended; } &'
    for name, does in {
        "systemctl": 'test -f "$HOME/unit"',
        "sudo": 'exec "$@"',
        "systemd-run": f'touch $HOME/unit; while [ "${{1#--}}" != "$1" ]; do shift; done; {apart}',
    }.items():
        program = ray / name
        program.write_text(f"#!/bin/sh\necho {name} >> $HOME/said\n{does}\n")
        program.chmod(0o755)
    metadata.answers = [404]
    (tmp_path / "cpfean.env").write_text(
        f"export PATH={ray}:/usr/bin:/bin AWS_EC2_METADATA_SERVICE_ENDPOINT={metadata.url}\n"
    )
    (tmp_path / "cpfean").symlink_to(Path(__file__).parents[3])
    environment = {"HOME": str(tmp_path), "PATH": f"{ray}:/usr/bin:/bin"}
    for _ in range(2):  # as `ray up` does again on a host that it knows
        subprocess.run(
            ["bash", "-c", f"cd $HOME/cpfean; {command}"],
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            check=True,
            timeout=30,
        )
    said = (tmp_path / "said").read_text().split()
    assert said == ["systemctl", "sudo", "systemd-run", "systemctl"]
    wait_until(lambda: metadata.looks > 0, seconds=30, what="the first look")
    assert calls(tmp_path) == []
    metadata.answers = [timedelta(seconds=120)]
    wait_until(lambda: bool(calls(tmp_path)), seconds=30, what="the notice to be passed on")
    ended = tmp_path / "ended"
    wait_until(lambda: ended.exists() and bool(ended.read_text()), seconds=30, what="its end")
    assert ended.read_text().strip() == "0"  # else systemd would start it again
    (call,) = calls(tmp_path)
    assert 100 <= seconds_left(call) <= 110
