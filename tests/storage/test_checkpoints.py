"""Checkpoints in a folder of this machine, and in an object store; both fail now and then."""

import json
import multiprocessing
import os
import re
import shutil
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fsspec
import pytest
import torch

from cpfean.config import ExperimentConfig
from cpfean.data.sources import resolve_data
from cpfean.errors import CheckpointError, ConfigError, ServiceError
from cpfean.storage.checkpoint_names import FencedError
from cpfean.storage.checkpoints import CheckpointFolder
from cpfean.training.checkpoint import Checkpoint, TrainingState, check_same_run, read_state
from cpfean.training.loop import EpochReport, fit
from orchestration.settings import Settings
from tests.faults import small_disk
from tests.orchestration.runners.test_in_process import curve, plan_of
from tests.orchestration.samples import TINY, run_here

REMOTE = "memory://bucket/trial"


class Trained:
    """Keeps what a training came to."""

    def report(self, report: EpochReport, checkpoint: Checkpoint | None) -> None:
        assert checkpoint is not None
        self.checkpoint = checkpoint


class Saver:
    """Saves what a training came to, as that of any epoch."""

    def __init__(self, folder: CheckpointFolder, checkpoint: Checkpoint) -> None:
        self.folder = folder
        self.checkpoint = checkpoint
        self.saved: list[str] = []

    def save(self, *epochs: int) -> None:
        for epoch in epochs:
            state = replace(self.checkpoint.state, epoch=epoch)
            self.saved.append(self.folder.save(replace(self.checkpoint, state=state)))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    cache = tmp_path_factory.mktemp("cache")
    trained = Trained()
    fit(
        TINY,
        data_folder=resolve_data(TINY.data, cache_dir=cache),
        cache_dir=cache,
        reporter=trained,
        device=torch.device("cpu"),
    )
    return trained.checkpoint


@pytest.fixture(params=["local", "remote"])
def saver(request: pytest.FixtureRequest, tmp_path: Path, checkpoint: Checkpoint) -> Saver:
    """Three epochs are saved."""
    fsspec.filesystem("memory").store.clear()
    uri = str(tmp_path / "trial") if request.param == "local" else REMOTE
    saver = Saver(CheckpointFolder(uri), checkpoint)
    saver.folder.create()
    assert saver.folder.newest_valid() is None
    saver.save(1, 2, 3)
    return saver


def test_the_newest_two_are_kept_and_the_newest_is_found(saver: Saver) -> None:
    folder = saver.folder
    assert saver.saved == [f"{folder.uri}/epoch-{epoch:04d}" for epoch in (1, 2, 3)]
    assert folder.names() == ["epoch-0002", "epoch-0003"]
    assert folder.newest_valid() == "epoch-0003"
    with folder.opened("epoch-0003") as opened:
        assert read_state(opened).epoch == 3


@pytest.mark.parametrize("uri", ["s4://bucket/trial", "sftp://host/trial"])
def test_a_storage_of_an_unknown_kind_is_refused(uri: str) -> None:
    with pytest.raises(ConfigError, match=f"{uri}: no storage of that kind here"):
        CheckpointFolder(uri)


def cut(files: dict[str, bytes]) -> None:
    files["model.safetensors"] = files["model.safetensors"][:-1]


def flip(files: dict[str, bytes]) -> None:
    old = files["optimizer.safetensors"]
    files["optimizer.safetensors"] = old[:-1] + bytes([old[-1] ^ 1])


def lack_the_manifest(files: dict[str, bytes]) -> None:
    del files["manifest.json"]


def lack_a_file(files: dict[str, bytes]) -> None:
    del files["best/model.safetensors"]


def name_a_file_elsewhere(files: dict[str, bytes]) -> None:
    manifest = json.loads(files["manifest.json"])
    manifest["files"] |= {"../../escaped": {"size": 1, "sha256": "0"}}
    files["manifest.json"] = json.dumps(manifest).encode()


def be_empty(files: dict[str, bytes]) -> None:
    files["manifest.json"] = b""


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (cut, "model.safetensors: damaged"),
        (flip, "optimizer.safetensors: damaged"),
        (lack_the_manifest, "no manifest.json"),
        (lack_a_file, "best/model.safetensors: missing"),
        (name_a_file_elsewhere, "escaped' is outside the checkpoint"),
        (be_empty, "manifest.json: cannot be read"),
    ],
)
def test_a_damaged_one_is_passed_over_and_told_of(
    saver: Saver,
    caplog: pytest.LogCaptureFixture,
    damage: Callable[[dict[str, bytes]], None],
    reason: str,
) -> None:
    folder = saver.folder
    filesystem, path = fsspec.core.url_to_fs(folder.uri)
    newest = f"{path}/epoch-0003"
    files = {
        name.removeprefix(f"{newest}/"): filesystem.cat_file(name)
        for name in filesystem.find(newest)
    }
    damage(files)
    filesystem.rm(newest, recursive=True)
    for name, content in files.items():
        filesystem.makedirs(f"{newest}/{name}".rpartition("/")[0], exist_ok=True)
        filesystem.pipe_file(f"{newest}/{name}", content)
    assert folder.newest_valid() == "epoch-0002"
    first, second = (entry.getMessage() for entry in caplog.records)
    assert first.startswith(f"{folder.uri}/epoch-0003 is passed over: ")
    assert reason in first
    assert second == f"{folder.uri}/epoch-0002 is used instead"


def test_without_a_sound_one_the_training_starts_anew(
    saver: Saver, caplog: pytest.LogCaptureFixture
) -> None:
    def fits(state: TrainingState) -> None:
        check_same_run(state, TINY.with_overrides({"loss.margin": 0.3}), "")

    assert saver.folder.newest_valid(fits=fits) is None
    lines = [entry.getMessage() for entry in caplog.records]
    assert "loss.margin was 0.2, is 0.3" in lines[0]
    assert lines[-1].endswith("the training starts anew")


def test_one_that_was_cut_off_does_not_count_among_those_kept(saver: Saver) -> None:
    folder = saver.folder
    filesystem, path = fsspec.core.url_to_fs(folder.uri)
    filesystem.rm(f"{path}/epoch-0003/manifest.json")
    saver.save(4)
    assert folder.names() == ["epoch-0002", "epoch-0004"]
    saver.save(4)  # by an attempt that had to go back
    assert folder.names() == ["epoch-0002", "epoch-0004"]
    assert folder.newest_valid() == "epoch-0004"


@pytest.mark.parametrize("kilobytes", [0, 4, 40, 80])
def test_on_a_full_disk_the_last_one_stays_and_nothing_of_the_new_one(
    tmp_path: Path, checkpoint: Checkpoint, kilobytes: int
) -> None:
    with small_disk(tmp_path / "disk", kilobytes=4096) as disk:
        saver = Saver(CheckpointFolder(str(disk / "trial")), checkpoint)
        saver.folder.create()
        saver.save(1, 2)
        free = shutil.disk_usage(disk).free - kilobytes * 1024
        (disk / "filler").write_bytes(bytes(free))
        with pytest.raises(ServiceError) as failure:
            saver.save(3)
        place = re.escape(f"{disk}/trial/epoch-0003")
        told = re.match(rf"{place}: disk full: (\d+) k?B free, (\d+) kB needed", str(failure.value))
        assert told is not None, failure.value
        assert int(told[1]) == kilobytes * 1024 // 1000 < int(told[2])
        assert sorted(path.name for path in (disk / "trial").iterdir()) == [
            "epoch-0001",
            "epoch-0002",
        ]
        assert saver.folder.newest_valid() == "epoch-0002"
        (disk / "filler").unlink()
        saver.save(3)
        assert saver.folder.newest_valid() == "epoch-0003"


def test_a_training_goes_on_from_the_last_one_when_there_is_room_again(
    where: Settings, tmp_path: Path
) -> None:
    undisturbed = run_here(plan_of(TINY, where, "whole"), where, resume=False, say=print)
    with small_disk(tmp_path / "disk", kilobytes=4096) as disk:
        small = replace(where, output=disk)
        plan = replace(plan_of(TINY, where, "full"), retry_failed=True)  # as train.py asks for

        def fill(line: str) -> None:
            if "epoch 1/" in line:
                (disk / "filler").write_bytes(bytes(shutil.disk_usage(disk).free - 40960))

        with pytest.raises(ServiceError, match="epoch-0002: disk full"):
            run_here(plan, small, resume=False, say=fill)
        (disk / "filler").unlink()
        said: list[str] = []
        resumed = run_here(plan, small, resume=True, say=said.append)
        assert f"full: resuming from {disk}/full/train/full-000/epoch-0001" in said
        assert curve(resumed) == curve(undisturbed)
        assert resumed.test == undisturbed.test


def test_a_leftover_of_a_killed_writer_is_removed(tmp_path: Path, saver: Saver) -> None:
    if saver.folder.uri == REMOTE:
        pytest.skip("an object store is written in place")
    leftover = Path(saver.folder.uri) / ".epoch-0004.0a1b2c3d"
    shutil.copytree(Path(saver.folder.uri) / "epoch-0003", leftover)
    assert saver.folder.newest_valid() == "epoch-0003"
    saver.save(4)
    assert not leftover.exists()


def test_storage_that_cannot_be_written_is_named(saver: Saver, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    saver.folder = CheckpointFolder(str(tmp_path / "file"))
    with pytest.raises(ServiceError, match="file: cannot be written: File exists"):
        saver.folder.create()
    with pytest.raises(ServiceError, match="epoch-0001: cannot be written: Not a directory"):
        saver.save(1)


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
        self.state = SimpleNamespace(progress=(epoch, steps), epoch=epoch)
        self.weights: dict[str, torch.Tensor] = {}
        self.best_weights = self.moments = self.weights
        self.meanwhile = meanwhile

    def save(self, folder: Path) -> None:
        (folder / "best").mkdir(parents=True)
        (folder / "best" / "config.json").write_text("{}")
        (folder / "model.safetensors").write_text("weights")
        self.meanwhile()
        (folder / "manifest.json").write_text("{}")


@pytest.fixture(params=["local", "remote"])
def attempt(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[], CheckpointFolder]:
    """Registers a trial's next attempt; gives its view of the folder."""
    uri = str(tmp_path / "trial") if request.param == "local" else REMOTE
    fsspec.filesystem("memory").store.clear()
    first = CheckpointFolder(uri)
    first.create()

    def register() -> CheckpointFolder:
        return CheckpointFolder(uri, attempt=first.new_attempt())

    return register


@pytest.mark.parametrize("content", [b"", b"two", b"-1", b"[" * 1000, b"\xff", b"1" * 1000])
def test_the_number_of_an_attempt_that_cannot_be_read_is_told_and_left(
    tmp_path: Path, content: bytes
) -> None:
    folder = CheckpointFolder(str(tmp_path))
    assert folder.new_attempt() == 1
    marker = tmp_path / "attempt"
    marker.write_bytes(content)
    with pytest.raises(CheckpointError, match=re.escape(f"{marker}: expected the number")):
        folder.new_attempt()
    assert marker.read_bytes() == content
    marker.rename(tmp_path / "aside")
    assert folder.new_attempt() == 1


@pytest.mark.parametrize("put", [Path.mkdir, os.mkfifo, lambda file: file.symlink_to("nowhere")])
def test_what_is_no_file_is_no_attempt(tmp_path: Path, put: Callable[[Path], None]) -> None:
    put(tmp_path / "attempt")
    with pytest.raises(CheckpointError, match="expected the number"):
        CheckpointFolder(str(tmp_path)).new_attempt()
    assert [path.name for path in tmp_path.iterdir()] == ["attempt"]


def test_a_text_encoder_that_moved_is_part_of_the_same_run_and_one_by_name_is_not(
    checkpoint: Checkpoint,
) -> None:
    def of(encoder: str) -> ExperimentConfig:
        return TINY.with_overrides({"model.text.encoder": encoder})

    state = replace(checkpoint.state, config=of("/old/bert"))
    check_same_run(state, of("/new/bert"), state.data_fingerprint)
    with pytest.raises(CheckpointError, match=r"text\.encoder"):
        check_same_run(state, of("bert-base"), state.data_fingerprint)


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
    complete = [name for name in new.names() if new._has_manifest(name)]
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
@pytest.mark.long
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
    assert [name for name in folder.names() if folder._has_manifest(name)] == ["epoch-0003.2"]


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
