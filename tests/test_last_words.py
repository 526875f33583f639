"""Of several processes that end, the one is named that the others ended because of."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from cpfean.last_words import Listener, leave_last_words

ROOT = Path(__file__).resolve().parents[1]
HOST = "127.0.0.1"

# What NCCL's watchdog does: a thread that Python does not know of aborts the process, while the
# main thread waits.
WATCHDOG = """
import ctypes, time
def aborted():
    libc = ctypes.CDLL(None)
    libc.pthread_create(ctypes.byref(ctypes.c_ulong()), None, libc.abort, None)
    time.sleep(60)
"""
WORKER = """
import sys
from cpfean.last_words import leave_last_words
leave_last_words((sys.argv[1], int(sys.argv[2]), sys.argv[3]), rank=int(sys.argv[4]))
print("there", flush=True)
"""
WAITING = "sys.stdin.readline()\naborted()"
COLLECTIVES = """
import os, signal
os.environ["GLOO_SOCKET_IFNAME"] = "lo"
from datetime import timedelta
import torch
from torch import distributed
from cpfean.errors import LostPartnerError
from cpfean.processes import partners_watched, summed
torch.set_num_threads(1)
rank, meeting = int(sys.argv[4]), sys.argv[5]
distributed.init_process_group(
    "gloo", init_method="file://" + meeting, rank=rank, world_size=3, timeout=timedelta(seconds=20)
)
distributed.barrier()
if rank == 1:
    os.kill(os.getpid(), signal.SIGKILL)
try:
    with partners_watched(where="here"):
        while True:
            summed(torch.ones(5))
except LostPartnerError:
    aborted()
"""


class Worker:
    """A process that a listener knows of; what it says at last is kept from the terminal."""

    def __init__(self, listener: Listener, rank: int, program: str, *more: str) -> None:
        self.process = subprocess.Popen(
            [
                sys.executable,
                "-c",
                WATCHDOG + WORKER + program,
                *map(str, listener.address),
                str(rank),
                *more,
            ],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def is_there(self) -> None:
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "there\n"

    def ends(self, number: signal.Signals) -> None:
        """Ends by a signal, and the listener has time to take note."""
        if number == signal.SIGABRT:
            assert self.process.stdin is not None
            self.process.stdin.write("\n")
            self.process.stdin.flush()
        else:
            self.process.send_signal(number)
        assert self.process.wait(20) == -number
        time.sleep(0.2)


@pytest.fixture
def listener() -> Iterator[Listener]:
    listener = Listener(HOST, silence=2.5)
    yield listener
    listener.close()


@contextmanager
def workers(listener: Listener, number: int, program: str, *more: str) -> Iterator[list[Worker]]:
    started = [Worker(listener, rank, program, *more) for rank in range(number)]
    try:
        for one in started:
            one.is_there()
        yield started
    finally:
        for one in started:
            one.process.kill()
            one.process.communicate()


@pytest.mark.slow
def test_the_killed_process_is_named_and_not_those_that_a_watchdog_aborts_at_a_collective(
    listener: Listener, tmp_path: Path
) -> None:
    with workers(listener, 3, COLLECTIVES, str(tmp_path / "meeting")) as started:
        codes = [one.process.wait(60) for one in started]
    assert codes == [-signal.SIGABRT, -signal.SIGKILL, -signal.SIGABRT]
    time.sleep(0.2)
    assert listener.culprits([0, 1, 2]) == [1]
    # Whoever looks after them may have seen only one end so far.
    assert listener.culprits([0]) == [1]


def test_a_host_that_fell_silent_is_named_when_the_others_are_aborted(listener: Listener) -> None:
    with workers(listener, 2, WAITING) as (survivor, lost):
        lost.process.send_signal(signal.SIGSTOP)  # as if its power was cut: no connection ends
        time.sleep(4)
        survivor.ends(signal.SIGABRT)
        assert listener.culprits([0]) == [1]
        assert listener.culprits([], waiting=[0]) == [1]


def test_who_aborts_or_crashes_first_is_named(listener: Listener) -> None:
    with workers(listener, 3, WAITING) as (first, second, third):
        second.ends(signal.SIGABRT)
        assert listener.culprits([1]) == [1]
        third.ends(signal.SIGABRT)
        assert listener.culprits([1, 2]) == [1]
        first.ends(signal.SIGSEGV)  # has last words, and not those of an abortion
        assert listener.culprits([0, 1, 2]) == [0]


def test_who_waited_in_vain_is_not_named(listener: Listener) -> None:
    with workers(listener, 2, WAITING) as (_, second):
        assert listener.culprits([], waiting=[0]) == []
        second.ends(signal.SIGKILL)
        assert listener.culprits([], waiting=[0]) == [1]


def test_what_a_signal_said_is_logged(listener: Listener, caplog: pytest.LogCaptureFixture) -> None:
    with workers(listener, 1, WAITING) as (one,):
        one.ends(signal.SIGABRT)
    assert "rank 0 ended with: Fatal Python error: Aborted" in caplog.text


def test_strangers_and_closed_listeners_are_no_harm(listener: Listener) -> None:
    host, port, _ = listener.address
    for words in (b"", b"GET / HTTP/1.1\r\n", b"0123456789abcdef 0\n", b"x" * 10_000, b"\xff\n"):
        with socket.create_connection((host, port)) as stranger:
            stranger.sendall(words)
    time.sleep(0.2)
    assert listener.culprits([]) == []
    listener.close()
    leave_last_words((host, port, "word"), rank=0)
    assert listener.culprits([2, 1]) == [1, 2]
