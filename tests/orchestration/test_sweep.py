"""A real sweep on a real Ray, its driver killed three times; then three records are compared."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from mlflow import MlflowClient

from orchestration.records import RunFolder, TrialRecord
from orchestration.tracking import open_store
from tests.orchestration.samples import TINY

# Three minutes on a quiet machine with two cores.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

ROOT = Path(__file__).resolve().parents[2]
TRIALS, EPOCHS = 3, 4


class Driver:
    """`sweep.py`, started anew as often as it is killed."""

    def __init__(self, home: Path) -> None:
        self.home = home
        config = TINY.with_overrides({"optim.epochs": EPOCHS, "loss.warmup_epochs": 0})
        (home / "tiny.toml").write_text(config.to_toml())
        self.folder = RunFolder(home / "runs" / "s")
        self.log = home / "log"

    def start(self, *more: str) -> subprocess.Popen[bytes]:
        words = ["--config", "tiny.toml", "--name", "s", "--trials", str(TRIALS), "--workers", "2"]
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "MLFLOW_"))}
        with self.log.open("ab") as log:
            return subprocess.Popen(
                [sys.executable, str(ROOT / "experiments/sweep.py"), *words, *more],
                cwd=self.home,
                env=environment | {"CPFEAN_CACHE": str(self.home / "cache")},
                stdout=log,
                stderr=log,
            )

    def kill_once(self, driver: subprocess.Popen[bytes], now: Callable[[], bool]) -> None:
        """Kills the driver, without a chance to tidy up, when the records say so."""
        end = time.monotonic() + 400
        while not now():
            assert driver.poll() is None, self.log.read_text()
            assert time.monotonic() < end, self.log.read_text()
            time.sleep(0.05)
        driver.send_signal(signal.SIGKILL)
        driver.wait()

    def records(self) -> list[TrialRecord]:
        return self.folder.records()


def ran_in(folder: RunFolder) -> dict[int, list[str]]:
    """Which of Tune's experiments, one for each driver, ran each trial."""
    attempts: dict[int, list[str]] = {}
    for path in sorted(folder.path.glob("tune/attempt-*/[0-9][0-9][0-9]")):
        attempts.setdefault(int(path.name), []).append(path.parent.name)
    return attempts


def test_a_sweep_whose_driver_is_killed_three_times_ends_as_if_it_had_not_been(
    tmp_path: Path,
) -> None:
    driver = Driver(tmp_path)
    # Before Tune has taken note of anything, and before a trial is recorded.
    driver.kill_once(driver.start(), lambda: (driver.folder.path / "study.db").exists())
    assert driver.records() == []
    # In the middle of the first trial.
    driver.kill_once(driver.start("--resume"), lambda: any(r.epochs >= 1 for r in driver.records()))
    # In the middle of the second one, while the first is settled.
    driver.kill_once(
        driver.start("--resume"),
        lambda: (
            any(r.settled for r in driver.records())
            and any(r.state == "running" and r.epochs >= 1 for r in driver.records())
        ),
    )
    before = driver.records()
    settled = {record.number for record in before if record.settled}
    assert settled
    attempts_before = ran_in(driver.folder)
    assert driver.start("--resume").wait(timeout=600) == 0, driver.log.read_text()
    after = driver.records()

    # Our records: every trial once and for good, nothing that was there has changed.
    assert [record.number for record in after] == list(range(TRIALS))
    assert all(record.state in ("finished", "pruned") for record in after)
    for record in after:
        assert [row["epoch"] for row in record.history] == list(range(1, record.epochs + 1))
        assert record.state == "pruned" or record.epochs == EPOCHS
    for old in before:
        new = after[old.number]
        assert new.history[: old.epochs] == old.history  # no epoch was trained again
        assert new.overrides == old.overrides
        assert not old.settled or (new.state, new.seconds) == (old.state, old.seconds)

    # Tune's: what was settled was not run again.
    for number in settled:
        assert ran_in(driver.folder)[number] == attempts_before[number]
    assert set(ran_in(driver.folder)) == set(range(TRIALS))

    # The tracker's: a run for each trial, in its true state, each step once.
    uri = f"sqlite:///{tmp_path / 'runs' / 'mlflow.db'}"
    client, experiment = open_store(uri)
    runs = client.search_runs([experiment])
    assert len(runs) == TRIALS + 1
    assert {run.info.status for run in runs} == {"FINISHED"}
    (parent,) = (run for run in runs if run.data.tags["cpfean.role"] == "parent")
    for run in runs:
        if run is parent:
            continue
        record = after[int(run.data.tags["cpfean.trial"])]
        assert run.data.tags["mlflow.parentRunId"] == parent.info.run_id
        assert run.data.tags["cpfean.state"] == record.state
        points = MlflowClient(uri).get_metric_history(run.info.run_id, "val/rsum")
        assert [(point.step, point.value) for point in points] == [
            (row["epoch"], row["val/rsum"]) for row in record.history
        ]

    # The end: one best trial, tested once, as files that go on.
    summary = json.loads((driver.folder.path / "summary.json").read_text())
    finished = [record for record in after if record.state == "finished"] or after
    assert after[summary["best"]].best_rsum == max(record.best_rsum for record in finished)
    assert parent.data.metrics["test/rsum"] == summary["test"]["rsum"]
    assert sum("test/rsum" in run.data.metrics for run in runs) == 2
    assert (driver.folder.path / "best_config.toml").exists()
    assert re.search(r"mlflow ui --backend-store-uri sqlite:///", driver.log.read_text())
    # Nothing but what was asked for: nothing is left to resume.
    again = driver.start("--resume")
    assert again.wait(timeout=120) == 0
    assert len(ran_in(driver.folder)) == TRIALS
    assert driver.records() == after
