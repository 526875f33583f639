"""Small photographs, and an extractor that looks at them in no time."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image

from cpfean.data.convert.photographs import Photograph
from cpfean.extraction.batches import Extractor
from cpfean.photographs.extractor import PhotographRegions

REGIONS = 4


def write_photographs(
    folder: Path, *, train: int = 7, dev: int = 3, test: int = 3, captions: int = 2
) -> dict[str, list[Photograph]]:
    """Photographs of noise, in sizes of their own."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    found: dict[str, list[Photograph]] = {}
    for split, number in (("train", train), ("dev", dev), ("test", test)):
        found[split] = []
        for row in range(number):
            path = folder / f"{split} {row:03d}.png"
            height, width = rng.integers(20, 40, size=2)
            pixels = rng.integers(0, 256, size=(height, width, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(path)
            texts = tuple(f"picture {row} of {split}, told for the {n}." for n in range(captions))
            found[split].append(Photograph(name=path.name, path=str(path), captions=texts))
    return found


def files_of(folder: Path) -> dict[str, str]:
    """A digest of each file of a folder, by name."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


class Quadrants:
    """The quadrants of a photograph, a product of its colours with a matrix for each.

    A product of large matrices, so that its last bits change with the number of threads and with
    what else is in the batch.

    Attributes:
        seen: photographs that it was given so far.
    """

    def __init__(self, *, fewest: int = REGIONS, weights: int = 0) -> None:
        self.feature_dim = 16
        self.label_names: list[str] | None = ["thing", "stuff"]
        self.seen = 0
        self._fewest = fewest
        generator = torch.Generator().manual_seed(weights)
        self._weights = torch.randn(3 * 4096, self.feature_dim, generator=generator)
        self._number = weights

    def provenance(self) -> dict[str, Any]:
        return {
            "settings": {"detector": "quadrants", "num_regions": REGIONS, "fewest": self._fewest},
            "detector": {"name": "quadrants", "sha256": f"{self._number}"},
            "versions": {"torch": torch.__version__},
        }

    def __call__(
        self, photographs: Sequence[UInt8[np.ndarray, "height width 3"]]
    ) -> list[PhotographRegions]:
        self.seen += len(photographs)
        quarters = []
        for pixels in photographs:
            height, width = pixels.shape[:2]
            for top in (0, height // 2):
                for left in (0, width // 2):
                    part = pixels[top : top + height // 2, left : left + width // 2]
                    quarters.append(np.resize(part.astype(np.float32) / 255, 3 * 4096))
        features = (torch.from_numpy(np.stack(quarters)) @ self._weights).half().numpy()
        return [
            self._regions(pixels, features[REGIONS * row : REGIONS * (row + 1)])
            for row, pixels in enumerate(photographs)
        ]

    def _regions(self, pixels: np.ndarray, features: np.ndarray) -> PhotographRegions:
        height, width = pixels.shape[:2]
        # Between the fewest and all, by what is in the picture.
        count = self._fewest + int(pixels[0, 0, 0]) % (REGIONS - self._fewest + 1)
        x, y = width // 2, height // 2
        boxes = [(0, 0, x, y), (x, 0, 2 * x, y), (0, y, x, 2 * y), (x, y, 2 * x, 2 * y)]
        return PhotographRegions(
            features=features[:count],
            boxes=np.array(boxes, dtype=np.float32)[:count],
            size=(width, height),
            labels=np.array([0, 1, 0, 1], dtype=np.int32)[:count],
            scores=np.linspace(0.9, 0.1, REGIONS, dtype=np.float32)[:count],
        )


def quadrants(device: torch.device) -> Extractor:
    return Quadrants()
