"""A real sweep on a real Ray, its driver stopped and killed; then three records are compared."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
from mlflow import MlflowClient

from cpfean.config import ExperimentConfig
from cpfean.records.run_folder import RunFolder
from cpfean.records.trial_record import TrialRecord
from orchestration.tracking.stores import open_store
from tests.environment import FAIR, of_a_user
from tests.faults import actors
from tests.orchestration.samples import TINY

# Three minutes on a quiet machine with two cores.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

ROOT = Path(__file__).resolve().parents[3]
SHORT = TINY.with_overrides({"optim.epochs": 4, "loss.warmup_epochs": 0})
# Epochs of about a second: a random moment lies in one of them.
LONGER = SHORT.with_overrides({"optim.epochs": 6, "data.synthetic.train_images": 400})


class Driver:
    """`sweep.py`, started anew as often as it is stopped."""

    def __init__(
        self, home: Path, *, config: ExperimentConfig, trials: int, workers: int, **environment: str
    ) -> None:
        self.home = home
        self.trials = trials
        self.epochs = config.optim.epochs
        (home / "config.toml").write_text(config.to_toml())
        self.folder = RunFolder(home / "runs" / "s")
        self.log = home / "log"
        self.snapshots: list[list[TrialRecord]] = []
        self._words = ["--trials", str(trials), "--workers", str(workers)]
        self._environment = of_a_user() | FAIR | {"CPFEAN_CACHE": str(home / "cache")} | environment

    def start(self, *more: str) -> subprocess.Popen[bytes]:
        words = ["--config", "config.toml", "--name", "s", *self._words, *more]
        with self.log.open("ab") as log:
            return subprocess.Popen(
                [sys.executable, str(ROOT / "experiments/sweep.py"), *words],
                cwd=self.home,
                env=self._environment,
                stdout=log,
                stderr=log,
            )

    def wait_until(self, driver: subprocess.Popen[bytes], now: Callable[[], bool]) -> None:
        end = time.monotonic() + 400
        while not now():
            assert driver.poll() is None, self.log.read_text()
            assert time.monotonic() < end, self.log.read_text()
            time.sleep(0.05)

    def kill(self, driver: subprocess.Popen[bytes], now: Callable[[], bool]) -> None:
        """Kills the driver, without a chance to tidy up, when the records say so."""
        self.wait_until(driver, now)
        driver.send_signal(signal.SIGKILL)
        driver.wait()
        self.snapshots.append(self.records())

    def stop(
        self, driver: subprocess.Popen[bytes], number: signal.Signals, now: Callable[[], bool]
    ) -> float:
        """Asks the driver to stop when the records say so; returns the seconds that it took."""
        self.wait_until(driver, now)
        asked = time.monotonic()
        driver.send_signal(number)
        assert driver.wait(timeout=60) == 128 + number, self.log.read_text()
        self.snapshots.append(self.records())
        return time.monotonic() - asked

    def records(self) -> list[TrialRecord]:
        return self.folder.records()

    def epochs_recorded(self) -> int:
        """Epochs that need not be trained any more."""
        return sum(self.epochs if record.settled else record.epochs for record in self.records())

    def attempts(self) -> dict[int, list[str]]:
        """Which of Tune's experiments, one for each driver, ran each trial."""
        attempts: dict[int, list[str]] = {}
        for path in sorted(self.folder.path.glob("tune/attempt-*/[0-9][0-9][0-9]")):
            attempts.setdefault(int(path.name), []).append(path.parent.name)
        return attempts

    def tracked(self) -> tuple[MlflowClient, list[Any]]:
        """MLflow, and all runs that it has."""
        uri = f"sqlite:///{self.home / 'runs' / 'mlflow.db'}"
        _, experiment = open_store(uri)
        client = MlflowClient(uri)
        return client, list(client.search_runs([experiment]))


def check_the_three_records_agree(driver: Driver) -> None:
    """After the end: all trials settled, nothing of before lost or changed, MLflow tells the same.

    Raises:
        AssertionError: something is not so.
    """
    after = driver.records()

    # Our records: every trial once and for good, nothing that was there has changed.
    assert [record.number for record in after] == list(range(driver.trials))
    assert all(record.state in ("finished", "pruned") for record in after)
    for record in after:
        assert [row["epoch"] for row in record.history] == list(range(1, record.epochs + 1))
        assert record.state == "pruned" or record.epochs == driver.epochs
    for old in [record for snapshot in driver.snapshots for record in snapshot]:
        new = after[old.number]
        assert new.history[: old.epochs] == old.history  # no epoch was trained again
        assert new.overrides == old.overrides
        assert not old.settled or (new.state, new.seconds) == (old.state, old.seconds)

    # The tracker's: a run for each trial, in its true state, each step once.
    client, runs = driver.tracked()
    assert len(runs) == driver.trials + 1
    assert {run.info.status for run in runs} == {"FINISHED"}
    (parent,) = (run for run in runs if run.data.tags["cpfean.role"] == "parent")
    for run in runs:
        if run is parent:
            continue
        record = after[int(run.data.tags["cpfean.trial"])]
        assert run.data.tags["mlflow.parentRunId"] == parent.info.run_id
        assert run.data.tags["cpfean.state"] == record.state
        points = client.get_metric_history(run.info.run_id, "val/rsum")
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

    # What optuna-dashboard shows.
    (name,) = optuna.get_all_study_names(shown := f"sqlite:///{driver.folder.path / 'study.db'}")
    states = {"finished": "COMPLETE", "pruned": "PRUNED", "failed": "FAIL"}
    told = [trial.state.name for trial in optuna.load_study(study_name=name, storage=shown).trials]
    assert told == [states[record.state] for record in after]


@pytest.mark.long
def test_a_sweep_that_is_killed_stopped_and_killed_ends_as_if_it_had_not_been(
    tmp_path: Path,
) -> None:
    driver = Driver(tmp_path, config=SHORT, trials=3, workers=2)
    # Before Tune has taken note of anything, and before a trial is recorded.
    driver.kill(driver.start(), lambda: driver.folder.identity_file.exists())
    assert driver.records() == []
    # In the middle of the first trial, by SIGTERM, on which Ray has a handler of its own.
    seconds = driver.stop(
        driver.start("--resume"),
        signal.SIGTERM,
        lambda: any(record.epochs >= 1 for record in driver.records()),
    )
    print(f"stopped in {seconds:.1f} s")
    assert seconds <= 10
    (cut_off,) = driver.records()
    assert cut_off.state == "interrupted"
    told = driver.log.read_text()
    assert re.search(r"continue with:\n.*sweep\.py .*--resume --name s$", told, re.MULTILINE)
    _, runs = driver.tracked()
    assert [(run.info.status, run.data.tags["cpfean.state"]) for run in runs] == [
        ("KILLED", "interrupted")
    ] * 2
    # In the middle of the second one, while the first is settled.
    driver.kill(
        driver.start("--resume"),
        lambda: (
            any(record.settled for record in driver.records())
            and any(r.state == "running" and r.epochs >= 1 for r in driver.records())
        ),
    )
    settled = {record.number for record in driver.snapshots[-1] if record.settled}
    assert settled
    attempts = driver.attempts()
    # What has the name of a checkpoint and is none is passed over, and the user hears of it.
    (cut_off,) = [record for record in driver.snapshots[-1] if record.state == "running"]
    foreign = driver.folder.path / "train" / f"s-{cut_off.number:03d}" / "epoch-9999"
    foreign.mkdir()
    assert driver.start("--resume").wait(timeout=600) == 0, driver.log.read_text()
    said = driver.log.read_text()
    assert f"{cut_off.name}: {foreign} is passed over: " in said
    assert re.search(rf"{cut_off.name}: {foreign.parent}/epoch-000\S+ is used instead", said)

    check_the_three_records_agree(driver)
    # Tune's: what was settled was not run again.
    assert all(driver.attempts()[number] == attempts[number] for number in settled)
    assert set(driver.attempts()) == set(range(driver.trials))
    assert re.search(r"mlflow ui --backend-store-uri sqlite:///", driver.log.read_text())
    # Nothing but what was asked for: nothing is left to resume.
    after, attempts = driver.records(), driver.attempts()
    again = driver.start("--resume")
    assert again.wait(timeout=120) == 0
    assert (driver.attempts(), driver.records()) == (attempts, after)


class Saves:
    """Takes note of every checkpoint that is completed, while it is there."""

    def __init__(self, folder: Path) -> None:
        self.seen: set[tuple[str, str, int]] = set()
        self._folder = folder
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    def __enter__(self) -> "Saves":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._end.wait(0.02):
            for file in self._folder.glob("train/s-*/epoch-*/manifest.json"):
                try:
                    written = file.stat().st_mtime_ns
                except FileNotFoundError:
                    continue  # only the newest two are kept
                self.seen.add((file.parts[-3], file.parts[-2], written))

    def times_saved(self) -> dict[str, Counter[int]]:
        """For each trial, how often each of its epochs was saved."""
        counted: dict[str, Counter[int]] = {}
        for trial, name, _ in self.seen:
            # epoch-0004.2 is what the second attempt saved.
            epoch, _, _ = name.removeprefix("epoch-").partition(".")
            counted.setdefault(trial, Counter())[int(epoch)] += 1
        return counted


@pytest.mark.drill
def test_a_sweep_whose_driver_is_killed_at_five_random_points_ends_as_if_it_had_not_been(
    tmp_path: Path,
) -> None:
    seed = int(os.environ.get("CPFEAN_DRILL_SEED") or time.time_ns() % 2**32)
    print(f"CPFEAN_DRILL_SEED={seed}")
    chance = random.Random(seed)
    driver = Driver(tmp_path, config=LONGER, trials=4, workers=1)
    shares = sorted(chance.uniform(0.0, 0.8) for _ in range(3))
    # Two while the driver starts or takes up its trials again, three by what is recorded.
    kinds = chance.sample(["starting"] * 2 + ["training"] * 3, k=5)
    with Saves(driver.folder.path) as saves:
        for number, kind in enumerate(kinds):
            process = driver.start(*(["--resume"] if driver.folder.identity_file.exists() else []))
            if kind == "training":
                epochs = round(shares.pop(0) * driver.trials * driver.epochs)
                driver.wait_until(process, lambda e=epochs: driver.epochs_recorded() >= max(1, e))
                moment = time.monotonic() + chance.uniform(0.0, 2.0)
            else:
                moment = time.monotonic() + chance.uniform(0.0, 20.0)
            driver.kill(process, lambda m=moment: time.monotonic() >= m)
            states = [f"{r.name} {r.state} {r.epochs}" for r in driver.records()]
            print(f"kill {number + 1}, {kind}: {', '.join(states) or 'nothing recorded'}")
        more = ["--resume"] if driver.folder.identity_file.exists() else []
        assert driver.start(*more).wait(timeout=600) == 0, driver.log.read_text()
    check_the_three_records_agree(driver)
    # An epoch that was saved is never trained again: what a kill costs is the epoch it falls into.
    saved = saves.times_saved()
    print("epochs saved:", {trial: dict(sorted(times.items())) for trial, times in saved.items()})
    for record in driver.records():
        assert saved[f"s-{record.number:03d}"] == Counter(range(1, record.epochs + 1))


@pytest.mark.drill
def test_a_second_signal_ends_a_sweep_at_once_and_the_first_saves_in_mid_epoch(
    tmp_path: Path,
) -> None:
    config = LONGER.with_overrides({"optim.epochs": 3, "data.synthetic.train_images": 2000})
    driver = Driver(tmp_path, config=config, trials=2, workers=1)
    process = driver.start()
    driver.wait_until(process, lambda: driver.epochs_recorded() >= 1)
    process.send_signal(signal.SIGINT)
    driver.wait_until(process, lambda: "once more to stop at once" in driver.log.read_text())
    asked = time.monotonic()
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=10) == 128 + signal.SIGTERM
    print(f"stopped in {time.monotonic() - asked:.1f} s")
    driver.snapshots.append(driver.records())
    seconds = driver.stop(
        driver.start("--resume"),
        signal.SIGINT,
        lambda: driver.epochs_recorded() > sum(r.epochs for r in driver.snapshots[-1]),
    )
    print(f"stopped in {seconds:.1f} s")
    assert seconds <= 10
    saved = [path.parent for path in driver.folder.path.glob("train/s-*/epoch-*-*/manifest.json")]
    print("saved in mid-epoch:", *saved)
    assert saved
    assert driver.start("--resume").wait(timeout=600) == 0, driver.log.read_text()
    check_the_three_records_agree(driver)


@pytest.mark.drill
def test_a_sweep_of_which_a_worker_is_killed_goes_on_and_the_records_agree(tmp_path: Path) -> None:
    driver = Driver(tmp_path, config=LONGER, trials=2, workers=2)
    process = driver.start()
    driver.wait_until(process, lambda: driver.epochs_recorded() >= 2)
    driver.snapshots.append(driver.records())
    os.kill(actors("RayTrainWorker", of=process.pid)[-1], signal.SIGKILL)
    driver.wait_until(process, lambda: "retry 1/3" in driver.log.read_text())
    (told,) = re.findall(r"trial-\d+: worker lost \(rank \d on .*", driver.log.read_text())
    print(told)
    assert re.search(r"fenced; retry 1/3 from epoch [1-6]\.", told)
    # And the process that hands the trial on to workers.
    driver.wait_until(process, lambda: driver.epochs_recorded() >= driver.epochs + 2)
    driver.snapshots.append(driver.records())
    (process_of_a_trial,) = actors("ResourceTrainable", of=process.pid)  # as Tune calls it
    os.kill(process_of_a_trial, signal.SIGKILL)
    assert process.wait(timeout=600) == 0, driver.log.read_text()
    assert "trial-001: its process was lost; retry 1/3." in driver.log.read_text()
    check_the_three_records_agree(driver)


@pytest.mark.drill
def test_a_sweep_whose_trials_all_diverge_stops_and_says_so(tmp_path: Path) -> None:
    driver = Driver(tmp_path, config=SHORT, trials=5, workers=2)
    process = driver.start()
    # Spoilt once they have been checked, and before a worker reads them.
    driver.wait_until(process, lambda: "trial(s) to run" in driver.log.read_text())
    (features,) = tmp_path.glob("cache/synthetic-*/train_ims.npy")
    np.save(features, np.full_like(np.load(features), np.inf))
    assert process.wait(timeout=600) == 4, driver.log.read_text()
    told = driver.log.read_text()
    print(told)
    assert "the first 3 trials failed alike (diverged)" in told
    assert "the loss is nan at step 1 of epoch 1" in told
    line = r"continue with:\n.*sweep\.py .*--resume --retry-failed --name s$"
    assert re.search(line, told, re.MULTILINE)
    assert "Traceback" not in told
    assert [record.failure for record in driver.records()] == ["diverged"] * 3
    check_failures_are_told(driver)


def check_failures_are_told(driver: Driver) -> None:
    """MLflow has the records' states, classes and points, and nothing runs.

    Raises:
        AssertionError: something is not so.
    """
    client, runs = driver.tracked()
    (parent,) = (run for run in runs if run.data.tags["cpfean.role"] == "parent")
    assert parent.info.status != "RUNNING"
    told = {int(run.data.tags["cpfean.trial"]): run for run in runs if run is not parent}
    records = driver.records()
    assert set(told) == {record.number for record in records}
    for record in records:
        run = told[record.number]
        assert run.info.status == ("FAILED" if record.state == "failed" else "FINISHED")
        assert run.data.tags.get("cpfean.failure", "") == record.failure
        points = client.get_metric_history(run.info.run_id, "val/rsum")
        assert [(point.step, point.value) for point in points] == [
            (row["epoch"], row["val/rsum"]) for row in record.history
        ]
