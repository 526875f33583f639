"""Pooling inside boxes, against slow integrals in float64."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cpfean.photographs.pooling import pooled_regions


def surface(features: np.ndarray, x: float, y: float) -> np.ndarray:
    """The bilinear surface through the middles of the cells, at a point in shares of the image."""
    rows, columns, _ = features.shape
    u = min(max(x * columns - 0.5, 0.0), columns - 1.0)
    v = min(max(y * rows - 0.5, 0.0), rows - 1.0)
    left, top = min(math.floor(u), columns - 1), min(math.floor(v), rows - 1)
    right, below = min(left + 1, columns - 1), min(top + 1, rows - 1)
    a, b = u - left, v - top
    upper = (1 - a) * features[top, left] + a * features[top, right]
    lower = (1 - a) * features[below, left] + a * features[below, right]
    return (1 - b) * upper + b * lower


def exact_mean(features: np.ndarray, box: np.ndarray) -> np.ndarray:
    """Simpson's rule on the pieces between the middles, on each of which it is exact."""
    rows, columns, _ = features.shape

    def pieces(first: float, last: float, cells: int) -> list[tuple[float, float]]:
        middles = [(k + 0.5) / cells for k in range(cells)]
        ends = [first, *(m for m in middles if first < m < last), last]
        return list(itertools.pairwise(ends))

    total = np.zeros(features.shape[2])
    for x1, x2 in pieces(box[0], box[2], columns):
        for y1, y2 in pieces(box[1], box[3], rows):
            for x, wx in ((x1, 1), ((x1 + x2) / 2, 4), (x2, 1)):
                for y, wy in ((y1, 1), ((y1 + y2) / 2, 4), (y2, 1)):
                    weight = wx * wy / 36 * (x2 - x1) * (y2 - y1)
                    total += weight * surface(features, x, y)
    return total / ((box[2] - box[0]) * (box[3] - box[1]))


def drawn(seed: int, rows: int, columns: int, boxes: int = 3) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    corners = generator.random((boxes, 2, 2))
    return (
        generator.standard_normal((rows, columns, 2)),
        np.concatenate((corners.min(axis=1), corners.max(axis=1)), axis=1),
    )


@given(seed=st.integers(0, 2**16), rows=st.integers(1, 6), columns=st.integers(1, 6))
def test_it_is_the_exact_mean(seed: int, rows: int, columns: int) -> None:
    features, boxes = drawn(seed, rows, columns)
    found = pooled_regions(torch.from_numpy(features), torch.from_numpy(boxes))
    expected = np.stack([exact_mean(features, box) for box in boxes])
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-9)


def test_many_samples_come_close_to_it() -> None:
    features, boxes = drawn(1, 5, 7, boxes=2)
    shares = (np.arange(60) + 0.5) / 60
    for box, found in zip(
        boxes, pooled_regions(torch.from_numpy(features), torch.from_numpy(boxes)), strict=True
    ):
        points = [
            surface(features, box[0] + x * (box[2] - box[0]), box[1] + y * (box[3] - box[1]))
            for x in shares
            for y in shares
        ]
        np.testing.assert_allclose(found.numpy(), np.mean(points, axis=0), atol=1e-3)


@given(seed=st.integers(0, 2**16), rows=st.integers(1, 9), columns=st.integers(1, 9))
def test_the_whole_image_is_the_mean_of_the_cells(seed: int, rows: int, columns: int) -> None:
    features, _ = drawn(seed, rows, columns)
    whole = torch.tensor([[0.0, 0.0, 1.0, 1.0]])
    found = pooled_regions(torch.from_numpy(features), whole)
    np.testing.assert_allclose(found[0].numpy(), features.mean(axis=(0, 1)), atol=1e-6)


@given(seed=st.integers(0, 2**16))
def test_two_halves_of_a_box_are_its_mean_together(seed: int) -> None:
    features, boxes = drawn(seed, 4, 6)
    box = torch.from_numpy(boxes[:1])
    middle = (box[:, 0] + box[:, 2]) / 2
    left, right = box.clone(), box.clone()
    left[:, 2], right[:, 0] = middle, middle
    parts = pooled_regions(torch.from_numpy(features), torch.cat((left, right, box)))
    torch.testing.assert_close((parts[0] + parts[1]) / 2, parts[2], atol=1e-8, rtol=0)


def test_a_box_without_width_is_the_surface_at_its_place() -> None:
    features, _ = drawn(3, 4, 5)
    for x, y in [(0.0, 0.0), (0.5, 0.3), (1.0, 1.0), (0.1, 0.95)]:
        point = torch.tensor([[x, y, x, y]], dtype=torch.float64)
        found = pooled_regions(torch.from_numpy(features), point)[0].numpy()
        np.testing.assert_allclose(found, surface(features, x, y), atol=1e-12)


@pytest.mark.parametrize("side", [1e-3, 1e-5, 1e-7, 1e-9])
def test_float32_keeps_its_digits_however_small_the_box(side: float) -> None:
    features, _ = drawn(4, 16, 16)
    box = np.array([[0.4, 0.6, 0.4 + side, 0.6 + side]])
    found = pooled_regions(torch.from_numpy(features).float(), torch.from_numpy(box))
    middle = surface(features, 0.4 + side / 2, 0.6 + side / 2)
    np.testing.assert_allclose(found[0].numpy(), middle, atol=2e-6 + 2 * side**2 * 256)


def test_a_constant_map_is_that_constant_everywhere() -> None:
    _, boxes = drawn(5, 1, 1, boxes=50)
    found = pooled_regions(torch.full((7, 3, 1), 2.5), torch.from_numpy(boxes).float())
    torch.testing.assert_close(found, torch.full((50, 1), 2.5))
