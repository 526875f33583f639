"""`show.py` on a small untrained model: what it says, what it writes, what it refuses."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.image import imread, imsave

from cpfean.analysis.pictures.sheet import PANEL
from cpfean.data.synthetic import write_synthetic
from cpfean.training.evaluation import evaluate
from cpfean.training.setup import open_checkpoint
from tests.experiments.conftest import Answer, Run
from tests.training.conftest import TINY
from tests.training.tiny import save_untrained, tiny_experiment


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data and three models: two seeds, and one without gates."""
    home = tmp_path_factory.mktemp("show")
    write_synthetic(home / "data", TINY)
    config = tiny_experiment().with_overrides({"data.path": str(home / "data")})
    save_untrained(config, home / "data", home / "one" / "best_model")
    save_untrained(config.with_overrides({"seed": 1}), home / "data", home / "two" / "best_model")
    pooled = config.with_overrides({"model.alignment.global_weight": 1})
    save_untrained(pooled, home / "data", home / "pooled" / "best_model")
    return home


@pytest.fixture
def called(home: Path, tmp_path: Path, run: Run) -> Run:
    """Runs the command there; its pictures are the test's own."""

    def call(*words: str) -> Answer:
        return run("show.py", *words, "--output", str(tmp_path / "pictures"), cwd=home)

    return call


def changed(folder: Path) -> list[Path]:
    """The pictures of queries that two models rank differently."""
    return sorted((folder / "pictures").glob("changed-*.png"))


def panels_in(file: Path) -> int:
    """How many panels stand side by side in a picture."""
    return round(imread(file).shape[1] / (100 * PANEL))


def test_a_caption_is_drawn_and_said(called: Run, home: Path, tmp_path: Path) -> None:
    code, out, _ = called("one", "--caption", "12")
    assert code == 0
    captions = (home / "data" / "test_caps.txt").read_text().split("\n")
    assert captions[12] in out
    file = tmp_path / "pictures" / "caption-00012.png"
    assert str(file) in out
    assert file.read_bytes()[:4] == b"\x89PNG"


def test_an_image_is_drawn(called: Run, tmp_path: Path) -> None:
    code, _, _ = called("one", "--image", "test-000004")
    assert code == 0
    assert (tmp_path / "pictures" / "image-test-000004.png").exists()


def test_without_a_query_some_are_picked_and_named(called: Run, tmp_path: Path) -> None:
    code, out, _ = called("one", "--count", "3")
    assert code == 0
    lines = out.splitlines()
    files = {str(file) for file in (tmp_path / "pictures").glob("caption-*.png")}
    assert len(lines) == len(files) == 3
    for line in lines:
        assert sum(file in line for file in files) == 1
        rank = int(line.split("rank ")[1].split(":")[0])
        assert ("found" in line) == (rank == 1)


def test_two_models_are_compared_by_the_ranks_of_the_evaluation(
    called: Run, home: Path, tmp_path: Path
) -> None:
    code, out, _ = called("one", "--against", "two", "--count", "2")
    assert code == 0
    with (tmp_path / "pictures" / "ranks.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 30 + 6
    for model, column in (("one", "rank"), ("two", "rank_against")):
        trained = open_checkpoint(
            home / model / "best_model",
            data_folder=home / "data",
            split="test",
            cache_dir=home / "cache",
            device=torch.device("cpu"),
            num_regions=8,
        )
        expected = evaluate(
            trained.model,
            trained.dataset,
            protocol="full",
            batch_size=7,
            device=torch.device("cpu"),
        )
        for way, recall in (
            ("text to image", expected.text_to_image),
            ("image to text", expected.image_to_text),
        ):
            ranks = np.array([int(row[column]) for row in rows if row["direction"] == way])
            assert 100 * np.mean(ranks == 1) == pytest.approx(recall.r1)
            assert 100 * np.mean(ranks <= 5) == pytest.approx(recall.r5)
    ratios = [abs(np.log(int(row["rank_against"]) / int(row["rank"]))) for row in rows]
    assert ratios == sorted(ratios, reverse=True)

    table = [line for line in out.splitlines() if line.startswith("| ")]
    assert table[0].startswith("| direction | query | rank by one | by two |")
    for line in table[2:]:
        direction, query, one, two = (cell.strip() for cell in line.split("|")[1:5])
        assert {
            "direction": direction,
            "query": query,
            "rank": one,
            "rank_against": two,
        }.items() <= (
            next(
                row for row in rows if (row["direction"], row["query"]) == (direction, query)
            ).items()
        )
        assert one != two
    assert (tmp_path / "pictures" / "ranks.png").exists()
    files = changed(tmp_path)
    assert files
    assert {str(file) for file in files} == {
        line for line in out.splitlines() if "changed-" in line
    }
    assert all(panels_in(file) == 2 for file in files)


@pytest.mark.long
def test_a_model_without_gates_can_be_compared_and_leaves_its_panel_out(
    called: Run, tmp_path: Path
) -> None:
    code, _, _ = called("pooled", "--against", "one", "--count", "1")
    assert code == 0
    files = changed(tmp_path)
    assert files
    assert all(panels_in(file) == 1 for file in files)
    for file in files:
        file.unlink()
    code, out, _ = called("pooled", "--against", "pooled")
    assert code == 0
    assert "neither model has gates" in out
    assert not changed(tmp_path)


def test_photographs_are_counted_and_drawn(called: Run, tmp_path: Path) -> None:
    called("one", "--caption", "12")
    file = tmp_path / "pictures" / "caption-00012.png"
    plain = file.read_bytes()
    photos = tmp_path / "photos"
    photos.mkdir()
    imsave(photos / "test-000002.png", np.zeros((4, 6, 3)))
    code, out, _ = called("one", "--caption", "12", "--photos", str(photos))
    assert code == 0
    assert "1 of 6 images" in out
    assert file.read_bytes() != plain


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        ("one --caption 30", 2, "--caption must be from 0 to 29"),
        ("one --caption -1", 2, "--caption must be from 0 to 29"),
        ("one --caption dog", 2, "invalid int value"),
        ("one --image test-00002", 2, "did you mean 'test-000002'"),
        ("one --caption 1 --image test-000002", 2, "not allowed with"),
        ("one --count 0", 2, "--count must be at least 1"),
        ("one --photos data", 2, "none of the 6 images"),
        ("pooled", 2, "no gates"),
        ("pooled --caption 3", 2, "global_weight = 1"),
        ("data", 5, "no folder of a finished run"),
        ("one --against data", 5, "no folder of a finished run"),
        ("one --data nowhere", 3, "nowhere"),
    ],
)
def test_a_mistake_is_refused_in_a_line(called: Run, words: str, code: int, said: str) -> None:
    stopped, _, error = called(*words.split(" "))
    assert stopped == code
    assert said in error
    assert "Traceback" not in error
