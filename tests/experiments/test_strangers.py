"""Whatever else lies in the folders that the commands work in is left as it is."""

import hashlib
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest
from mlflow import MlflowClient

from cpfean.data.sources import resolve_data
from tests.experiments.conftest import Run
from tests.orchestration.samples import TINY

ROOT = Path(__file__).resolve().parents[2]
ROUNDS, QUICK = 6, 1  # of killed commands: in all, and of them those that are always run

# Files of somebody else where ours would be looked for: names that ours have, had, or could have.
STRANGERS = (
    "runs/notes.txt",
    "runs/mlflow-artifacts/theirs.txt",
    "runs/.mlflow.db.unfinished",
    "runs/other/sweep.json",  # of another program, in a folder with a lock of its own
    "runs/other/lock",
    "runs/other/summary.json",
    "runs/mine/best_config.toml",
    "runs/mine/best_model/model.safetensors",
    "runs/results/theirs.json",
    "runs/pictures/ranks.csv",
    "runs/probe/curves.csv",
    "runs/tracking_server/readme",
    "runs/schedule/readme",
    "cache/notes.txt",
    "cache/synthetic-{set}-backup/train_caps.txt",
    "cache/synthetic-000000000000-abcdefgh/train_caps.txt",
    "cache/remote-0123456789abcdef.note",
    "data/readme",
    "data/.hidden",
    "prepared.unfinished/half",
    "storage/studies/theirs/sweep.json",
    "storage/epoch-0001/model.safetensors",
    "here/mlflow.db",
    "here/.mlflow.db.unfinished",
    "here/ranks.csv",
    "best_config.toml",
)


@pytest.fixture(scope="module")
def generated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache with the generated data in it."""
    cache = tmp_path_factory.mktemp("cache")
    resolve_data(TINY.data, cache_dir=cache)
    return cache


@pytest.fixture
def desk(tmp_path: Path, generated: Path) -> Path:
    """A folder of many programs' files, ours among them."""
    shutil.copytree(generated, tmp_path / "cache")
    own = resolve_data(TINY.data, cache_dir=tmp_path / "cache")
    shutil.copytree(own, tmp_path / "data")
    for name in STRANGERS:
        file = tmp_path / name.format(set=own.name.removeprefix("synthetic-"))
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"theirs, and nobody else's: {name}\n", encoding="utf-8")
    # A database of somebody else's runs, which is a tracking store like ours.
    client = MlflowClient(f"sqlite:///{tmp_path / 'runs' / 'mlflow.db'}")
    run = client.create_run(client.create_experiment("thesis", artifact_location="theirs"))
    client.log_metric(run.info.run_id, "accuracy", 0.9)
    client.set_terminated(run.info.run_id)
    (tmp_path / "tiny.toml").write_text(TINY.to_toml(), encoding="utf-8")
    return tmp_path


def theirs(desk: Path) -> dict[str, str]:
    """What every file of somebody else holds, and what their runs are."""
    found = {}
    for name in STRANGERS:
        pattern = name.replace("{set}-backup", "*-backup")
        (file,) = list(desk.glob(pattern)) or [None]
        found[name] = "gone" if file is None else hashlib.sha256(file.read_bytes()).hexdigest()
    with closing(sqlite3.connect(desk / "runs" / "mlflow.db")) as connection:
        rows = connection.execute(
            "SELECT e.name, e.lifecycle_stage, r.run_uuid, r.status, r.lifecycle_stage, m.value "
            "FROM experiments e JOIN runs r USING (experiment_id) JOIN metrics m USING (run_uuid) "
            "WHERE e.name = 'thesis'"
        ).fetchall()
    return found | {"thesis": str(rows)}


def command(desk: Path, words: list[str]) -> subprocess.Popen[str]:
    """A command of ours, started at the desk."""
    script, *rest = words
    environment = {
        **os.environ,
        "CPFEAN_CACHE": str(desk / "cache"),
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
    }
    return subprocess.Popen(
        [sys.executable, str(ROOT / "experiments" / script), *rest],
        cwd=desk,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


TRAIN = ["train.py", "--config", "tiny.toml", "--address", "local"]


def test_no_command_touches_what_is_not_ours(run: Run, desk: Path) -> None:
    before = theirs(desk)
    asked: list[tuple[list[str], str, set[int]]] = [
        ([*TRAIN, "--name", "a"], ".", {0}),
        ([*TRAIN, "--name", "mine"], ".", {2}),
        (["train.py", "--config", "../tiny.toml", "--name", "b", "--address", "local",
          "--output", "../runs", "--tracking-uri", "sqlite:///mlflow.db"], "here", {0, 2, 5}),
        (["evaluate.py", "runs/a"], ".", {0}),
        (["show.py", "runs/a", "--count", "1"], ".", {2}),
        (["show.py", "../runs/a", "--count", "1", "--output", "."], "here", {2}),
        (["probe.py", "--model", "a=runs/a", "--only", "regions"], ".", {2}),
        (["validate.py", "data"], ".", {0}),
        (["prepare.py", "prepared", "--scan", "data"], ".", {3}),
        (["doctor.py", "--data", "data"], ".", {0, 5}),
        (["schedule.py", "list"], ".", {0, 2}),
        ([*TRAIN, "--resume", "--name", "other"], ".", {2}),
        ([*TRAIN, "--resume"], ".", {2}),
    ]  # fmt: skip
    cache = {"CPFEAN_CACHE": str(desk / "cache")}
    for words, folder, codes in asked:
        answer = run(*words, cwd=desk / folder, environment=cache)
        assert "Traceback" not in answer.stdout + answer.stderr
        assert answer.returncode in codes, (words, answer)
        assert theirs(desk) == before, words


@pytest.mark.slow
@pytest.mark.parametrize(
    "seed",
    [
        pytest.param(seed, marks=[pytest.mark.long] if seed >= QUICK else [])
        for seed in range(ROUNDS)
    ],
)
def test_nor_does_one_that_is_killed_or_the_one_after_it(desk: Path, seed: int) -> None:
    before = theirs(desk)
    draw = random.Random(seed)
    words = draw.choice(([*TRAIN, "--name", "a"], ["prepare.py", "new", "--scan", "data"]))
    if seed % 2:
        shutil.rmtree(resolve_data(TINY.data, cache_dir=desk / "cache"))  # to be made anew
    for number, patience in enumerate((draw.uniform(0.5, 6.0), draw.uniform(0.5, 6.0), 300.0)):
        process = command(desk, words)
        try:
            process.wait(timeout=patience)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        assert theirs(desk) == before, (words, number, patience)
