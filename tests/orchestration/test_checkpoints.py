"""Checkpoints in a folder of this machine, and on storage that is none."""

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from cpfean.data.sources import resolve_data
from cpfean.errors import CheckpointError, ConfigError
from cpfean.training.checkpoint import Checkpoint, read_state
from cpfean.training.loop import EpochReport, fit
from orchestration.attempts import FencedError
from orchestration.checkpoints import CheckpointFolder
from tests.orchestration.samples import TINY

REMOTE = "mock:///bucket/trial"  # Arrow's storage in memory


class Saver:
    """Saves every epoch of a training."""

    def __init__(self, folder: CheckpointFolder) -> None:
        self.folder = folder
        self.saved: list[str] = []

    def report(self, report: EpochReport, checkpoint: Checkpoint | None) -> None:
        assert checkpoint is not None
        self.saved.append(self.folder.save(checkpoint))


@pytest.fixture(params=["local", "remote"])
def saver(request: pytest.FixtureRequest, tmp_path: Path) -> Saver:
    """Three epochs are trained and saved."""
    uri = str(tmp_path / "trial") if request.param == "local" else REMOTE
    saver = Saver(CheckpointFolder(uri))
    saver.folder.create()
    assert saver.folder.newest_valid() is None
    config = TINY.with_overrides({"optim.epochs": 3})
    fit(
        config,
        data_folder=resolve_data(config.data, cache_dir=tmp_path / "cache"),
        cache_dir=tmp_path / "cache",
        reporter=saver,
        device=torch.device("cpu"),
    )
    return saver


def test_the_newest_two_are_kept_and_the_newest_is_found(saver: Saver) -> None:
    folder = saver.folder
    assert saver.saved == [f"{folder.uri}/epoch-{epoch:04d}" for epoch in (1, 2, 3)]
    assert folder.names() == ["epoch-0002", "epoch-0003"]
    assert folder.newest_valid() == "epoch-0003"
    with folder.opened("epoch-0003") as opened:
        assert read_state(opened).epoch == 3


def test_a_damaged_one_is_passed_over(saver: Saver) -> None:
    folder = saver.folder
    state = f"{folder._path}/epoch-0003/state.json"
    if folder.uri == REMOTE:
        with folder._filesystem.open_output_stream(state) as file:
            file.write(b"{}")
    else:
        Path(state).write_text("{}")
    assert folder.newest_valid() == "epoch-0002"


def test_storage_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    folder = CheckpointFolder(str(tmp_path / "file"))

    class Small:
        def save(self, into: Path, *, confirm: Callable[[], None]) -> None:
            into.mkdir(parents=True, exist_ok=True)
            (into / "state.json").write_text("{}")

    folder._is_local = False  # as if it were an upload
    small: object = Small()
    with pytest.raises(CheckpointError, match="epoch-0001: cannot be written"):
        folder._upload(small, "epoch-0001")  # type: ignore[arg-type]


def test_a_node_that_does_not_see_the_folder_is_told_what_to_set(tmp_path: Path) -> None:
    folder = CheckpointFolder(str(tmp_path / "trial"))
    with pytest.raises(ConfigError, match="CPFEAN_STORAGE"):
        folder.check_shared()
    folder.create()
    folder.check_shared()
    CheckpointFolder(REMOTE).check_shared()


class Instant:
    """A checkpoint that is written at once, or in which something happens before its end."""

    def __init__(
        self, epoch: int, *, steps: int = 0, meanwhile: Callable[[], object] = lambda: None
    ) -> None:
        self.state = SimpleNamespace(progress=(epoch, steps))
        self.meanwhile = meanwhile

    def save(self, folder: Path, *, confirm: Callable[[], None]) -> None:
        (folder / "best").mkdir(parents=True)
        (folder / "best" / "config.json").write_text("{}")
        (folder / "model.safetensors").write_text("weights")
        self.meanwhile()
        confirm()
        (folder / "manifest.json").write_text("{}")


@pytest.fixture(params=["local", "remote"])
def attempt(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[], CheckpointFolder]:
    """Registers a trial's next attempt; gives its view of the folder."""
    uri = str(tmp_path / "trial") if request.param == "local" else REMOTE
    first = CheckpointFolder(uri)
    first.create()

    def register() -> CheckpointFolder:
        folder = CheckpointFolder(uri, attempt=first.new_attempt())
        folder._filesystem = first._filesystem  # one storage in memory for all
        return folder

    return register


def test_workers_that_were_given_up_and_come_back_write_nothing_more(
    attempt: Callable[[], CheckpointFolder],
) -> None:
    old = attempt()
    saved: Any = [Instant(epoch) for epoch in (1, 2)]
    for checkpoint in saved:
        old.save(checkpoint)
    taken_over: list[CheckpointFolder] = []

    def new_attempt_does_three_epochs() -> None:
        taken_over.append(attempt())
        for epoch in (3, 4, 5):
            again: Any = Instant(epoch)
            taken_over[0].save(again)

    # Stopped in the middle of writing, and continued long after.
    interrupted: Any = Instant(3, meanwhile=new_attempt_does_three_epochs)
    with pytest.raises(FencedError, match=r"fenced\. Attempt 1 .* attempt 2 has taken over"):
        old.save(interrupted)
    with pytest.raises(FencedError):
        old.save(saved[0])
    (new,) = taken_over
    complete = [name for name in new.names() if new._is_complete(name)]
    assert complete == ["epoch-0004.2", "epoch-0005.2"]


FENCED = 7


def save_and_freeze_meanwhile(uri: str) -> None:
    """A worker of the first attempt, whose host stops in the middle of a checkpoint."""
    frozen: Any = Instant(3, meanwhile=lambda: os.kill(os.getpid(), signal.SIGSTOP))
    try:
        CheckpointFolder(uri, attempt=1).save(frozen)
    except FencedError:
        sys.exit(FENCED)


@pytest.mark.slow
def test_a_worker_that_was_frozen_and_thaws_after_the_retry_is_fenced(tmp_path: Path) -> None:
    folder = CheckpointFolder(str(tmp_path / "trial"))
    folder.create()
    assert folder.new_attempt() == 1
    worker = multiprocessing.get_context("spawn").Process(
        target=save_and_freeze_meanwhile, args=(folder.uri,)
    )
    worker.start()
    try:
        # Behind the name, in brackets, comes the state; T is stopped.
        stat = Path(f"/proc/{worker.pid}/stat")
        deadline = time.monotonic() + 60
        while stat.read_text().rpartition(")")[2].split()[0] != "T":
            assert time.monotonic() < deadline, "the worker has not come to its checkpoint"
            time.sleep(0.05)
        again: Any = Instant(3)
        CheckpointFolder(folder.uri, attempt=folder.new_attempt()).save(again)
        os.kill(worker.pid or 0, signal.SIGCONT)
        worker.join(60)
        assert worker.exitcode == FENCED
    finally:
        worker.kill()
    assert [name for name in folder.names() if folder._is_complete(name)] == ["epoch-0003.2"]


def test_a_moment_in_an_epoch_is_newer_than_its_beginning_whichever_attempt_saved_it(
    attempt: Callable[[], CheckpointFolder],
) -> None:
    first = attempt()
    whole, part = Instant(9), Instant(9, steps=120)
    moments: list[Any] = [whole, part]
    for checkpoint in moments:
        first.save(checkpoint)
    assert first.names() == ["epoch-0009", "epoch-0009-000120"]
    second = attempt()
    later: Any = Instant(9, steps=200)
    second.save(later)
    assert second.names() == ["epoch-0009-000120", "epoch-0009-000200.2"]
    end: Any = Instant(10)
    second.save(end)
    assert second.names() == ["epoch-0009-000200.2", "epoch-0010.2"]


def test_what_an_attempt_has_not_finished_is_not_kept_in_place_of_what_is_whole(
    attempt: Callable[[], CheckpointFolder],
) -> None:
    def killed() -> None:
        raise KeyboardInterrupt

    first = attempt()
    for epoch in (1, 2):
        done: Any = Instant(epoch)
        first.save(done)
    if not first._is_local:
        first._filesystem.create_dir(f"{first._path}/epoch-0003")
    else:
        cut_off: Any = Instant(3, meanwhile=killed)
        with pytest.raises(KeyboardInterrupt):
            first.save(cut_off)
    assert first.names()[-1] == "epoch-0003"
    second = attempt()
    again: Any = Instant(3)
    second.save(again)
    assert second.names() == ["epoch-0002", "epoch-0003.2"]
