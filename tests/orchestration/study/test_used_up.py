"""A real sweep on a real Ray whose hours are used up in the middle."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from cpfean.records.budget import SPENT
from cpfean.records.run_folder import RunFolder
from orchestration.tracking.stores import open_store
from tests.environment import of_a_user
from tests.orchestration.samples import TINY

pytestmark = [pytest.mark.slow, pytest.mark.drill, pytest.mark.timeout(900)]

ROOT = Path(__file__).resolve().parents[3]
TRIALS, HOURS = 600, 0.012


def sweep(home: Path, *words: str) -> subprocess.CompletedProcess:
    (home / "tiny.toml").write_text(TINY.to_toml())
    mine = of_a_user()
    command = [sys.executable, str(ROOT / "experiments/sweep.py"), "--config", "tiny.toml"]
    command += ["--name", "s", "--trials", str(TRIALS), "--address", "local", *words]
    return subprocess.run(
        command,
        cwd=home,
        env=mine | {"CPFEAN_CACHE": str(home / "cache")},
        capture_output=True,
        text=True,
        timeout=600,
    )


def test_a_sweep_that_used_up_its_hours_ends_with_what_is_settled_and_nothing_runs(
    tmp_path: Path,
) -> None:
    first = sweep(tmp_path, "--max-hours", str(HOURS))
    assert first.returncode == 0, first.stdout + first.stderr
    assert f"--max-hours {HOURS:g} is used up" in first.stdout
    assert "to go on with twice as much:\n" in first.stdout
    folder = RunFolder(tmp_path / "runs" / "s")
    records = folder.records()
    assert 0 < len(records) < TRIALS
    assert all(record.settled for record in records)
    summary = json.loads((folder.path / "summary.json").read_text())
    assert summary["best"] is not None
    assert summary["test"]

    client, experiment = open_store(f"sqlite:///{tmp_path / 'runs' / 'mlflow.db'}")
    runs = client.search_runs([experiment])
    assert len(runs) == len(records) + 1
    assert {run.info.status for run in runs} == {"FINISHED"}
    (parent,) = (run for run in runs if run.data.tags["cpfean.role"] == "parent")
    assert "is used up" in parent.data.tags["cpfean.used_up"]
    spent = json.loads((folder.path / SPENT).read_text())["seconds"] / 3600
    assert parent.data.metrics["study/hours"] == pytest.approx(spent, rel=0.01)
    assert spent >= HOURS

    # The limit as it was: nothing is begun, and Ray is not started for it.
    again = sweep(tmp_path, "--resume", "--max-hours", str(HOURS))
    assert again.returncode == 0, again.stdout + again.stderr
    assert "at a time" not in again.stdout
    assert folder.records() == records

    # A larger one: more trials are settled, and those that were are as they were.
    more = sweep(tmp_path, "--resume", "--max-hours", str(spent + 0.01))
    assert more.returncode == 0, more.stdout + more.stderr
    assert len(folder.records()) > len(records)
    assert folder.records()[: len(records)] == records
