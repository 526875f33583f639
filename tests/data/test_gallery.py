"""A gallery has images and no captions; a folder has it alone or beside its three splits."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from cpfean.data.convert.captions import Captioned
from cpfean.data.convert.native import NativeWriter, Regions
from cpfean.data.provenance import read_provenance
from cpfean.data.split import (
    GALLERY,
    SPLITS,
    check_folder,
    data_fingerprint,
    open_split,
    splits_of,
    validate_folder,
)
from cpfean.data.summary import summarize
from cpfean.errors import DataError

ROOT = Path(__file__).resolve().parents[2]
MADE_BY = {
    "settings": {"detector": "grid", "features": "backbone"},
    "detector": None,
    "backbone": {"name": "facebook/dinov2-small", "sha256": "ab" * 32},
    "skipped": [{"file": "torn.jpg", "reason": "ends early"}],
}


@pytest.fixture
def source(folder: Path) -> Path:
    """Three splits that are sound."""
    return folder


def as_gallery(source: Path, folder: Path) -> Path:
    """The test images of a folder, without their captions."""
    folder.mkdir(exist_ok=True)
    for path in source.glob("test_*"):
        part = path.name.removeprefix("test_")
        if part not in ("caps.txt", "image_of_caption.npy"):
            shutil.copy(path, folder / f"{GALLERY}_{part}")
    shutil.copy(source / "objects_vocab.txt", folder)
    return folder


def test_a_gallery_has_the_images_and_no_captions(source: Path, tmp_path: Path) -> None:
    folder = as_gallery(source, tmp_path / "gallery")
    gallery = open_split(folder, GALLERY, num_regions=None)
    test = open_split(source, "test", num_regions=None)
    assert gallery.num_images == test.num_images
    assert gallery.image_ids == test.image_ids
    assert gallery.captions == []
    assert gallery.groups.of_images(range(1, 3)) == range(0)
    np.testing.assert_array_equal(gallery.regions.features, test.regions.features)
    np.testing.assert_array_equal(gallery.regions.iou, test.regions.iou)
    few = open_split(folder, GALLERY, num_regions=2, num_images=2)
    assert (few.num_images, few.num_captions, few.regions.num_regions) == (2, 0, 2)


def test_splits_are_the_three_a_gallery_or_both(source: Path, tmp_path: Path) -> None:
    alone = as_gallery(source, tmp_path / "alone")
    both = as_gallery(source, shutil.copytree(source, tmp_path / "both"))
    assert splits_of(source) == splits_of(tmp_path / "absent") == SPLITS
    assert splits_of(alone) == (GALLERY,)
    assert splits_of(both) == (*SPLITS, GALLERY)
    for folder in (alone, both):
        # The gallery of `both` shows the images of its test split: that is no leak.
        assert validate_folder(folder, splits=splits_of(folder)) == []
    assert list(summarize(both).splits) == [*SPLITS, GALLERY]
    summary = summarize(alone)
    assert (summary.splits[GALLERY].captions, summary.examples) == (0, [])
    assert any(line.startswith("gallery") for line in summary.lines())


def test_a_gallery_alone_is_nothing_to_train_on(source: Path, tmp_path: Path) -> None:
    folder = as_gallery(source, tmp_path / "gallery")
    with pytest.raises(DataError, match="gallery alone: images without captions"):
        check_folder(folder)


@pytest.mark.parametrize(
    ("spoil", "expected"),
    [
        (lambda folder: (folder / "gallery_ids.txt").unlink(), "gallery_ids.txt"),
        (lambda folder: (folder / "gallery_ids.txt").write_text("a\nb\n"), "names, one for each"),
        (lambda folder: (folder / "gallery_ids.txt").write_text("a\na\na\n"), "every image once"),
        (lambda folder: np.save(folder / "gallery_boxes.npy", np.ones((1, 2, 4))), "expected"),
        (lambda folder: np.save(folder / "gallery_ims.npy", np.ones(3, "f4")), "feature width"),
    ],
)
def test_what_is_wrong_with_a_gallery_is_refused(
    spoil: Callable[[Path], object], expected: str, source: Path, tmp_path: Path
) -> None:
    folder = as_gallery(source, tmp_path / "gallery")
    spoil(folder)
    with pytest.raises(DataError, match=expected):
        check_folder(folder, splits=(GALLERY,))


def written(folder: Path, *, provenance: dict | None) -> Path:
    images = {GALLERY: Captioned(names=["a.jpg", "b.jpg"], captions=[[], []])}
    with NativeWriter(
        folder,
        images,
        num_regions=2,
        feature_dim=3,
        half=True,
        boxes=False,
        vocabulary=None,
        provenance=provenance,
    ) as writer:
        for row in (1, 0):
            writer.write(GALLERY, row, Regions(features=np.full((2, 3), row + 1.0)))
        writer.finish()
    return folder


def test_a_written_gallery_is_read_as_it_was(tmp_path: Path) -> None:
    folder = written(tmp_path / "gallery", provenance=None)
    assert not (folder / "gallery_caps.txt").exists()
    assert open_split(folder, GALLERY, num_regions=None).regions.features[:, 0, 0].tolist() == [
        1,
        2,
    ]
    assert read_provenance(folder) is None


def test_what_made_the_features_is_part_of_the_data_and_is_shown(tmp_path: Path) -> None:
    plain = written(tmp_path / "plain", provenance=None)
    folder = written(tmp_path / "made", provenance=MADE_BY)
    told = read_provenance(folder)
    assert told == {"format": 1} | MADE_BY
    assert data_fingerprint(folder) != data_fingerprint(plain)
    line = next(line for line in summarize(folder).lines() if "extract.py" in line)
    assert "regions by grid, features by facebook/dinov2-small (abababababab)" in line
    assert "1 photograph could not be read" in line


@pytest.mark.parametrize("content", ["", "[]", "{", '{"format": 2, "settings": {}}', "[" * 100_000])
def test_a_provenance_that_tells_nothing_is_refused(content: str, tmp_path: Path) -> None:
    folder = written(tmp_path / "gallery", provenance=None)
    (folder / "provenance.json").write_text(content)
    with pytest.raises(DataError, match=r"provenance\.json"):
        check_folder(folder, splits=(GALLERY,))
    with pytest.raises(DataError, match=r"provenance\.json"):
        read_provenance(folder)
    assert summarize(folder).provenance is None


def test_validate_looks_at_a_gallery_too(source: Path, tmp_path: Path) -> None:
    folder = as_gallery(source, tmp_path / "gallery")
    command = [sys.executable, ROOT / "experiments/validate.py", folder, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert list(json.loads(done.stdout)["summary"]["splits"]) == [GALLERY]
    (folder / "gallery_sizes.npy").unlink()
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 3
    assert "gallery_sizes.npy" in done.stdout
