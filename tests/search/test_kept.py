"""Folders of embeddings: whole or not at all, and refused in words where they cannot be."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from cpfean.errors import ConfigError, DataError
from cpfean.search.array_folders import kept_arrays
from cpfean.search.kept import KeptCaptions, KeptImages, keep_images
from tests.search.conftest import Open

SHAPES = {"numbers": ((6, 2), "<f4"), "marks": ((6,), "|b1"), "nothing": ((6, 3, 0), "<f4")}
CPU = torch.device("cpu")


class Made:
    """Makes the arrays in three batches, and counts how often it was asked to."""

    def __init__(self, *, stops_at: int | None = None) -> None:
        self.times = 0
        self._stops_at = stops_at

    def __call__(self):  # type: ignore[no-untyped-def]
        self.times += 1
        for start in (0, 2, 4):
            if start == self._stops_at:
                raise KeyboardInterrupt
            rows = torch.arange(start, start + 2)
            yield (
                start + 2,
                {
                    "numbers": rows[:, None].double() + torch.tensor([0.25, 0.5]),
                    "marks": rows % 2 == 0,
                    "nothing": torch.empty(2, 3, 0),
                },
            )


def kept(folder: Path, made: Made) -> dict[str, np.ndarray]:
    return kept_arrays(folder, SHAPES, made, what="making", total=6, about={"of": "a test"})


def test_arrays_come_back_as_they_were_made_and_are_made_once(tmp_path: Path) -> None:
    made = Made()
    for _ in range(2):
        arrays = kept(tmp_path / "kept", made)
        expected = np.arange(6)[:, None] + [0.25, 0.5]
        np.testing.assert_array_equal(arrays["numbers"], expected)
        np.testing.assert_array_equal(arrays["marks"], [True, False] * 3)
        assert arrays["nothing"].shape == (6, 3, 0)
    assert made.times == 1
    assert (tmp_path / "kept" / "about.json").read_text() == '{\n "of": "a test"\n}\n'


def test_who_is_stopped_leaves_nothing_that_is_taken_for_whole(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        kept(tmp_path / "kept", Made(stops_at=4))
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == []
    # A kill leaves a folder under another name, which goes when the arrays are made.
    leftover = tmp_path / ".unfinished-kept-abcdef"
    leftover.mkdir()
    (leftover / "numbers.npy").write_bytes(b"some of them")
    made = Made()
    kept(tmp_path / "kept", made)
    assert made.times == 1
    assert not leftover.exists()


def test_what_is_written_to_a_mapped_array_is_not_written_to_its_file(tmp_path: Path) -> None:
    kept(tmp_path / "kept", Made())["numbers"][0, 0] = 99
    assert kept(tmp_path / "kept", Made())["numbers"][0, 0] == 0.25


@pytest.mark.parametrize("damage", ["cut", "gone", "other", "text"])
def test_a_damaged_folder_is_refused_with_what_to_remove(tmp_path: Path, damage: str) -> None:
    kept(tmp_path / "kept", Made())
    file = tmp_path / "kept" / "numbers.npy"
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:-8])
    elif damage == "gone":
        file.unlink()
    elif damage == "other":
        np.save(file, np.zeros((5, 2), dtype=np.float32))
    else:
        file.write_text("numbers")
    with pytest.raises(DataError, match=r"numbers\.npy: .*remove .*made again"):
        kept(tmp_path / "kept", Made())


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes where nobody may")
def test_a_cache_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(ConfigError, match="CPFEAN_CACHE"):
        kept(tmp_path / "kept", Made())
    tmp_path.chmod(0o700)


def test_a_cache_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("")
    with pytest.raises(ConfigError, match="CPFEAN_CACHE"):
        kept(tmp_path / "cache" / "kept", Made())


def test_rows_of_kept_images_and_captions_are_those_that_were_asked_for() -> None:
    rng = np.random.default_rng(0)
    images = KeptImages(
        pooled=rng.random((5, 4), dtype=np.float32),
        regions=rng.random((5, 3, 4), dtype=np.float32).astype(np.float16),
        mask=rng.random((5, 3)) < 0.5,
        thresholds=rng.random((5, 3), dtype=np.float32),
    )
    some = images.rows(np.array([3, 1]), device=CPU)
    for name, field in some._asdict().items():
        np.testing.assert_array_equal(field.numpy(), getattr(images, name)[[3, 1]])
    assert some.regions.dtype == torch.float32
    captions = KeptCaptions(
        pooled=rng.random((3, 4), dtype=np.float32),
        words=rng.random((7, 4), dtype=np.float32),
        salience=rng.random(7, dtype=np.float32),
        offsets=np.array([0, 2, 3, 7]),
    )
    some_captions = captions.rows(slice(0, 2), device=CPU)
    assert some_captions.mask.tolist() == [[True, True], [True, False]]
    np.testing.assert_array_equal(some_captions.words[0].numpy(), captions.words[:2])
    np.testing.assert_array_equal(some_captions.words[1, 0].numpy(), captions.words[2])
    expected = [[*captions.salience[:2]], [captions.salience[2], 1.0]]
    np.testing.assert_array_equal(some_captions.salience.numpy(), np.float32(expected))
    last = captions.rows(np.array([2]), device=CPU)
    np.testing.assert_array_equal(last.words[0].numpy(), captions.words[3:])


def test_an_image_that_the_model_makes_no_numbers_of_is_named(opened: Open, tmp_path: Path) -> None:
    trained = opened("mixed").trained  # of its own, which no other test uses
    with torch.no_grad():
        for weights in trained.model.image_encoder.parameters():
            weights.mul_(torch.nan)
    with pytest.raises(DataError, match=r"image 0 \(test-000000\): .* not finite"):
        keep_images(
            tmp_path / "kept",
            trained.model,
            trained.dataset,
            batch_size=7,
            device=CPU,
            about={},
        )
    assert not (tmp_path / "kept").exists()
