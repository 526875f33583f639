"""The boxes that do not depend on the photograph."""

from __future__ import annotations

import numpy as np
import pytest

from cpfean.photographs.grid import grid_boxes


def covered(boxes: np.ndarray) -> np.ndarray:
    """How many boxes each of 120 x 120 points lies in."""
    points = (np.arange(120) + 0.5) / 120
    across = (boxes[:, None, 0] < points) & (points < boxes[:, None, 2])
    down = (boxes[:, None, 1] < points) & (points < boxes[:, None, 3])
    return np.einsum("by,bx->yx", down.astype(int), across.astype(int))


@pytest.mark.parametrize("count", [1, 5, 36, 61, 97, 500])
def test_there_are_as_many_as_asked_for_all_different_and_inside(count: int) -> None:
    boxes = grid_boxes(count)
    assert boxes.shape == (count, 4)
    assert len(np.unique(boxes, axis=0)) == count
    assert boxes.min() >= 0
    assert boxes.max() <= 1
    assert (boxes[:, :2] < boxes[:, 2:]).all()


def test_fewer_boxes_are_the_first_of_more() -> None:
    np.testing.assert_array_equal(grid_boxes(50)[:17], grid_boxes(17))


def test_the_first_is_the_whole_and_areas_fall_from_level_to_level() -> None:
    boxes = grid_boxes(61)
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(axis=1)
    levels = [(0, 1, 1), (1, 7, 1 / 2), (7, 11, 1 / 4), (11, 20, 1 / 9), (20, 36, 1 / 16)]
    for first, last, area in [*levels, (36, 61, 1 / 25)]:
        np.testing.assert_allclose(areas[first:last], area)


def test_thirty_six_are_whole_levels_that_see_every_part_of_each_tiling() -> None:
    # Whole 1, and a point lies in one to two bands each way, and in one tile of each size.
    times = covered(grid_boxes(36))
    assert times.min() == 1 + 2 + 3
    assert times.max() == 1 + 4 + 3


def test_they_are_the_same_seen_in_a_mirror_level_by_level() -> None:
    for first, last in [(0, 1), (1, 7), (7, 11), (11, 20), (20, 36)]:
        level = grid_boxes(36)[first:last]
        mirrored = level[:, [2, 1, 0, 3]] * [-1, 1, -1, 1] + [1, 0, 1, 0]
        key = sorted(map(tuple, level.round(9)))
        np.testing.assert_allclose(sorted(map(tuple, mirrored.round(9))), key)


def test_a_level_that_is_cut_keeps_what_is_next_to_the_centre() -> None:
    taken, left = grid_boxes(36)[20:24], grid_boxes(36)[24:]
    distance = [np.abs(part[:, :2] + part[:, 2:] - 1).sum(axis=1) for part in (taken, left)]
    assert distance[0].max() < distance[1].min()
