"""A data folder of six training images, small enough to be broken in every way."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

NUM_LABELS = 7
IMAGES = {"train": 6, "dev": 2, "test": 3}
REGIONS, WIDTH = 5, 8


def write_folder(folder: Path) -> Path:
    """Writes three valid splits in the native format."""
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True)
    names = "".join(f"thing {i}\n" for i in range(NUM_LABELS))
    (folder / "objects_vocab.txt").write_text(names, encoding="utf-8")
    for split, images in IMAGES.items():
        sizes = rng.integers(200, 640, (images, 2)).astype(np.int32)
        corners = np.sort(rng.random((images, REGIONS, 2, 2)), axis=2)
        corners[:, 0] = [[0, 0], [1, 1]]  # one region is the whole image
        boxes = corners * sizes[:, None, None]
        features = rng.normal(size=(images, REGIONS, WIDTH)).astype(np.float32)
        labels = rng.integers(0, NUM_LABELS, (images, REGIONS)).astype(np.int16)
        np.save(folder / f"{split}_ims.npy", features)
        np.save(folder / f"{split}_boxes.npy", boxes.reshape(images, REGIONS, 4).astype(np.float32))
        np.save(folder / f"{split}_sizes.npy", sizes)
        np.save(folder / f"{split}_labels.npy", labels)
        np.save(folder / f"{split}_scores.npy", rng.random((images, REGIONS)).astype(np.float16))
        captions = [f"a caption, number {j} of image {i}" for i in range(images) for j in range(5)]
        (folder / f"{split}_caps.txt").write_text("\n".join(captions) + "\n", encoding="utf-8")
        ids = "".join(f"{split}{i}.jpg\n" for i in range(images))
        (folder / f"{split}_ids.txt").write_text(ids, encoding="utf-8")
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A valid data folder of its own for each test."""
    return write_folder(tmp_path / "data")


@pytest.fixture(scope="session")
def new_folder() -> Callable[[Path], Path]:
    """Writes a valid data folder where it is told to."""
    return write_folder
