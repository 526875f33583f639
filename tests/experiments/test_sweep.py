"""sweep.py as a user runs it, in this process, and the report at its end."""

from __future__ import annotations

import shutil
from pathlib import Path

from mlflow import MlflowClient

from orchestration.tracking.stores import open_store
from tests.experiments.conftest import Run
from tests.orchestration.samples import TINY

WORDS = ["--config", "tiny.toml", "--in-process", "--name", "s", "--trials", "3"]
FILES = {
    "importance.csv",
    "importance.md",
    "slice-data.region_dropout.png",
    "slice-loss.margin.png",
    "slice-optim.learning_rate.png",
    "slice-optim.weight_decay.png",
}


def test_a_sweep_ends_with_a_report_that_mlflow_has_and_a_resume_writes_anew(
    run: Run, tmp_path: Path
) -> None:
    (tmp_path / "tiny.toml").write_text(TINY.with_overrides({"optim.epochs": 1}).to_toml())
    first = run("sweep.py", *WORDS, "--space", "optimizer")
    assert first.returncode == 0, first.stderr
    folder = tmp_path / "runs" / "s"
    assert f"tables, plots   {folder / 'report'}\n" in first.stdout
    assert {file.name for file in (folder / "report").iterdir()} == FILES
    told = (folder / "report" / "importance.md").read_text()
    assert told.startswith("No importance is given: 3 trials (0 stopped early) are too few")

    uri = f"sqlite:///{tmp_path / 'runs' / 'mlflow.db'}"
    _, experiment = open_store(uri)
    client = MlflowClient(uri)
    found = client.search_runs([experiment])
    (parent,) = (one for one in found if one.data.tags["cpfean.role"] == "parent")
    assert {file.path for file in client.list_artifacts(parent.info.run_id)} == FILES
    data = {one.dataset.digest for each in found for one in each.inputs.dataset_inputs}
    assert len(found) == 4
    assert data == {parent.data.tags["cpfean.data"]}

    shutil.rmtree(folder / "report")
    again = run("sweep.py", *WORDS, "--space", "optimizer", "--resume")
    assert again.returncode == 0, again.stderr
    assert "epoch 1/1" not in again.stdout
    assert {file.name for file in (folder / "report").iterdir()} == FILES
