"""Suppression of overlapping boxes, against the definition."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from pycocotools import mask

from cpfean.photographs.suppression import overlaps, suppressed


def drawn(seed: int, count: int) -> np.ndarray:
    corners = np.random.default_rng(seed).random((count, 2, 2))
    return np.concatenate((corners.min(axis=1), corners.max(axis=1)), axis=1)


def naive_overlap(a: np.ndarray, b: np.ndarray) -> float:
    width = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
    height = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    shared = width * height
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared
    return shared / union if union else 0.0


def naive(boxes: np.ndarray, max_overlap: float, most: int) -> list[int]:
    kept: list[int] = []
    for i in range(len(boxes)):
        if all(naive_overlap(boxes[i], boxes[j]) <= max_overlap for j in kept):
            kept.append(i)
    return kept[:most]


@given(
    seed=st.integers(0, 2**16),
    count=st.integers(0, 40),
    max_overlap=st.floats(0.05, 1),
    most=st.integers(0, 40),
)
def test_it_is_the_greedy_rule(seed: int, count: int, max_overlap: float, most: int) -> None:
    boxes = drawn(seed, count)
    found = suppressed(boxes, max_overlap=max_overlap, most=most)
    assert found.tolist() == naive(boxes, max_overlap, most)


@given(seed=st.integers(0, 2**16))
def test_overlaps_are_those_of_pycocotools(seed: int) -> None:
    boxes = drawn(seed, 8) * 100
    as_coco = np.concatenate((boxes[:, :2], boxes[:, 2:] - boxes[:, :2]), axis=1)
    expected = mask.iou(as_coco[:1], as_coco, [False] * 8)[0]
    np.testing.assert_allclose(overlaps(boxes[0], boxes), expected, atol=1e-12)


def test_equal_boxes_are_kept_once_however_much_they_may_overlap() -> None:
    boxes = np.repeat(drawn(0, 1), 4, axis=0)
    assert suppressed(boxes, max_overlap=0.99, most=9).tolist() == [0]
    assert suppressed(boxes, max_overlap=1.0, most=9).tolist() == [0, 1, 2, 3]


def test_boxes_without_area_overlap_with_nothing() -> None:
    points = np.array([[0.5, 0.5, 0.5, 0.5]] * 2)
    assert overlaps(points[0], points).tolist() == [0, 0]
