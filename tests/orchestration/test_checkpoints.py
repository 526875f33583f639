"""Checkpoints in a folder of this machine, and on storage that is none."""

from pathlib import Path

import pytest
import torch

from cpfean.data.sources import resolve_data
from cpfean.errors import CheckpointError, ConfigError
from cpfean.training.checkpoint import Checkpoint, read_state
from cpfean.training.loop import EpochReport, fit
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
        def save(self, into: Path) -> None:
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
