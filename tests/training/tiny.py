"""A configuration small enough to train in a second, for the tiny data of conftest.py."""

from __future__ import annotations

from cpfean.config import ExperimentConfig


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
