"""A head that was started by hand, with one CPU, and a sweep that asks for two."""

import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from cpfean.records.run_folder import RunFolder
from orchestration.tracking.stores import open_store
from tests.environment import of_a_user
from tests.orchestration.samples import TINY

pytestmark = [pytest.mark.slow, pytest.mark.drill, pytest.mark.timeout(900)]

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(params=["first", "second"])
def head(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """Address and environment of a head with either of Ray's autoscalers; neither grows."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mine = of_a_user()
    mine |= {
        "RAY_AUTH_MODE": "disabled",
        "RAY_USAGE_STATS_ENABLED": "0",
        "CPFEAN_CACHE": str(tmp_path / "cache"),
    }
    of_head = mine | {"RAY_NODE_TYPE_NAME": "gpu-worker"}
    if request.param == "second":
        of_head |= {"RAY_enable_autoscaler_v2": "1"}
    words = ["start", "--head", f"--port={port}", "--num-cpus=1", "--num-gpus=0", "--block"]
    words += ["--include-dashboard=false", "--object-store-memory=100000000"]
    with (tmp_path / "head.log").open("wb") as log:
        process = subprocess.Popen(
            [Path(sys.executable).with_name("ray"), *words], env=of_head, stdout=log, stderr=log
        )
    try:
        end = time.monotonic() + 120
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                break
            except OSError:
                assert process.poll() is None, (tmp_path / "head.log").read_text()
                assert time.monotonic() < end, (tmp_path / "head.log").read_text()
                time.sleep(0.2)
        yield f"127.0.0.1:{port}", mine
    finally:
        process.terminate()
        process.wait(timeout=60)


def sweep(tmp_path: Path, environment: dict[str, str], *words: str) -> subprocess.CompletedProcess:
    (tmp_path / "tiny.toml").write_text(TINY.to_toml())
    script = str(ROOT / "experiments/sweep.py")
    return subprocess.run(
        [sys.executable, script, "--config", "tiny.toml", "--workers", "2", "--name", "s", *words],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=400,
    )


def test_what_a_cluster_can_never_give_ends_the_study_with_the_numbers(
    head: tuple[str, dict[str, str]], tmp_path: Path
) -> None:
    address, environment = head
    dry = sweep(tmp_path, environment, "--address", address, "--dry-run")
    assert dry.returncode == 0, dry.stderr
    assert "the cluster at 127.0.0.1" in dry.stdout
    assert "1 node(s), 1 CPUs, 0 GPUs" in dry.stdout
    assert "for 1 x gpu-worker at $0.32 an hour" in dry.stdout
    assert not (tmp_path / "runs").exists()

    started = time.monotonic()
    answer = sweep(tmp_path, environment, "--address", address, "--max-cost", "3")
    assert answer.returncode == 5, answer.stdout + answer.stderr
    assert time.monotonic() - started < 240
    for said in (
        "the cluster cannot give what a trial asks for",
        "asked for: 2 worker(s) of 1 CPU(s)",
        "there is: 1 node(s) with 1 CPUs and 0 GPUs, room for 1",
    ):
        assert said in answer.stderr
    assert re.search(r"sweep\.py .*--resume --name s$", answer.stderr, re.MULTILINE)
    assert "Traceback" not in answer.stderr
    states = [record.state for record in RunFolder(tmp_path / "runs" / "s").records()]
    assert set(states) <= {"waiting", "interrupted"}
    client, experiment = open_store(f"sqlite:///{tmp_path / 'runs' / 'mlflow.db'}")
    runs = client.search_runs([experiment])
    assert {run.info.status for run in runs} <= {"FAILED", "KILLED"}
    (parent,) = (run for run in runs if run.data.tags["cpfean.role"] == "parent")
    assert parent.data.metrics["study/cost"] == pytest.approx(
        0.32 * parent.data.metrics["study/hours"], rel=0.01
    )
