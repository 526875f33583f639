"""Models that are made once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.photographs import models


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a tiny model by the name of its maker, without "tiny_"."""
    root = tmp_path_factory.mktemp("models")

    def make(name: str) -> Path:
        folder = root / name
        if not folder.is_dir():
            getattr(models, f"tiny_{name}")(folder)
        return folder

    return make


@pytest.fixture(scope="session")
def photographs() -> list[np.ndarray]:
    """Four of three shapes, each with coloured rectangles at other places."""
    generator = np.random.default_rng(0)
    result = []
    for height, width in [(60, 90), (90, 60), (60, 90), (75, 70)]:
        image = np.full((height, width, 3), 120, dtype=np.uint8)
        for _ in range(5):
            y, x = generator.integers(0, height - 20), generator.integers(0, width - 20)
            image[y : y + 20, x : x + 20] = generator.integers(0, 256, 3)
        result.append(image)
    return result


@pytest.fixture(scope="session")
def cpu() -> torch.device:
    return torch.device("cpu")
