"""Which of the detections are regions, and what fills up where there are too few.

Axes:  region   of a photograph, the most confident first, places of the grid last
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32, Float64, Int64

from cpfean.photographs.detectors import Detections
from cpfean.photographs.grid import grid_boxes
from cpfean.photographs.suppression import overlaps, suppressed

# What a region is called that no detector has found. It is a place and no thing, so it gets a line
# of the vocabulary that says no more than that, and confidence 0, by which a model trusts its label
# as little as it can. To hand it the detector's best guess instead would put names into captions'
# way that the detector itself rejected.
PLACE = "region"
_MOST_FILLERS = 2000  # boxes of the grid that are tried


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """The regions of a photograph before they have features.

    Attributes:
        boxes: x1, y1, x2, y2 as shares of the photograph.
        labels: lines of the detector's names; -1 of a place that no detector has found.
        scores: confidence; 0 of a place.
        queries: whose embedding stands for each; none where there is no detector.
    """

    boxes: Float64[np.ndarray, "region 4"]
    labels: Int64[np.ndarray, " region"]
    scores: Float32[np.ndarray, " region"]
    queries: Int64[np.ndarray, " query"]


def choose(
    detections: Detections | None,
    *,
    size: tuple[int, int],
    num_regions: int,
    fill: bool,
    max_overlap: float,
) -> Chosen:
    """The best detections that do not overlap too much, and boxes of the grid after them.

    Without any detection the whole photograph is the region, whether it is to be filled up or not.

    Args:
        detections: None where there is no detector, and the grid is all.
        size: width and height of the photograph in pixels.
        num_regions, fill, max_overlap: as in `ExtractionSettings`.
    """
    grid = _grid()
    if detections is None:
        return Chosen(
            boxes=grid[:num_regions],
            labels=np.full(num_regions, -1, dtype=np.int64),
            scores=np.zeros(num_regions, dtype=np.float32),
            queries=np.zeros(0, dtype=np.int64),
        )
    # A box of less than a pixel shows nothing.
    sides = (detections.boxes[:, 2:] - detections.boxes[:, :2]) * np.array(size)
    candidates = np.flatnonzero((sides >= 1).all(axis=1))
    best = suppressed(detections.boxes[candidates], max_overlap=max_overlap, most=num_regions)
    kept = candidates[best]
    wanted = num_regions - len(kept) if fill else int(not len(kept))
    fillers = _fitting(grid, detections.boxes[kept], wanted, max_overlap=max_overlap)
    # A place has no query; the one that looked at most of the same pixels speaks for it.
    nearest = [int(overlaps(box, detections.query_boxes).argmax()) for box in fillers]
    return Chosen(
        boxes=np.concatenate((detections.boxes[kept], fillers)),
        labels=np.concatenate((detections.labels[kept], np.full(len(fillers), -1))),
        scores=np.concatenate((detections.scores[kept], np.zeros(len(fillers), np.float32))),
        queries=np.concatenate((detections.queries[kept], np.array(nearest, dtype=np.int64))),
    )


@functools.cache
def _grid() -> Float64[np.ndarray, "box 4"]:
    return grid_boxes(_MOST_FILLERS)


def _fitting(
    grid: Float64[np.ndarray, "box 4"],
    kept: Float64[np.ndarray, "region 4"],
    count: int,
    *,
    max_overlap: float,
) -> Float64[np.ndarray, "filler 4"]:
    """The first boxes of the grid that are not nearly a region which is there already."""
    free = np.ones(len(grid), dtype=bool)
    for box in kept if count else ():
        free &= overlaps(box, grid) <= max_overlap
    return grid[free][:count]
