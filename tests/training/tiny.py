"""A configuration small enough to train in a second, for the tiny data of conftest.py."""

from __future__ import annotations

from pathlib import Path

import torch

from cpfean.config import ExperimentConfig
from cpfean.training.setup import open_experiment


def tiny_experiment() -> ExperimentConfig:
    return ExperimentConfig().with_overrides(
        {
            "data.num_regions": 8,
            "model.dim": 32,
            "model.regions.heads": 4,
            "model.text.scratch_dim": 32,
            "model.text.scratch_vocabulary": 300,
            "optim.epochs": 4,
            "optim.batch_size": 10,
            "optim.decay_epoch": 2,
            "optim.learning_rate": 1e-3,
            "evaluation.batch_size": 7,
        }
    )


def save_untrained(config: ExperimentConfig, data: Path, folder: Path) -> Path:
    """The folder of a model with the weights that training would start from."""
    experiment = open_experiment(
        config, data_folder=data, cache_dir=folder.parent, device=torch.device("cpu")
    )
    experiment.model.save_pretrained(folder)
    experiment.tokenizer.save(folder / "tokenizer")
    (folder / "config.toml").write_text(config.to_toml(), encoding="utf-8")
    return folder
