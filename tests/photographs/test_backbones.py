"""Backbones: whose map it is, and that a box of the photograph is the same box of the map."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from cpfean.errors import CheckpointError
from cpfean.photographs.backbones import Backbone
from cpfean.photographs.model_files import find_model

Made = Callable[[str], Path]
# Tokens before the patches, pixels a cell, side of the square that the processor makes.
KINDS = {
    "dinov2": (1, 4, 32),
    "siglip": (0, 8, 32),
    "siglip2": (0, 8, 32),
    "vit": (1, 8, 32),
    "convnext": (0, 32, 96),
}


def backbone(folder: Path, resolution: int | None = None) -> Backbone:
    files = find_model(str(folder), what="backbone")
    return Backbone(files, device=torch.device("cpu"), resolution=resolution)


def library(folder: Path) -> tuple[Any, Any]:
    from transformers import AutoImageProcessor, AutoModel

    model = AutoModel.from_pretrained(folder).eval()
    return getattr(model, "vision_model", model), AutoImageProcessor.from_pretrained(
        folder, backend="pil"
    )


@pytest.mark.parametrize("kind", KINDS)
def test_a_square_photograph_gives_what_the_library_gives(kind: str, made: Made) -> None:
    others, stride, side = KINDS[kind]
    model, processor = library(made(kind))
    photograph = np.random.default_rng(0).integers(0, 256, (120, 120, 3), dtype=np.uint8)
    resized = Image.fromarray(photograph).resize((side, side), processor.resample)
    inputs = processor(images=[resized], do_resize=False, do_center_crop=False, return_tensors="pt")
    with torch.no_grad():
        states = model(**inputs).last_hidden_state[0]
    if kind == "convnext":
        expected = states.permute(1, 2, 0)
    else:
        expected = states[others:].reshape(side // stride, side // stride, -1)
    (found,) = backbone(made(kind))([photograph])
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_the_shape_of_a_photograph_is_kept_in_whole_cells(
    kind: str, made: Made, photographs: list[np.ndarray]
) -> None:
    _, stride, side = KINDS[kind]
    found_by = backbone(made(kind))
    assert (found_by.stride, found_by.resolution) == (stride, side)
    for photograph, features in zip(photographs, found_by(photographs), strict=True):
        height, width = photograph.shape[:2]
        rows, columns, dim = features.shape
        assert dim == found_by.feature_dim == 16
        cells = side / stride
        assert abs(rows - cells * np.sqrt(height / width)) <= 0.5
        assert abs(columns - cells * np.sqrt(width / height)) <= 0.5


def test_more_pixels_give_more_cells(made: Made, photographs: list[np.ndarray]) -> None:
    (found,) = backbone(made("dinov2"), resolution=64)([photographs[3]])
    assert found.shape == (17, 15, 16)


def test_a_narrow_photograph_has_two_cells_across(made: Made) -> None:
    narrow = np.zeros((20, 600, 3), dtype=np.uint8)
    (found,) = backbone(made("dinov2"))([narrow])
    assert found.shape[0] == 2
    assert found.shape[1] == 44


@pytest.mark.parametrize("kind", KINDS)
def test_a_map_does_not_depend_on_the_company(
    kind: str, made: Made, photographs: list[np.ndarray]
) -> None:
    found_by, with_others = backbone(made(kind)), backbone(made(kind))
    with_others.together = True  # as on a GPU
    for photograph, together in zip(photographs, with_others(photographs), strict=True):
        (alone,) = found_by([photograph])
        torch.testing.assert_close(together, alone, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("place", [(0, 0), (0, 1), (1, 0), (1, 1)])
def test_what_changes_in_a_corner_changes_the_map_most_there(
    made: Made, place: tuple[int, int]
) -> None:
    """With no cut: a patch at the very border of a long photograph is in the corner cell."""
    found_by = backbone(made("dinov2"))
    before = np.full((60, 120, 3), 128, dtype=np.uint8)
    after = before.copy()
    rows = slice(0, 6) if place[0] == 0 else slice(54, 60)
    columns = slice(0, 6) if place[1] == 0 else slice(114, 120)
    after[rows, columns] = 255
    one, other = found_by([before, after])
    change = (one - other).norm(dim=-1)
    corner = (change.shape[0] - 1) * place[0], (change.shape[1] - 1) * place[1]
    assert change.flatten().argmax() == corner[0] * change.shape[1] + corner[1]


def test_what_is_no_vision_backbone_is_refused(made: Made) -> None:
    with pytest.raises(CheckpointError, match="expected a vision backbone"):
        backbone(made("rt_detr_v2"))
    with pytest.raises(CheckpointError, match=r"expected a vision backbone|not supported"):
        backbone(made("grounding_dino"))
