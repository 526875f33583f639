"""Too little memory, for real, and what is said of it."""

from __future__ import annotations

import resource
from pathlib import Path

import pytest
import torch
from torch import multiprocessing

from cpfean.errors import NoMemoryError
from cpfean.training.checkpoint import Checkpoint
from cpfean.training.loop import EpochReport, fit
from tests.training.tiny import tiny_experiment

ROOM_BYTES = 16 * 2**20  # a third of the gradients


class Landlord:
    """Gives the process hardly more memory than it has, once the model is there."""

    def given(self) -> bool:
        pages = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[0])
        limit = pages * resource.getpagesize() + ROOM_BYTES
        resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
        return False

    def save(self, checkpoint: Checkpoint | None) -> None:
        raise AssertionError

    def report(self, report: EpochReport, checkpoint: Checkpoint | None) -> None:
        raise AssertionError


def train(data: Path, folder: Path) -> None:
    torch.set_num_threads(1)
    try:
        fit(
            tiny_experiment().with_overrides({"model.dim": 1024}),
            data_folder=data,
            cache_dir=folder,
            reporter=Landlord(),
            notice=Landlord(),
            device=torch.device("cpu"),
        )
    except NoMemoryError as error:
        message = str(error)
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY,) * 2)
        (folder / "message").write_text(message, encoding="utf-8")


@pytest.mark.slow
@pytest.mark.long
def test_batch_size_peak_and_remedy_are_told_when_memory_runs_out(
    tmp_path: Path, data_folder: Path
) -> None:
    child = multiprocessing.get_context("spawn").Process(target=train, args=(data_folder, tmp_path))
    child.start()
    child.join(120)
    assert child.exitcode == 0
    message = (tmp_path / "message").read_text(encoding="utf-8")
    assert message.startswith(
        "out of memory in epoch 1, with optim.batch_size = 10 over 1 process(es), at a peak of 0."
    )
    assert "GiB of main memory" in message
    assert "Lower optim.batch_size" in message
    assert "more --workers" in message
