"""A run of train.py on tiny data, as others would publish it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from cpfean.config import ExperimentConfig
from cpfean.data.split import data_fingerprint
from cpfean.data.synthetic import write_synthetic
from cpfean.records.run_folder import RunFolder
from cpfean.records.trial_record import TrialRecord
from cpfean.training.setup import test_split_metrics as metrics_of_test
from cpfean.writing import write_json
from tests.training.conftest import TINY
from tests.training.tiny import save_untrained, tiny_experiment

VERSIONS = {"python": "3.11.7", "torch": "2.13.0"}


def write_run(folder: Path, config: ExperimentConfig, data: Path) -> Path:
    """The folder of a run whose best model has the weights that training starts from.

    Its figures on the test split are that model's.
    """
    run = RunFolder(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    run.create(
        {"kind": "train", "data_fingerprint": data_fingerprint(data)},
        commit="c0ffee",
        versions=VERSIONS,
    )
    save_untrained(config, data, folder / "best_model")
    test = metrics_of_test(
        folder / "best_model",
        config,
        data_folder=data,
        cache_dir=folder.parent / "cache",
        device=torch.device("cpu"),
    )
    record = TrialRecord(
        number=0,
        name=folder.name,
        config=config.to_dict(),
        state="finished",
        history=[{"epoch": 1, "val/rsum": 123.4, "train/loss": 1.0}],
        test=test,
    )
    run.write(record)
    write_json(folder / "summary.json", {"best": 0, "test": test})
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("publishing") / "tiny-set"
    write_synthetic(folder, TINY)
    return folder


@pytest.fixture(scope="module")
def config(data: Path) -> ExperimentConfig:
    return tiny_experiment().with_overrides({"data.path": str(data)})


@pytest.fixture(scope="module")
def run_folder(data: Path, config: ExperimentConfig) -> Path:
    return write_run(data.parent / "runs" / "my-run", config, data)
