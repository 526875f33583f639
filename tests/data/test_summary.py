"""What is shown of a folder to be checked by eye."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from cpfean.data.split import SPLITS
from cpfean.data.summary import summarize


def every(folder: Path, part: str, change: Callable[[np.ndarray], np.ndarray]) -> None:
    """Changes an array of all splits."""
    for split in SPLITS:
        path = folder / f"{split}_{part}.npy"
        np.save(path, change(np.load(path)))


def test_the_numbers_are_those_of_the_files(folder: Path) -> None:
    every(folder, "ims", lambda x: np.where(x < 0, 0, x))
    np.save(folder / "train_counts.npy", np.array([5, 1, 2, 3, 4, 5]))
    summary = summarize(folder)
    assert list(summary.splits) == ["train", "dev", "test"]
    train = summary.splits["train"]
    assert (train.images, train.captions, train.captions_per_image) == (6, 30, 5)
    assert (train.captions_least, train.captions_most) == (5, 5)
    assert (train.regions, train.width, train.dtype) == (5, 8, "float32")
    assert train.regions_mean == pytest.approx(20 / 6, abs=0.01)
    real = np.arange(5) < np.array([5, 1, 2, 3, 4, 5])[:, None]
    features = np.load(folder / "train_ims.npy")[real]
    assert (train.feature_min, train.feature_max) == (features.min(), features.max())
    assert train.feature_mean == pytest.approx(features.mean(dtype=np.float64))
    assert train.zero_share == pytest.approx((features == 0).mean())
    labels = np.concatenate(
        [np.load(folder / "train_labels.npy")[real]]
        + [np.load(folder / f"{split}_labels.npy").ravel() for split in ("dev", "test")]
    )
    counted = {f"thing {label}": int((labels == label).sum()) for label in set(labels.tolist())}
    assert {label.name: label.count for label in summary.labels} == counted
    counts = [label.count for label in summary.labels]
    assert counts == sorted(counts, reverse=True)


def test_examples_are_captions_with_the_labels_of_their_images(folder: Path) -> None:
    examples = summarize(folder).examples
    labels = np.load(folder / "train_labels.npy")
    assert [example.image for example in examples] == ["train0.jpg", "train2.jpg", "train5.jpg"]
    for example, image in zip(examples, (0, 2, 5), strict=True):
        assert example.caption == f"a caption, number 0 of image {image}"
        assert set(example.labels) == {f"thing {label}" for label in labels[image]}


def test_boxes_of_a_label_are_as_tall_as_they_are(folder: Path) -> None:
    every(folder, "labels", np.zeros_like)
    ratios = []
    for split in SPLITS:
        x1, y1, x2, y2 = np.moveaxis(np.load(folder / f"{split}_boxes.npy"), -1, 0)
        ratios.append(((y2 - y1) / (x2 - x1)).ravel())
    (label,) = summarize(folder).labels
    assert label.tallness == pytest.approx(np.median(np.concatenate(ratios)), rel=1e-2)


def test_labels_whose_first_never_occurs_are_noted_unless_it_is_the_background(
    folder: Path,
) -> None:
    every(folder, "labels", lambda x: np.maximum(x, 1))
    (note,) = summarize(folder).notes
    assert note.startswith("label 0 (thing 0) occurs nowhere in 55 labels")
    assert "--labels-from 1" in note
    vocabulary = folder / "objects_vocab.txt"
    names = vocabulary.read_text().replace("thing 0", "__background__")
    vocabulary.write_text(names)
    assert summarize(folder).notes == []
    every(folder, "labels", lambda x: np.clip(x - 1, 0, 5))
    (note,) = summarize(folder).notes
    assert "take __background__ out" in note


def test_it_is_noted_that_squares_do_not_tell_x_from_y(folder: Path) -> None:
    assert summarize(folder).notes == []
    every(folder, "sizes", lambda x: np.full_like(x, 224))
    every(folder, "boxes", lambda x: x.clip(0, 1) * 224)
    for split in SPLITS:
        boxes = np.load(folder / f"{split}_boxes.npy")
        boxes[:] = [10, 20, 30, 40]
        np.save(folder / f"{split}_boxes.npy", boxes)
    (note,) = summarize(folder).notes
    assert "--box-order yxyx" in note


def test_splits_with_a_fault_are_left_out_and_nothing_is_needed(folder: Path) -> None:
    (folder / "dev_ims.npy").write_bytes(b"")
    for split in SPLITS:
        for part in ("boxes", "sizes", "labels", "scores"):
            (folder / f"{split}_{part}.npy").unlink()
    (folder / "objects_vocab.txt").unlink()
    summary = summarize(folder)
    assert list(summary.splits) == ["train", "test"]
    assert (summary.labels, summary.notes) == ([], [])
    assert json.loads(json.dumps(summary.as_dict()))["splits"]["test"]["images"] == 3
    lines = "\n".join(summary.lines())
    assert "[no labels]" in lines
    for split in SPLITS:
        (folder / f"{split}_caps.txt").unlink()
    assert summarize(folder).lines() == []


def test_only_a_sample_of_a_large_split_is_looked_at_and_this_is_said(folder: Path) -> None:
    rng = np.random.default_rng(0)
    for split, images in (("train", 200), ("dev", 2), ("test", 3)):
        for part in ("boxes", "sizes", "labels", "scores"):
            (folder / f"{split}_{part}.npy").unlink()
        np.save(folder / f"{split}_ims.npy", rng.normal(size=(images, 5, 8)).astype("f4"))
        captions = "".join(f"caption {i}\n" for i in range(5 * images))
        (folder / f"{split}_caps.txt").write_text(captions)
        ids = "".join(f"{split}{i}\n" for i in range(images))
        (folder / f"{split}_ids.txt").write_text(ids)
    summary = summarize(folder)
    assert summary.splits["train"].sampled_images == 64
    assert summary.splits["dev"].sampled_images == 2
    assert "64 images of each split" in "\n".join(summary.lines())
