"""Boxes that do not depend on what is in the photograph, coarse ones first.

For whoever has no detector, and to fill up where one finds little.

Axes:  region   in the order in which they are taken
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from jaxtyping import Float64


def grid_boxes(count: int) -> Float64[np.ndarray, "region 4"]:
    """The first boxes of the grid: x1, y1, x2, y2 as shares of width and height.

    The whole; bands across it, upright and lying, half as wide as it (left, middle, right; above,
    middle, below); then tiles, 2 x 2, 3 x 3, 4 x 4 and so on. The first 36, the usual number, end
    with the 4 x 4 tiles, so that each level is complete. Within a level those next to the centre
    come first, where photographers put what they mean; a level that is cut loses its corners.
    """
    boxes: list[tuple[float, float, float, float]] = []
    for level in _levels():
        # Sorted by a rounded distance: mirror images of each other keep the order of reading.
        boxes += sorted(level, key=lambda box: round(_off_centre(box), 9))
        if len(boxes) >= count:
            break
    return np.array(boxes[:count], dtype=np.float64).reshape(count, 4)


def _levels() -> Iterator[list[tuple[float, float, float, float]]]:
    yield [(0.0, 0.0, 1.0, 1.0)]
    starts = (0.0, 0.25, 0.5)
    yield [(a, 0.0, a + 0.5, 1.0) for a in starts] + [(0.0, a, 1.0, a + 0.5) for a in starts]
    tiles = 2
    while True:
        edges = [i / tiles for i in range(tiles + 1)]
        yield [
            (edges[x], edges[y], edges[x + 1], edges[y + 1])
            for y in range(tiles)
            for x in range(tiles)
        ]
        tiles += 1


def _off_centre(box: tuple[float, float, float, float]) -> float:
    return (box[0] + box[2] - 1) ** 2 + (box[1] + box[3] - 1) ** 2
