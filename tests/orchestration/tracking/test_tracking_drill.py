"""Real sweeps on Ray: the tracking server killed for a third of the time, S3, full disks."""

import re
import shutil
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from statistics import mean, stdev

import pytest
from mlflow import MlflowClient

from cpfean.records.run_folder import RunFolder
from orchestration.tracking.stores import open_store
from tests.environment import of_a_user
from tests.faults import ObjectStore, TrackingServer, small_disk
from tests.lab.hosts import wait_until
from tests.orchestration.samples import TINY

pytestmark = [pytest.mark.slow, pytest.mark.drill, pytest.mark.timeout(1800)]

SCRIPT = Path(__file__).resolve().parents[3] / "experiments" / "sweep.py"
EPOCHS = 9
WINDOW_SECONDS, SETTLING_SECONDS = 20.0, 5.0

Epoch = tuple[int, int]  # a trial's number, and the epoch's
Window = tuple[float, float]  # from when to when


class Sweep:
    """One `sweep.py`, from its start to its end."""

    def __init__(
        self, home: Path, name: str, *, tracking: str, trials: int, **environment: str
    ) -> None:
        self.home = home
        self.trials = trials
        self.folder = RunFolder(home / "runs" / name)
        self.log = home / f"{name}.log"
        # Steps that take long enough for a window to hold several epochs, and they to be timed.
        config = TINY.with_overrides(
            {
                "optim.epochs": EPOCHS,
                "data.synthetic.train_images": 400,
                "loss.warmup_epochs": 0,
            }
        )
        (home / "tiny.toml").write_text(config.to_toml())
        self._words = ["--config", "tiny.toml", "--name", name, "--trials", str(trials)]
        # One trial at a time: which ones are stopped early does not depend on chance.
        self._words += ["--tracking-uri", tracking, "--workers", "2"]
        clean = of_a_user()
        self._environment = clean | {"CPFEAN_CACHE": str(home / "cache")} | environment
        self._recorded: dict[Epoch, float] = {}

    def start(self, *more: str) -> subprocess.Popen[bytes]:
        with self.log.open("ab") as log:
            driver = subprocess.Popen(
                [sys.executable, str(SCRIPT), *self._words, *more],
                cwd=self.home,
                env=self._environment,
                stdout=log,
                stderr=log,
            )
        threading.Thread(target=self._look, args=(driver,), daemon=True).start()
        return driver

    def _look(self, driver: subprocess.Popen[bytes]) -> None:
        """Takes note of when each epoch is recorded."""
        while driver.poll() is None:
            now = time.monotonic()
            for epoch in self.seconds:
                self._recorded.setdefault(epoch, now)
            time.sleep(0.1)

    @property
    def has_recorded(self) -> bool:
        """Whether an epoch has been recorded since it was started."""
        return bool(self._recorded)

    @property
    def seconds(self) -> dict[Epoch, float]:
        """What the steps of each epoch took."""
        return {
            (record.number, int(row["epoch"])): row["train/seconds"]
            for record in self.folder.records()
            for row in record.history
        }

    def within(self, window: Window) -> dict[Epoch, float]:
        """The epochs that began and were recorded in a window, and the seconds from the record of
        the one before to theirs, whoever waits for what."""
        began, ended = window
        return {
            (trial, epoch): at - self._recorded[trial, epoch - 1]
            for (trial, epoch), at in self._recorded.items()
            if epoch > 1 and began <= self._recorded[trial, epoch - 1] and at <= ended
        }


def disturbed(sweep: Sweep, server: TrackingServer) -> tuple[list[Window], list[Window]]:
    """Runs it, kills the server again and again, and holds it to be complete after a resume.

    Returns:
        When it had a server, and when none. What lies between is no part of either: to start a
        server takes ten seconds of a processor, which on a small machine the training goes without.
    """
    present: list[Window] = []
    away: list[Window] = []
    driver = sweep.start()

    def window() -> Window:
        began = time.monotonic()
        with suppress(subprocess.TimeoutExpired):
            driver.wait(timeout=WINDOW_SECONDS)
        return began, time.monotonic()

    wait_until(lambda: sweep.has_recorded, seconds=180, what=f"{sweep.log}")
    while True:
        present.append(window())
        if driver.poll() is not None:
            break
        server.kill()
        away.append(window())
        server.start()
        time.sleep(SETTLING_SECONDS)
    assert driver.returncode == 0, sweep.log.read_text()
    # Ends at once, with what was not sent before the end.
    assert sweep.start("--resume").wait() == 0, sweep.log.read_text()
    check_complete(sweep, server.url)
    lines = sweep.log.read_text().splitlines()
    assert sum("does not take our numbers" in line for line in lines) == 1
    return present, away


def check_complete(sweep: Sweep, uri: str) -> None:
    """Every point is in MLflow once, and every run is closed in its true state."""
    client, experiment = open_store(uri)
    records = sweep.folder.records()
    assert len(records) == sweep.trials
    runs = client.search_runs([experiment], f"tags.`cpfean.id` = '{sweep.folder.id}'")
    assert len(runs) == sweep.trials + 1
    assert {run.info.status for run in runs} == {"FINISHED"}
    for run in runs:
        if run.data.tags["cpfean.role"] == "trial":
            record = records[int(run.data.tags["cpfean.trial"])]
            assert run.data.tags["cpfean.state"] == record.state
            points = MlflowClient(uri).get_metric_history(run.info.run_id, "val/rsum")
            assert [(point.step, point.value) for point in points] == [
                (row["epoch"], row["val/rsum"]) for row in record.history
            ]


def test_a_server_that_is_away_a_third_of_the_time_costs_less_than_five_percent(
    tmp_path: Path,
) -> None:
    server = TrackingServer(tmp_path)
    server.start()
    sweep = Sweep(tmp_path, "hurt", tracking=server.url, trials=20)
    try:
        present, away = disturbed(sweep, server)
    finally:
        server.kill()
    # A machine's own speed drifts: each window without a server stands between two with one.
    steps, ratios = sweep.seconds, []
    for before, without, after in zip(present, away, present[1:], strict=False):
        parts = [sweep.within(window) for window in (before, without, after)]
        if min(map(len, parts)) < 3:
            continue
        # Of the steps alone, and of all that a trial waits for.
        times = [(mean(steps[epoch] for epoch in part), mean(part.values())) for part in parts]
        (a, b), (own, whole), (c, d) = times
        ratios.append((2 * own / (a + c), 2 * whole / (b + d)))
        print(f"{[len(part) for part in parts]} epochs, without to with: {ratios[-1]}")
    assert len(ratios) >= 4
    for what, of_all in zip(("steps", "all"), zip(*ratios, strict=True), strict=True):
        print(f"{what}: {mean(of_all):.3f} +- {stdev(of_all) / len(of_all) ** 0.5:.3f}")
        assert mean(of_all) <= 1.05


def test_a_sweep_whose_server_is_away_trains_the_same_epochs(tmp_path: Path) -> None:
    server = TrackingServer(tmp_path)
    server.start()
    clean, hurt = (
        Sweep(tmp_path, name, tracking=server.url, trials=4) for name in ("clean", "hurt")
    )
    try:
        assert clean.start().wait() == 0, clean.log.read_text()
        check_complete(clean, server.url)
        disturbed(hurt, server)
    finally:
        server.kill()
    assert set(hurt.seconds) == set(clean.seconds)


def test_a_sweep_has_its_data_and_checkpoints_in_an_object_store(tmp_path: Path) -> None:
    import fsspec

    from cpfean.data.sources import resolve_data

    store = ObjectStore(tmp_path)
    access = {
        "AWS_ENDPOINT_URL": store.url,
        "AWS_ACCESS_KEY_ID": "a",
        "AWS_SECRET_ACCESS_KEY": "b",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    try:
        store.make_bucket("bucket")
        made = resolve_data(TINY.data, cache_dir=tmp_path / "made")
        filesystem = fsspec.filesystem(
            "s3", key="a", secret="b", endpoint_url=store.url, skip_instance_cache=True
        )
        filesystem.put(str(made), "bucket/data", recursive=True)
        uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
        sweep = Sweep(
            tmp_path,
            "s",
            tracking=uri,
            trials=4,
            CPFEAN_STORAGE="s3://bucket/checkpoints",
            **access,
        )
        driver = sweep.start("--data", "s3://bucket/data")
        assert driver.wait() == 0, sweep.log.read_text()
        check_complete(sweep, uri)
        for record in sweep.folder.records():
            assert record.checkpoint.startswith(f"s3://bucket/checkpoints/{sweep.folder.id}/")
            folder = record.checkpoint.removeprefix("s3://").rpartition("/")[0]
            assert len(filesystem.glob(f"{folder}/epoch-*")) == 2
            assert filesystem.exists(f"{record.checkpoint}/manifest.json")
        assert (sweep.folder.path / "best_model" / "config.toml").exists()
    finally:
        store.stop()


@pytest.mark.parametrize("full", ["storage", "records"])
def test_a_sweep_whose_disk_gets_full_says_so(tmp_path: Path, full: str) -> None:
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    with small_disk(tmp_path / "disk", kilobytes=8192) as disk:
        storage = tmp_path / "storage" if full == "records" else disk
        storage.mkdir(exist_ok=True)
        sweep = Sweep(tmp_path, "s", tracking=uri, trials=4, CPFEAN_STORAGE=str(storage))
        if full == "records":
            (tmp_path / "runs").symlink_to(disk)
        driver = sweep.start()
        wait_until(lambda: len(sweep.seconds) >= 2, seconds=300, what="two epochs")
        with (disk / "filler").open("wb", buffering=0) as filler:
            filler.write(bytes(shutil.disk_usage(disk).free))
        code = driver.wait(timeout=600)
        told = sweep.log.read_text()
        assert "disk full" in told
        assert "Traceback" not in told
        if full == "records":
            assert code == 5, told
        else:
            assert code == 4, told
            assert "the first 3 trials failed alike (infra)" in told
            failed = [r for r in sweep.folder.records() if r.state == "failed"]
            assert {record.failure for record in failed} == {"infra"}
            assert re.search(r"epoch-\d+: disk full: .* free, .* needed", failed[0].message)
            assert re.search(r"epoch-\d+: disk full: .*; retry 1/3 from epoch", told)
        before = sweep.folder.records()
        assert any(record.epochs for record in before if record.state != "finished")
        (disk / "filler").unlink()
        driver = sweep.start("--resume", "--retry-failed")
        assert driver.wait(timeout=600) == 0, sweep.log.read_text()
        # What was saved before was not trained again: its times are those of then.
        after = sweep.folder.records()
        assert all(after[old.number].history[: old.epochs] == old.history for old in before)
        check_complete(sweep, uri)
