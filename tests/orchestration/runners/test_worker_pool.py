"""Workers that stay, on a real Ray: one trial after another, and what goes wrong."""

import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from cpfean.config import ExperimentConfig
from cpfean.data.sources import resolve_data
from cpfean.records.run_folder import RunFolder
from cpfean.records.trial_record import TrialRecord
from orchestration.settings import ENVIRONMENT, Settings
from tests.faults import actors
from tests.orchestration.runners.by_hand import ByHand
from tests.orchestration.samples import TINY

ROOT = Path(__file__).resolve().parents[3]


class Killing(ByHand):
    """Kills a worker once, when its trial has come to an epoch."""

    def __init__(
        self, folder: Path, configs: list[ExperimentConfig], *, kill: tuple[int, int]
    ) -> None:
        super().__init__(folder, configs)
        self.kill = kill
        self.workers: dict[int, list[int]] = {}

    def begun(self, number: int, workers: int) -> None:
        # Each pool has one worker.
        (worker,) = actors("RayTrainWorker", of=os.getpid())
        self.workers.setdefault(number, []).append(worker)

    def after_epoch(self, number: int, epoch: int) -> None:
        if (number, epoch) == self.kill:
            self.kill = (-1, -1)
            os.kill(self.workers[number][-1], signal.SIGKILL)


def spoilt_data(config: ExperimentConfig, folder: Path) -> Path:
    """Data with infinite features, which only the check before a study would refuse."""
    made = resolve_data(config.data, cache_dir=folder / "cache")
    copy = folder / "spoilt"
    shutil.copytree(made, copy)
    file = copy / "train_ims.npy"
    np.save(file, np.full_like(np.load(file), np.inf))
    return copy


def rsums(record: TrialRecord) -> list[tuple[float, float]]:
    return [(row["train/loss"], row["val/rsum"]) for row in record.history]


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.timeout(900)
def test_workers_that_stay_train_as_fresh_ones_do_and_are_replaced_when_they_fail(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray

    from orchestration.cluster import connection

    base = TINY.with_overrides({"optim.epochs": 3, "loss.warmup_epochs": 0})
    configs = [
        base.with_overrides({"loss.margin": 0.1, "seed": 3}),
        base.with_overrides({"model.dim": 32}),
        base.with_overrides({"seed": 4}),  # its worker is killed
        base.with_overrides({"data.path": str(spoilt_data(base, tmp_path))}),  # it diverges
        base.with_overrides({"seed": 5}),
    ]
    study = Killing(tmp_path, configs, kill=(2, 1))
    records = study.records
    where = Settings(output=tmp_path, cache_dir=tmp_path / "cache", tracking_uri="")
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    connection.connect(where)
    try:
        before = ray.available_resources()["CPU"]
        study.run(cache_dir=where.cache_dir)
        groups = ray.util.placement_group_table().values()
        assert {group["state"] for group in groups} == {"REMOVED"}
        assert before == ray.cluster_resources()["CPU"]
    finally:
        connection.disconnect()
    expected = ["finished", "finished", "finished", "diverged", "finished"]
    assert study.outcomes == list(enumerate(expected))
    assert "the loss is nan at step 1 of epoch 1" in study.messages[3]
    assert records[3].history == []
    assert [number for number, notes in study.notes.items() if notes] == [2]
    (note,) = study.notes[2]
    assert re.fullmatch(r"worker lost \(rank 0 on [\d.]+\), fenced; retry 1/3 from epoch 1\.", note)
    assert {row["train/workers"] for record in records for row in record.history} == {1}
    first, second, (third, again), failed, last = study.workers.values()
    assert first == second == [third]
    assert len({third, again, last[0]}) == 3
    assert failed == [again]  # and no second try

    # The second trial was trained where the first had been; here it is alone in a fresh process.
    (tmp_path / "second.toml").write_text(configs[1].to_toml())
    words = ["--config", "second.toml", "--name", "alone", "--output", "runs"]
    subprocess.run(
        [sys.executable, str(ROOT / "experiments/train.py"), *words],
        cwd=tmp_path,
        env=os.environ | {"CPFEAN_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"},
        check=True,
        capture_output=True,
    )
    (alone,) = RunFolder(tmp_path / "runs" / "alone").records()
    assert rsums(alone) == rsums(records[1])
