"""Data sets with one caption an image, with ten, and with four to seven, from check to sweep."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch

from cpfean.config import ExperimentConfig
from cpfean.data.split import open_split
from cpfean.data.synthetic import write_synthetic
from cpfean.training.setup import open_checkpoint
from cpfean.training.trained import trained_configuration
from experiments import command_line, evaluate, prepare, probe, show, train, validate
from tests.environment import FAIR, of_a_user
from tests.metrics.naive import naive_recalls
from tests.training.conftest import TINY
from tests.training.tiny import tiny_experiment

ROOT = Path(__file__).resolve().parents[2]
# By what tells of it: captions of the first images, and of the next ones by turns.
SETS = {"1": (1,), "10": (10,), "4 to 7": (4, 7, 6, 5)}

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs a command here; gives its exit code and what it wrote to standard output and error."""
    # What it sets for its own process would stay in this one.
    monkeypatch.setattr(command_line, "prepare_environment", lambda: None)
    monkeypatch.setenv("CPFEAN_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)

    def call(script: ModuleType, *words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", [f"{script.__name__.rpartition('.')[2]}.py", *words])
        with pytest.raises(SystemExit) as stopped:
            script.main()
        said = capsys.readouterr()
        return stopped.value.code, said.out, said.err  # type: ignore[return-value]

    return call


def make(folder: Path, number: str) -> ExperimentConfig:
    """Writes a small set, and gives what trains on it in seconds."""
    write_synthetic(folder, TINY, captions_each=SETS[number])
    return tiny_experiment().with_overrides(
        {"data.path": str(folder), "optim.epochs": 2, "optim.decay_epoch": 1}
    )


def expected(number: str, images: int) -> list[int]:
    """Captions of so many images."""
    return [SETS[number][image % len(SETS[number])] for image in range(images)]


def counted(model: Path, data: Path, cache: Path, sizes: list[int]) -> dict[str, float]:
    """The recalls of a model on the test split, by sorting every query's candidates."""
    trained = open_checkpoint(
        model,
        data_folder=data,
        split="test",
        cache_dir=cache,
        device=torch.device("cpu"),
        num_regions=trained_configuration(model).data.num_regions,
    )
    dataset, network = trained.dataset, trained.model
    with torch.inference_mode():
        scores = network.score(
            network.encode_images(**dataset.image_batch(range(len(sizes)))._asdict()),
            network.encode_captions(**dataset.caption_batch(range(sum(sizes)))._asdict()),
        )
    owners = [image for image, size in enumerate(sizes) for _ in range(size)]
    recalls = naive_recalls(scores, owners)
    return recalls | {"rsum": sum(recalls.values())}


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "number",
    [pytest.param(number, marks=[pytest.mark.long] if number == "10" else []) for number in SETS],
)
def test_a_set_is_checked_trained_on_and_evaluated(number: str, run: Run, tmp_path: Path) -> None:
    data = tmp_path / "data"
    config = make(data, number)
    (tmp_path / "tiny.toml").write_text(config.to_toml(), encoding="utf-8")
    code, said, _ = run(validate, str(data), "--json")
    assert code == 0
    told = json.loads(said)
    assert told["findings"] == []
    for split, images in (("train", 16), ("dev", 6), ("test", 6)):
        summary, sizes = told["summary"]["splits"][split], expected(number, images)
        assert (summary["images"], summary["captions"]) == (images, sum(sizes))
        assert (summary["captions_least"], summary["captions_most"]) == (min(sizes), max(sizes))

    code, said, complaints = run(
        train, "--config", "tiny.toml", "--workers", "0", "--name", "t", "--output", "runs"
    )
    assert code == 0, complaints
    sizes = expected(number, 6)
    recalls = counted(tmp_path / "runs" / "t" / "best_model", data, tmp_path / "cache", sizes)
    code, said, complaints = run(evaluate, "runs/t", "--split", "test")
    assert code == 0, complaints
    assert f"6 images and {sum(sizes)} captions" in complaints
    assert json.loads(said) == pytest.approx(
        recalls | {"images": 6, "captions": sum(sizes), "folds": 1}
    )
    assert of_study(tmp_path / "runs" / "t") == pytest.approx(recalls)
    code, _, complaints = run(evaluate, "runs/t", "--protocol", "coco-1k")
    assert code == 3
    assert f"5 captions each, and the images have {number}" in complaints

    code, _, complaints = run(show, "runs/t", "--count", "1", "--output", "pictures")
    assert code == 0, complaints
    words = ["--model", "m=runs/t", "--data", "data", "--transfer", "data", "--only", "objects"]
    code, said, complaints = run(probe, *words, "--output", "probed")
    assert code == 0, complaints
    assert f"{sum(sizes)} captions" in complaints + said
    code, said, complaints = run(prepare, "again", "--scan", str(data))
    assert code == 0, complaints
    for name in ("train", "test"):
        before, after = (open_split(f, name, num_regions=8) for f in (data, tmp_path / "again"))
        assert after.captions == before.captions
        assert after.groups.sizes.tolist() == before.groups.sizes.tolist()


def of_study(folder: Path) -> dict[str, float]:
    """What a study says of its best model on the test split."""
    return json.loads((folder / "summary.json").read_text(encoding="utf-8"))["test"]


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.long
@pytest.mark.parametrize("number", SETS)
def test_a_sweep_runs_on_a_set(number: str, tmp_path: Path) -> None:
    clean = of_a_user() | FAIR
    config = make(tmp_path / "data", number).with_overrides({"optim.epochs": 1})
    (tmp_path / "tiny.toml").write_text(config.to_toml(), encoding="utf-8")
    words = [
        "--in-process",
        "--config",
        "tiny.toml",
        "--name",
        "s",
        "--trials",
        "2",
        "--output",
        "runs",
    ]
    done = subprocess.run(
        [sys.executable, str(ROOT / "experiments" / "sweep.py"), *words],
        cwd=tmp_path,
        env=clean | {"CPFEAN_CACHE": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    model = tmp_path / "runs" / "s" / "best_model"
    recalls = counted(model, tmp_path / "data", tmp_path / "cache", expected(number, 6))
    assert of_study(tmp_path / "runs" / "s") == pytest.approx(recalls)
