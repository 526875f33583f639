"""evaluate.py with several models, and on COCO's test split with ECCV Caption's judgements."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from cpfean.data.synthetic import write_synthetic
from cpfean.training import evaluation
from cpfean.training.setup import evaluate_checkpoint
from tests.experiments.conftest import Run
from tests.metrics.coco_scores import made_scores
from tests.training.conftest import TINY
from tests.training.tiny import save_untrained, tiny_experiment


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set and models of two seeds; another of folds, and one of other data."""
    place = tmp_path_factory.mktemp("evaluate")
    for name in ("data", "other"):
        write_synthetic(place / name, TINY)
    for name, overrides in {
        "a": {"seed": 0},
        "b": {"seed": 1, "evaluation.batch_size": 4},
        "folds": {"evaluation.protocol": "coco-1k"},
        "foreign": {"data.path": str(place / "other")},
    }.items():
        config = tiny_experiment().with_overrides({"data.path": str(place / "data")} | overrides)
        save_untrained(config, place / "data", place / name)
    (place / "link").symlink_to("a")
    return place


@pytest.fixture
def call(place: Path, run: Run) -> Run:
    """Runs the command there."""
    return partial(run, "evaluate.py", cwd=place)


def test_an_ensemble_is_told_beside_its_models_and_never_as_one(place: Path, call: Run) -> None:
    answer = call("a", "b")
    assert answer.returncode == 0, answer.stderr
    told = json.loads(answer.stdout)
    assert told.keys() == {"models", "ensemble of 2", "images", "captions", "folds"}
    for name, metrics in told["models"].items():
        alone = evaluate_checkpoint(
            place / name,
            data_folder=place / "data",
            split="test",
            protocol="full",
            cache_dir=place / "cache",
            device=torch.device("cpu"),
            num_regions=8,
        )
        assert metrics == pytest.approx(alone.as_dict())
    assert told["models"].keys() == {"a", "b"}
    assert told["ensemble of 2"].keys() == told["models"]["a"].keys()
    table = answer.stderr.splitlines()[-4:]
    assert [line.split("  ")[0].strip() for line in table] == ["", "a", "b", "ensemble of 2"]
    assert table[-1].split()[-1] == f"{told['ensemble of 2']['rsum']:.2f}"


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        ("a b ./a", 2, "a and a are the same model"),
        ("a link", 2, "link and a are the same model"),
        ("a folds", 2, "different protocols; say which: --protocol full"),
        ("a foreign", 2, "trained on different data"),
        ("a --eccv x.json --protocol coco-1k", 2, "leave out one of them"),
        ("a --eccv x.json", 3, "x.json: cannot be read"),
    ],
)
def test_what_cannot_be_evaluated_is_refused(words: str, code: int, said: str, call: Run) -> None:
    answer = call(*words.split())
    assert (answer.returncode, answer.stdout) == (code, "")
    assert said in answer.stderr
    assert "Traceback" not in answer.stderr


def write_coco(folder: Path, tiny: Path, own: dict[int, list[int]]) -> Path:
    """Our format with COCO's test split, and an annotation file; texts are made up."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for split in ("train", "dev"):
        for part in ("ims.npy", "caps.txt", "ids.txt"):
            shutil.copy(tiny / f"{split}_{part}", folder)
    known = (folder / "train_caps.txt").read_text(encoding="utf-8").splitlines()
    texts = {c: f"{known[c % len(known)]} {c}" for captions in own.values() for c in captions}
    lines = [texts[caption] for captions in own.values() for caption in captions]
    (folder / "test_caps.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    names = [f"COCO_val2014_{image:012d}.jpg" for image in own]
    (folder / "test_ids.txt").write_text("\n".join(names) + "\n", encoding="utf-8")
    features = rng.random((len(own), 8, TINY.feature_dim), dtype=np.float32)
    np.save(folder / "test_ims.npy", features)
    notes = [{"image_id": i, "id": c, "caption": texts[c]} for i in own for c in sorted(own[i])]
    file = folder / "captions_val2014.json"
    file.write_text(json.dumps({"annotations": notes}), encoding="utf-8")
    return file


@pytest.mark.long
def test_cocos_test_split_is_judged_by_ids_whatever_its_order(
    place: Path, call: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    judged: Any = pytest.importorskip("eccv_caption").Metrics()
    images = list(judged.coco_gts["i2t"])
    random.Random(0).shuffle(images)
    own = {image: judged.coco_gts["i2t"][image][::-1] for image in images}
    captions = [caption for image in images for caption in own[image]]
    file = write_coco(tmp_path / "coco", place / "data", own)
    config = tiny_experiment().with_overrides({"evaluation.protocol": "coco-1k"})
    save_untrained(config, tmp_path / "coco", tmp_path / "model")
    scores = made_scores(judged, images, captions)

    def rows(*_: object, **__: object) -> Iterator[tuple[int, Tensor]]:
        for start in range(0, len(scores), 500):
            yield start, torch.from_numpy(scores[start : start + 500])

    monkeypatch.setattr(evaluation, "_score_rows", rows)
    data = ["--data", str(tmp_path / "coco")]
    answer = call(str(tmp_path / "model"), *data, "--eccv", str(file))
    assert answer.returncode == 0, answer.stderr
    told = json.loads(answer.stdout)
    found = told.pop("eccv_caption")
    assert (told["images"], told["captions"], told["folds"]) == (5000, 25000, 1)
    recalls = [told[f"{way}_r{k}"] for way in ("i2t", "t2i") for k in (1, 5, 10)]
    assert told["rsum"] == pytest.approx(sum(recalls))
    sides = {"i2t": (scores, images, captions), "t2i": (scores.T, captions, images)}
    for way, (matrix, queries, items) in sides.items():
        first = dict(zip(queries, matrix.argmax(axis=1).tolist(), strict=True))
        for name, known in (("eccv_r1", judged.eccv_gts), ("cxc_r1", judged.cxc_gts)):
            hits = [items[first[query]] in matches for query, matches in known[way].items()]
            assert found[f"{way}_{name}"] == pytest.approx(100 * np.mean(hits))
            assert 1 < found[f"{way}_{name}"] < 99
    title, _, row = answer.stderr.splitlines()[-3:]
    assert title == "ECCV Caption and CxC, in percent, no part of rSum:"
    assert row.split()[-8:] == [f"{value:.2f}" for value in found.values()]
