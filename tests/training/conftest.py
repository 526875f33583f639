"""A tiny synthetic data folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from cpfean.config import ExperimentConfig, SyntheticConfig
from cpfean.data.synthetic import write_synthetic
from tests.training.tiny import tiny_experiment

TINY = SyntheticConfig(
    train_images=16, dev_images=6, test_images=6, num_regions=8, feature_dim=16, feature_noise=0.2
)


@pytest.fixture(scope="session")
def data_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "tiny"
    write_synthetic(folder, TINY)
    return folder


@pytest.fixture
def tiny_config() -> ExperimentConfig:
    return tiny_experiment()
