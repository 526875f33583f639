"""A run that was interrupted equals one that was not, bit for bit; and what fit() refuses."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from cpfean.config import ExperimentConfig
from cpfean.data.consensus import word_consensus
from cpfean.errors import CheckpointError, DivergedError, StoppedError
from cpfean.model.cpfean import Cpfean
from cpfean.training import loop
from cpfean.training.checkpoint import Checkpoint, newest_valid, read_state
from cpfean.training.loop import EpochReport, FitResult, fit
from cpfean.training.setup import evaluate_checkpoint, open_experiment
from tests.training.tiny import tiny_experiment

CPU = torch.device("cpu")


class Recorder:
    """Keeps every report, and a checkpoint of each epoch."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.reports: list[EpochReport] = []

    def report(self, report: EpochReport, checkpoint: Checkpoint | None) -> None:
        self.reports.append(report)
        assert checkpoint is not None
        checkpoint.save(self.folder / f"epoch-{report.epoch}")


def train(
    config: ExperimentConfig, data: Path, out: Path, resume_from: Path | None = None
) -> tuple[FitResult, Recorder]:
    recorder = Recorder(out)
    result = fit(
        config,
        data_folder=data,
        cache_dir=out / "cache",
        reporter=recorder,
        device=CPU,
        resume_from=resume_from,
    )
    return result, recorder


def timeless(history: tuple[dict[str, float], ...]) -> list[dict[str, float]]:
    clocked = ("train/seconds", "train/pairs_per_second")
    return [{k: v for k, v in entry.items() if k not in clocked} for entry in history]


@pytest.fixture(scope="module")
def uninterrupted(
    tmp_path_factory: pytest.TempPathFactory, data_folder: Path
) -> tuple[FitResult, Recorder, ExperimentConfig]:
    config = tiny_experiment()
    result, recorder = train(config, data_folder, tmp_path_factory.mktemp("run"))
    return result, recorder, config


@pytest.mark.parametrize("after", [1, 2, 3])
def test_resumed_equals_uninterrupted_bit_for_bit(
    tmp_path: Path,
    data_folder: Path,
    uninterrupted: tuple[FitResult, Recorder, ExperimentConfig],
    after: int,
) -> None:
    whole, recorder, config = uninterrupted
    resumed, again = train(config, data_folder, tmp_path, recorder.folder / f"epoch-{after}")
    assert [report.epoch for report in again.reports] == list(range(after + 1, 5))
    assert timeless(resumed.history) == timeless(whole.history)
    for name in ("model.safetensors", "optimizer.safetensors", "best/model.safetensors"):
        of_whole = load_file(recorder.folder / "epoch-4" / name)
        of_resumed = load_file(tmp_path / "epoch-4" / name)
        assert of_whole.keys() == of_resumed.keys()
        assert all(torch.equal(of_whole[key], of_resumed[key]) for key in of_whole), name


class Notified(Recorder):
    """Is given notice when it is asked for the so-manieth time."""

    def __init__(self, folder: Path, *, asked: int) -> None:
        super().__init__(folder)
        self.left = asked

    def given(self) -> bool:
        self.left -= 1
        return self.left <= 0

    def save(self, checkpoint: Checkpoint | None) -> None:
        assert checkpoint is not None
        checkpoint.save(self.folder / "stopped")


# It is asked before each epoch and, here, after each of its eight steps.
@pytest.mark.parametrize(
    ("asked", "moment"),
    [
        (1, (0, 0)),
        (2, (0, 1)),
        (9 + 1 + 5, (1, 5)),
        (9 + 9, (2, 0)),  # all steps are done: the epoch is ended first
        (3 * 9 + 8, (3, 7)),
    ],
)
def test_stopped_at_any_step_and_resumed_equals_uninterrupted_bit_for_bit(
    tmp_path: Path,
    data_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    uninterrupted: tuple[FitResult, Recorder, ExperimentConfig],
    asked: int,
    moment: tuple[int, int],
) -> None:
    whole, recorder, config = uninterrupted
    monkeypatch.setattr(loop, "_LOOK_STEPS", 1)
    stopped = Notified(tmp_path / "before", asked=asked)
    with pytest.raises(StoppedError, match=f"step {moment[1]} of epoch|after epoch {moment[0]}"):
        fit(
            config,
            data_folder=data_folder,
            cache_dir=tmp_path / "cache",
            reporter=stopped,
            device=CPU,
            notice=stopped,
        )
    left_behind = list(stopped.folder.glob("*"))
    newest = newest_valid(left_behind)
    assert (read_state(newest).progress if newest else (0, 0)) == moment
    resumed, _ = train(config, data_folder, tmp_path, newest)
    assert timeless(resumed.history) == timeless(whole.history)
    for name in ("model.safetensors", "optimizer.safetensors", "best/model.safetensors"):
        of_whole = load_file(recorder.folder / "epoch-4" / name)
        of_resumed = load_file(tmp_path / "epoch-4" / name)
        assert all(torch.equal(of_whole[key], of_resumed[key]) for key in of_whole), name


def test_notice_that_comes_in_the_last_step_does_not_spoil_the_end(
    tmp_path: Path,
    data_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    uninterrupted: tuple[FitResult, Recorder, ExperimentConfig],
) -> None:
    whole, _, config = uninterrupted
    monkeypatch.setattr(loop, "_LOOK_STEPS", 1)
    late = Notified(tmp_path, asked=4 * 9)
    result = fit(
        config,
        data_folder=data_folder,
        cache_dir=tmp_path / "cache",
        reporter=late,
        device=CPU,
        notice=late,
    )
    assert late.left == 0
    assert timeless(result.history) == timeless(whole.history)
    assert not (tmp_path / "stopped").exists()


def test_the_threads_of_an_epoch_are_chosen_and_told_and_do_not_depend_on_the_machine(
    tmp_path: Path,
    data_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    uninterrupted: tuple[FitResult, Recorder, ExperimentConfig],
) -> None:
    whole, recorder, config = uninterrupted
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    torch.set_num_threads(2)
    try:
        _, of_two = train(config, data_folder, tmp_path)
        assert timeless(of_two.reports[-1].history) == timeless(whole.history)
        assert {row["train/threads"] for row in of_two.reports[-1].history} == {1}
        assert torch.get_num_threads() == 2

        monkeypatch.setenv("OMP_NUM_THREADS", "2")
        shutil.copytree(recorder.folder / "epoch-3", tmp_path / "begun")
        resumed, _ = train(config, data_folder, tmp_path / "on", tmp_path / "begun")
        assert [row["train/threads"] for row in resumed.history] == [1, 1, 1, 2]
        assert "goes on with 2 threads, and has had 1 so far" in caplog.text
    finally:
        torch.set_num_threads(1)


def test_training_learns(uninterrupted: tuple[FitResult, Recorder, ExperimentConfig]) -> None:
    result, _, _ = uninterrupted
    losses = [entry["train/loss"] for entry in result.history]
    # The first epoch sums over all negatives; the others are comparable.
    assert losses[-1] < losses[1]
    assert result.best_rsum == max(entry["val/rsum"] for entry in result.history)


def test_finished_run_is_not_trained_again(
    tmp_path: Path,
    data_folder: Path,
    uninterrupted: tuple[FitResult, Recorder, ExperimentConfig],
) -> None:
    whole, recorder, config = uninterrupted
    resumed, again = train(config, data_folder, tmp_path, recorder.folder / "epoch-4")
    assert again.reports == []
    assert resumed == whole


def test_best_model_scores_as_it_did_in_training(
    tmp_path: Path,
    data_folder: Path,
    uninterrupted: tuple[FitResult, Recorder, ExperimentConfig],
) -> None:
    result, recorder, config = uninterrupted
    metrics = evaluate_checkpoint(
        recorder.folder / "epoch-4",
        data_folder=data_folder,
        split="dev",
        protocol="full",
        cache_dir=tmp_path,
        device=CPU,
        num_regions=config.data.num_regions,
        batch_size=config.evaluation.batch_size,
    )
    assert metrics.rsum == result.best_rsum


@pytest.mark.parametrize("damage", ["cut", "flip", "no manifest", "missing", "no folder"])
def test_damaged_checkpoint_is_refused_and_an_older_one_found(
    tmp_path: Path,
    uninterrupted: tuple[FitResult, Recorder, ExperimentConfig],
    data_folder: Path,
    damage: str,
) -> None:
    _, recorder, config = uninterrupted
    folders = [tmp_path / f"epoch-{epoch}" for epoch in (2, 3)]
    for folder in folders:
        shutil.copytree(recorder.folder / folder.name, folder)
    victim = folders[1] / "model.safetensors"
    content = victim.read_bytes()
    if damage == "cut":
        victim.write_bytes(content[:-10])
    elif damage == "flip":
        victim.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    elif damage == "missing":
        victim.unlink()
    elif damage == "no folder":
        shutil.rmtree(folders[1])
    else:
        (folders[1] / "manifest.json").unlink()
    assert newest_valid(folders) == folders[0]
    with pytest.raises(CheckpointError, match="epoch-3"):
        train(config, data_folder, tmp_path / "out", folders[1])


def test_checkpoint_of_another_experiment_is_refused(
    tmp_path: Path,
    data_folder: Path,
    uninterrupted: tuple[FitResult, Recorder, ExperimentConfig],
) -> None:
    _, recorder, config = uninterrupted
    other = config.with_overrides({"loss.margin": 0.3})
    with pytest.raises(CheckpointError, match=r"loss\.margin was 0\.2, is 0\.3"):
        train(other, data_folder, tmp_path, recorder.folder / "epoch-2")
    longer = config.with_overrides({"optim.epochs": 5})
    result, _ = train(longer, data_folder, tmp_path, recorder.folder / "epoch-4")
    assert len(result.history) == 5


def test_checkpoint_holds_the_state_it_was_given(
    uninterrupted: tuple[FitResult, Recorder, ExperimentConfig],
) -> None:
    result, recorder, config = uninterrupted
    state = read_state(recorder.folder / "epoch-4")
    assert state.config == config
    assert state.history == result.history
    assert (state.best_rsum, state.best_epoch) == (result.best_rsum, result.best_epoch)


def test_loss_that_is_not_finite_stops_the_run(
    tmp_path: Path, data_folder: Path, tiny_config: ExperimentConfig
) -> None:
    hopeless = tiny_config.with_overrides({"optim.learning_rate": 1.0, "optim.clip_norm": 1e30})

    class Poisoned(Recorder):
        def report(self, report: EpochReport, checkpoint: Checkpoint | None) -> None:
            assert checkpoint is not None
            with torch.no_grad():
                checkpoint.model.word_projection.weight.fill_(float("nan"))

    with pytest.raises(
        DivergedError, match=r"loss is nan at step \d of epoch 2: learning rates \[1\.0\]"
    ):
        fit(
            hopeless,
            data_folder=data_folder,
            cache_dir=tmp_path,
            reporter=Poisoned(tmp_path),
            device=CPU,
        )


def test_early_stop_ends_the_run_after_its_patience(
    tmp_path: Path, data_folder: Path, tiny_config: ExperimentConfig
) -> None:
    # A learning rate too small to change any rank: the first epoch stays the best.
    config = tiny_config.with_overrides(
        {"optim.patience": 2, "optim.epochs": 9, "optim.learning_rate": 1e-12}
    )
    result, recorder = train(config, data_folder, tmp_path)
    assert [report.stopped_early for report in recorder.reports] == [False, False, True]
    assert result.best_epoch == 1
    again, more = train(config, data_folder, tmp_path, tmp_path / "epoch-3")
    assert again == result
    assert more.reports == []


def test_collapse_is_reported(
    caplog: pytest.LogCaptureFixture, tiny_config: ExperimentConfig
) -> None:
    with caplog.at_level(logging.WARNING):
        loop._warn_if_collapsed(0.4001, "hardest", tiny_config, epoch=3)
    assert "stuck at twice the margin" in caplog.text
    caplog.clear()
    loop._warn_if_collapsed(0.35, "hardest", tiny_config, epoch=3)
    loop._warn_if_collapsed(0.4, "all", tiny_config, epoch=1)
    assert caplog.text == ""


def test_saved_model_is_whole(
    tmp_path: Path, uninterrupted: tuple[FitResult, Recorder, ExperimentConfig]
) -> None:
    _, recorder, config = uninterrupted
    model = Cpfean.from_pretrained(recorder.folder / "epoch-4" / "best")
    assert model.config == config.model
    model.save_pretrained(tmp_path)
    again = Cpfean.from_pretrained(tmp_path)
    assert all(
        torch.equal(tensor, again.state_dict()[name]) for name, tensor in model.state_dict().items()
    )
    (tmp_path / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(CheckpointError, match="damaged"):
        Cpfean.from_pretrained(tmp_path)


def test_a_model_knows_on_which_words_the_training_captions_agree(
    data_folder: Path, tmp_path: Path
) -> None:
    experiment = open_experiment(
        tiny_experiment(), data_folder=data_folder, cache_dir=tmp_path, device=CPU
    )
    found, train = experiment.model.consensus, experiment.train
    assert found is not None
    image_of = np.array([train.split.image_of(k) for k in range(len(train))])
    expected = word_consensus(train.tokens, image_of, num_pieces=len(found))
    expected[experiment.tokenizer.mask_id] = 0.0
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-6)
    assert len(np.unique(expected)) > 10
