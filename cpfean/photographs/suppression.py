"""Which of many overlapping boxes are kept.

Axes:  box   the most wanted first     kept   those that are left
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Float64, Int64


def overlaps(
    box: Float[np.ndarray, "4"], boxes: Float[np.ndarray, "box 4"]
) -> Float64[np.ndarray, " box"]:
    """IoU of one box with each of many, in float64; 0 where both are without area."""
    one, many = box.astype(np.float64), boxes.astype(np.float64)
    sides = np.minimum(one[2:], many[:, 2:]) - np.maximum(one[:2], many[:, :2])
    shared = sides.clip(min=0).prod(axis=1)
    union = (one[2:] - one[:2]).prod() + (many[:, 2:] - many[:, :2]).prod(axis=1) - shared
    return np.divide(shared, union, out=np.zeros_like(shared), where=union > 0)


def suppressed(
    boxes: Float[np.ndarray, "box 4"], *, max_overlap: float, most: int
) -> Int64[np.ndarray, " kept"]:
    """Positions of the boxes that are kept, in order.

    Each box is kept unless its IoU with one that was kept before is above `max_overlap`; labels do
    not matter. That is because a region is a place: a second one of the same pixels says nothing
    new, whatever it is called. Detectors that rank pairs of query and label bring the same box
    several times.

    Args:
        boxes: x1, y1, x2, y2 in any unit, the most confident first.
        max_overlap: an IoU.
        most: stop after so many.
    """
    kept: list[int] = []
    alive = np.ones(len(boxes), dtype=bool)
    for position in range(len(boxes)):
        if len(kept) >= most:
            break
        if alive[position]:
            kept.append(position)
            alive[position + 1 :] &= (
                overlaps(boxes[position], boxes[position + 1 :]) <= max_overlap
            )
    return np.array(kept, dtype=np.int64)
