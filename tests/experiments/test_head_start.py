"""Ray starts while the data is checked, and ends with the command however that goes."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.slow


def sweep(folder: Path, data: Path) -> subprocess.Popen[str]:
    words = ("--data", str(data), "--output", str(folder / "runs"), "--address", "local")
    return subprocess.Popen(
        [sys.executable, "-u", "experiments/sweep.py", *words],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def processes_of(driver: int) -> list[str]:
    """Of the Ray that a driver has started: the name of a session ends with its driver's id."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            command = (process / "cmdline").read_bytes().decode(errors="replace")
        except OSError:
            continue
        if "/session_" in command and f"_{driver}/" in command:
            found.append(command.replace("\0", " "))
    return found


def none_left(driver: int) -> bool:
    end = time.monotonic() + 20
    while processes_of(driver) and time.monotonic() < end:
        time.sleep(0.2)
    return not processes_of(driver)


@pytest.mark.long
def test_faulty_data_ends_the_ray_that_was_started_meanwhile(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train_ims.npy").write_bytes(b"no array")
    process = sweep(tmp_path, tmp_path / "data")
    out, err = process.communicate(timeout=120)
    assert process.returncode == 3
    assert "train_ims.npy" in err
    assert "Traceback" not in out + err
    assert "starting Ray" in out
    assert none_left(process.pid)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    "number", [signal.SIGINT, pytest.param(signal.SIGKILL, marks=pytest.mark.long)]
)
def test_a_signal_while_ray_starts_leaves_nothing(tmp_path: Path, number: int) -> None:
    process = sweep(tmp_path, Path("synthetic"))
    assert process.stdout is not None
    while "starting Ray" not in process.stdout.readline():
        assert process.poll() is None
    end = time.monotonic() + 60
    while not processes_of(process.pid) and time.monotonic() < end:
        time.sleep(0.05)
    os.kill(process.pid, number)
    out, err = process.communicate(timeout=120)
    assert process.returncode == (130 if number == signal.SIGINT else -signal.SIGKILL)
    assert "Traceback" not in out + err
    assert none_left(process.pid)
