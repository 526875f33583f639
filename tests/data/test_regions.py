"""Regions as they are read: layouts, geometry, overlaps, padding."""

from functools import partial
from pathlib import Path

import numpy as np
import pytest

from cpfean.data.regions import RegionStore
from cpfean.data.split import open_split, validate_folder
from cpfean.progress import Progress

PARTS = ("ims", "boxes", "sizes", "labels", "scores")


def regions(folder: Path, *, num_regions: int = 5) -> RegionStore:
    assert validate_folder(folder) == []
    return open_split(folder, "train", num_regions=num_regions).regions


def test_features_stay_on_disk_in_the_dtype_they_have(folder: Path) -> None:
    stored = np.load(folder / "train_ims.npy")
    for dtype in (np.float16, np.float32):
        np.save(folder / "train_ims.npy", stored.astype(dtype))
        features = regions(folder).features
        assert features.dtype == dtype
        base: object = features
        while isinstance(base, np.ndarray) and not isinstance(base, np.memmap):
            base = base.base
        assert isinstance(base, np.memmap)
        np.testing.assert_array_equal(features, stored.astype(dtype))


@pytest.mark.parametrize("repeated", [PARTS, ("ims",), ("ims", "boxes")])
def test_five_equal_rows_an_image_read_like_one(folder: Path, repeated: tuple[str, ...]) -> None:
    fields = ("features", "geometry", "iou", "labels", "confidences", "counts")
    store = regions(folder, num_regions=4)
    before = {field: np.array(getattr(store, field)) for field in fields}  # not the mapped file
    for part in repeated:
        name = folder / f"train_{part}.npy"
        np.save(name, np.repeat(np.load(name), 5, axis=0))
    after = regions(folder, num_regions=4)
    for field in fields:
        np.testing.assert_array_equal(getattr(after, field), before[field])


def test_ids_may_be_repeated_with_the_rows(folder: Path) -> None:
    ids = (folder / "train_ids.txt").read_text("utf-8").splitlines()
    for part in PARTS:
        name = folder / f"train_{part}.npy"
        np.save(name, np.repeat(np.load(name), 5, axis=0))
    (folder / "train_ids.txt").write_text("".join(f"{i}\n" * 5 for i in ids), "utf-8")
    assert validate_folder(folder) == []
    assert open_split(folder, "train", num_regions=5).image_ids == ids


def test_five_rows_of_a_small_file_must_be_equal(folder: Path) -> None:
    labels = np.repeat(np.load(folder / "train_labels.npy"), 5, axis=0)
    labels[8, 0] = (labels[8, 0] + 1) % 7
    np.save(folder / "train_labels.npy", labels)
    assert [(f.kind, f.where) for f in validate_folder(folder)] == [
        ("unequal-rows", "train_labels.npy, rows 5 to 9 of image 1 (train1.jpg)")
    ]


def test_the_first_regions_are_kept(folder: Path) -> None:
    whole, part = regions(folder), regions(folder, num_regions=3)
    assert (whole.num_regions, part.num_regions) == (5, 3)
    for field in ("features", "geometry", "labels", "confidences"):
        np.testing.assert_array_equal(getattr(part, field), getattr(whole, field)[:, :3])
    assert whole.iou is not None
    np.testing.assert_array_equal(part.iou, whole.iou[:, :3, :3])
    assert part.counts.tolist() == [3] * 6


def test_geometry_is_corners_and_area_as_shares_of_the_image(folder: Path) -> None:
    store = regions(folder)
    boxes, sizes = (np.load(folder / f"train_{part}.npy") for part in ("boxes", "sizes"))
    assert store.geometry is not None
    assert store.geometry.dtype == np.float32
    width, height = sizes[:, :1].astype(float), sizes[:, 1:].astype(float)
    x1, y1, x2, y2 = np.moveaxis(boxes.astype(float), -1, 0)
    area = (x2 - x1) * (y2 - y1) / (width * height)
    expected = np.stack([x1 / width, y1 / height, x2 / width, y2 / height, area], axis=-1)
    np.testing.assert_allclose(store.geometry, expected, rtol=1e-6)
    np.testing.assert_array_equal(store.geometry[:, 0], np.tile([0, 0, 1, 1, 1], (6, 1)))


def test_iou_is_intersection_over_union(folder: Path) -> None:
    store = regions(folder)
    boxes = np.load(folder / "train_boxes.npy").astype(float)
    first, second = boxes[:, :, None], boxes[:, None, :]
    low, high = np.maximum(first, second), np.minimum(first, second)
    sides = (high[..., 2:] - low[..., :2]).clip(min=0)
    shared = sides.prod(axis=-1)
    areas = (boxes[..., 2:] - boxes[..., :2]).prod(axis=-1)
    union = areas[:, :, None] + areas[:, None, :] - shared
    assert store.iou is not None
    assert store.iou.dtype == np.float16
    np.testing.assert_allclose(store.iou, shared / union, atol=1e-3)
    np.testing.assert_array_equal(np.diagonal(store.iou, axis1=1, axis2=2), 1)


def test_boxes_out_by_a_pixel_at_most_are_clipped_and_counted(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    boxes, sizes = (np.load(folder / f"train_{part}.npy") for part in ("boxes", "sizes"))
    boxes[2, 0] = [-1, -0.5, sizes[2, 0] + 1, sizes[2, 1]]
    boxes[4, 0, 2] += 0.25
    np.save(folder / "train_boxes.npy", boxes)
    caplog.set_level("INFO", logger="cpfean.data")
    store = regions(folder)
    assert store.num_clipped == 2
    assert [r.message for r in caplog.records if "clipped" in r.message] == [
        "train: 2 boxes reached out of their image by 1 pixel at most and were clipped"
    ]
    assert store.geometry is not None
    assert store.geometry[2, 0].tolist() == [0, 0, 1, 1, 1]
    assert store.geometry.max() == 1


def test_counts_say_which_regions_are_padding_and_padding_is_not_checked(folder: Path) -> None:
    np.save(folder / "train_counts.npy", np.array([5, 1, 2, 3, 4, 5]))
    for part, value in (("boxes", np.nan), ("labels", -1), ("scores", 7), ("ims", 0)):
        values = np.load(folder / f"train_{part}.npy")
        values[1, 1:] = value
        np.save(folder / f"train_{part}.npy", values)
    store = regions(folder, num_regions=3)
    assert store.counts.tolist() == [3, 1, 2, 3, 3, 3]
    assert store.geometry is not None
    assert store.iou is not None
    assert store.labels is not None
    assert store.confidences is not None
    for field in (store.geometry, store.iou, store.labels, store.confidences):
        assert np.isfinite(field).all()
    assert store.iou[1, 0, 1:].tolist() == [0, 0]


def test_what_is_absent_is_none_and_said_once(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="cpfean.data")
    for split in ("train", "dev", "test"):
        (folder / f"{split}_scores.npy").unlink()
    store = regions(folder)
    assert store.confidences is None
    assert store.labels is not None
    for split in ("train", "dev", "test"):
        for part in ("boxes", "sizes", "labels"):
            (folder / f"{split}_{part}.npy").unlink()
    (folder / "objects_vocab.txt").unlink()
    store = regions(folder)
    assert (store.geometry, store.iou, store.labels, store.confidences) == (None,) * 4
    messages = [record.message for record in caplog.records]
    assert messages == [
        "labels without scores: all are trusted alike",
        "no boxes: every region is a neighbour of every other",
        "no labels: regions have no textual prior",
    ]


@pytest.mark.parametrize(
    ("part", "dtype"),
    [("labels", "<f4"), ("labels", ">i8"), ("boxes", ">f4"), ("boxes", "<f8"), ("sizes", "<f8")],
)
def test_other_types_of_small_files_are_converted(folder: Path, part: str, dtype: str) -> None:
    before = regions(folder)
    name = folder / f"train_{part}.npy"
    np.save(name, np.asfortranarray(np.load(name).astype(dtype)))
    after = regions(folder)
    assert after.labels is not None
    assert after.labels.dtype == np.int32
    np.testing.assert_array_equal(after.labels, before.labels)
    np.testing.assert_array_equal(after.geometry, before.geometry)


def test_a_few_features_that_are_all_zero_are_only_warned_about(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rng = np.random.default_rng(0)
    many = rng.normal(size=(6, 400, 8)).astype(np.float16)
    many[3, 399] = 0  # one of 2,400: under a thousandth
    np.save(folder / "train_ims.npy", many)
    for part in ("boxes", "labels", "scores"):
        for split in ("train", "dev", "test"):
            (folder / f"{split}_{part}.npy").unlink()
    assert validate_folder(folder) == []
    assert "1 feature vectors are all zero" in caplog.text
    many[:3, 0] = 0
    np.save(folder / "train_ims.npy", many)
    assert {finding.kind for finding in validate_folder(folder)} == {"zero-feature"}


def test_every_feature_is_looked_at_whatever_the_size_of_a_chunk(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    features = np.load(folder / "train_ims.npy")
    for image in (1, 4):
        features[image, image, 7] = np.inf
    expected = {f"train_ims.npy, image {i} (train{i}.jpg), region {i}" for i in (1, 4)}
    for images_a_chunk in (1, 2, 4):
        size = images_a_chunk * features[0].nbytes
        monkeypatch.setattr("cpfean.data.regions._CHUNK_BYTES", size)
        for rows in (1, 5):
            np.save(folder / "train_ims.npy", np.repeat(features, rows, axis=0))
            findings = validate_folder(folder)
            assert {finding.where for finding in findings} == expected
            assert {finding.kind for finding in findings} == {"not-finite"}


def test_reading_that_takes_long_says_how_long_it_still_takes(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    clock = iter(range(0, 10_000, 8))
    timed = partial(Progress, clock=lambda: float(next(clock)))
    monkeypatch.setattr("cpfean.data.regions.Progress", timed)
    monkeypatch.setattr("cpfean.data.regions._CHUNK_BYTES", 1)  # an image at a time
    caplog.set_level("INFO", logger="cpfean")
    assert validate_folder(folder, splits=("train",)) == []
    told = [record.message for record in caplog.records if "left" in record.message]
    # Eight seconds an image: told after the second and the fourth.
    assert told == [
        "reading train_ims.npy: 33 %, 32 s left",
        "reading train_ims.npy: 66 %, 16 s left",
    ]
