"""A process that waits for another one waits no longer than it may, and says for whom in vain."""

import os
import signal
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from torch import distributed, multiprocessing

from cpfean.errors import LostPartnerError
from cpfean.processes import partners_watched, summed

TIMEOUT_SECONDS = 2.0
# How the second process ends, and whether before it has met the first one or after.
ENDS = [("kill", "before"), ("kill", "after"), ("stop", "before"), ("stop", "after")]


def wait(rank: int, folder: Path, ends: list[tuple[str, str]]) -> None:
    """One group after another: the process of rank 1 is a child that ends itself."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    for how, when in ends:
        meeting = folder / f"{how}-{when}"
        distributed.init_process_group(
            "gloo",
            init_method=f"file://{meeting}",
            rank=rank,
            world_size=2,
            timeout=timedelta(seconds=TIMEOUT_SECONDS),
        )
        if when == "after":
            distributed.barrier()
        connected = Path(f"{meeting}.connected")
        if rank == 1:
            # The other end may still be connecting: what fails there is not what is tested here.
            while not connected.exists():
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGKILL if how == "kill" else signal.SIGSTOP)
        connected.touch()
        started = time.monotonic()
        try:
            with partners_watched(where="10.0.0.7"):
                for _ in range(3):
                    summed(torch.ones(5))
        except LostPartnerError as error:
            seconds = time.monotonic() - started
            Path(f"{meeting}.told").write_text(f"{seconds} {error}", encoding="utf-8")
        distributed.destroy_process_group()


def meet(folder: Path) -> None:
    """Forks all of them: to import torch in each takes longer than everything else."""
    context = multiprocessing.get_context("fork")
    first = context.Process(target=wait, args=(0, folder, ENDS))
    others = [context.Process(target=wait, args=(1, folder, [end])) for end in ENDS]
    for process in (first, *others):
        process.start()
    first.join(60)
    for process in (first, *others):
        process.kill()


@pytest.mark.slow
def test_lost_and_silent_partners_are_given_up_within_the_time_out(tmp_path: Path) -> None:
    # In a process without the threads that other tests leave here.
    parent = multiprocessing.get_context("spawn").Process(target=meet, args=(tmp_path,))
    parent.start()
    parent.join(90)
    assert parent.exitcode == 0
    for how, when in ENDS:
        seconds, message = (tmp_path / f"{how}-{when}.told").read_text().split(" ", 1)
        # Two of the waits may follow each other: for the group to end, and for what it sends.
        assert float(seconds) < 2 * TIMEOUT_SECONDS + 1
        assert message.startswith("rank 0 of 2 on 10.0.0.7: another process ended or did not")


def test_what_a_process_does_wrong_itself_is_left_alone() -> None:
    with (
        pytest.raises(RuntimeError, match="size of tensor"),
        partners_watched(where="10.0.0.7"),
    ):
        torch.ones(2) + torch.ones(3)
