"""compare.py as a user runs it: twice, on machines that have less, and merged."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from tests.experiments.conftest import Run
from tests.experiments.test_command_line import ROOT, call
from tests.orchestration.samples import TINY

CHOICE = ["--methods", "full", "--methods", "scan", "--seeds", "2", "--tuning", "2"]


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    (tmp_path / "tiny.toml").write_text(TINY.with_overrides({"optim.epochs": 1}).to_toml())
    return tmp_path


def table(folder: Path) -> str:
    return (folder / "report" / "table.md").read_text()


def test_the_same_command_twice_gives_the_same_table_and_trains_nothing_again(
    run: Run, tiny: Path
) -> None:
    command = ["--config", "tiny.toml", "--in-process", *CHOICE]
    first = run("compare.py", *command, "--name", "first")
    assert first.returncode == 0, first.stderr
    assert first.stdout.count("epoch 1/1") == 2 * 2 + 2 * 2
    assert "| **full** | 2 |" in first.stdout
    second = run("compare.py", *command, "--name", "second")
    assert second.returncode == 0, second.stderr
    assert "epoch 1/1" not in second.stdout
    assert table(tiny / "runs/second") == table(tiny / "runs/first")


@pytest.mark.long
def test_results_of_two_machines_merge_and_one_of_them_has_only_torch(run: Run, tiny: Path) -> None:
    (tiny / "bare.py").write_text(
        "import runpy, sys\n"
        "for name in ('ray', 'optuna', 'mlflow', 'pyarrow'): sys.modules[name] = None\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        f"sys.argv[0] = {str(ROOT / 'experiments' / 'compare.py')!r}\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    options = ["--config", "tiny.toml", "--in-process", "--seeds", "2"]
    bare = call(str(tiny / "bare.py"), *options, *_as_it_stands("scan", "there"), cwd=tiny)
    assert bare.returncode == 0, bare.stderr
    assert "MLflow is not installed" in bare.stdout

    shutil.copytree(tiny / "there/results", tiny / "here/results")
    both = run("compare.py", *options, "--methods", "full", *_as_it_stands("scan", "here"))
    assert both.returncode == 0, both.stderr
    assert "full/seed-1  epoch 1/1" in both.stdout
    assert "scan/seed-1  epoch" not in both.stdout
    refused = call(str(tiny / "bare.py"), *options, "--output", "x", "--methods", "scan", cwd=tiny)
    assert refused.returncode == 2
    assert "--tuning 1" in refused.stderr


def _as_it_stands(method: str, output: str) -> list[str]:
    return ["--methods", method, "--tuning", "1", "--output", output]


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.timeout(900)
def test_on_ray_the_runs_come_to_what_they_come_to_here(tiny: Path) -> None:
    options = ["--config", "tiny.toml", "--seeds", "1", "--methods", "full"]
    options += _as_it_stands("scan", "on-ray")
    on_ray = call(
        "compare.py", *options, "--name", "c", "--address", "local", cwd=tiny, timeout=600
    )
    assert on_ray.returncode == 0, on_ray.stderr
    # Ray gives a worker one thread here; sums are the same only with as many.
    here = call(
        "compare.py",
        *options[:-1],
        "here",
        "--name",
        "c",
        "--in-process",
        cwd=tiny,
        environment={"OMP_NUM_THREADS": "1"},
    )
    assert here.returncode == 0, here.stderr
    if torch.get_num_threads() <= 2:
        assert table(tiny / "on-ray/c") == table(tiny / "here/c")
    again = call("compare.py", *options, "--name", "again", "--in-process", cwd=tiny, timeout=60)
    assert again.returncode == 0, again.stderr
    assert table(tiny / "on-ray/again") == table(tiny / "on-ray/c")
