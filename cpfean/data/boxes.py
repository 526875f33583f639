"""Boxes and the orders in which their coordinates are written.

The native format has x1, y1, x2, y2 in pixels. Detectors also write y before x, a corner and the
extent, the centre and the extent, or shares of the image. By the sizes of the images it can often
be told that boxes are in another order than was said, and in which; never if all images are square.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float

PIXEL = 1.0 + 1e-3  # rounding of box coordinates in float32

Boxes = Float[np.ndarray, "*batch 4"]
Sizes = Float[np.ndarray, "*batch 2"]  # width, height

# How each order becomes x1, y1, x2, y2; the first is ours.
ORDERS: dict[str, tuple[str, Callable[[np.ndarray], list[np.ndarray]]]] = {
    "xyxy": ("x1, y1, x2, y2", lambda b: [b[0], b[1], b[2], b[3]]),
    "yxyx": ("y1, x1, y2, x2", lambda b: [b[1], b[0], b[3], b[2]]),
    "xywh": ("x, y, width, height", lambda b: [b[0], b[1], b[0] + b[2], b[1] + b[3]]),
    "cxcywh": (
        "centre x, centre y, width, height",
        lambda b: [b[0] - b[2] / 2, b[1] - b[3] / 2, b[0] + b[2] / 2, b[1] + b[3] / 2],
    ),
    "xxyy": ("x1, x2, y1, y2", lambda b: [b[0], b[2], b[1], b[3]]),
}
UNITS = ("pixels", "shares")

_FEW = 0.01  # of the boxes may be broken in a file whose order is guessed
_TRIED = 20_000  # boxes


class Layout(NamedTuple):
    """How boxes are written.

    Attributes:
        order: one of `ORDERS`.
        units: "pixels", or "shares" of the image's width and height.
    """

    order: str = "xyxy"
    units: str = "pixels"

    def __str__(self) -> str:
        shares = " as shares of the image" if self.units == "shares" else ""
        return f"{ORDERS[self.order][0]}{shares}"

    @property
    def flags(self) -> tuple[str, ...]:
        """What declares it to prepare.py."""
        order = () if self.order == "xyxy" else ("--box-order", self.order)
        return order + (() if self.units == "pixels" else ("--box-units", self.units))


NATIVE = Layout()


def corners(boxes: Boxes, sizes: Sizes, layout: Layout) -> Boxes:
    """Boxes as x1, y1, x2, y2 in pixels, in double precision.

    Args:
        boxes: as `layout` says.
        sizes: of their images.
    """
    turned = ORDERS[layout.order][1](np.moveaxis(boxes.astype(np.float64), -1, 0))
    result = np.stack(turned, axis=-1)
    if layout.units == "shares":
        result *= np.concatenate([sizes, sizes], axis=-1)
    return result


def misfits(boxes: Boxes, sizes: Sizes) -> Bool[np.ndarray, "*batch"]:
    """Where corners in pixels do not make a box inside the image."""
    limits = np.concatenate([sizes, sizes], axis=-1)
    clipped = np.clip(boxes, 0, limits)
    with np.errstate(invalid="ignore"):  # of what is not finite, which fits nowhere
        outside = ~(np.abs(boxes - clipped).max(axis=-1) <= PIXEL)
        flat = ~(clipped[..., 2:] > clipped[..., :2]).all(axis=-1)
    return outside | flat


def guessed_layout(
    boxes: Float[np.ndarray, "box 4"], sizes: Float[np.ndarray, "box 2"], declared: Layout = NATIVE
) -> Layout | None:
    """The layout that nearly all boxes fit, if many do not fit the declared one.

    Args:
        boxes: as they are written; those that are not finite fit nowhere.
        sizes: of the image of each.
    """
    if not len(boxes):
        return None
    boxes, sizes = _thinned(boxes), _thinned(sizes)
    few = _FEW * len(boxes)

    def misfitting(layout: Layout) -> int:
        return int(misfits(corners(boxes, sizes, layout), sizes).sum())

    # In an image of a few pixels, shares and pixels look the same.
    small = ((boxes <= 1.01) & (boxes >= -0.01)).all(axis=-1) & (sizes >= 8).all(axis=-1)
    units = "shares" if (~small).sum() <= few else "pixels"
    if units == declared.units and misfitting(declared) <= 2 * few:
        return None
    # Of orders that fit alike, the more usual one.
    best = min((Layout(order, units) for order in ORDERS), key=misfitting)
    if best != declared and misfitting(best) <= few:
        return best
    # Shares that fit no order are still no pixels.
    return Layout("xyxy", units) if units == "shares" != declared.units else None


def order_is_open(
    boxes: Float[np.ndarray, "box 4"], sizes: Float[np.ndarray, "box 2"], declared: Layout = NATIVE
) -> bool:
    """Whether the boxes fit into their images with x and y exchanged too, as in squares."""
    exchanged = boxes[:, [1, 0, 3, 2]]
    turned = corners(exchanged, sizes, declared)
    return bool(len(boxes)) and not misfits(turned, sizes).any()


def _thinned(rows: np.ndarray) -> np.ndarray:
    """Evenly spread rows, few enough to try every layout on them in no time."""
    return rows[:: max(1, len(rows) // _TRIED)]


def wrong_layout(
    guess: Layout,
    declared: Layout,
    boxes: Float[np.ndarray, "box 4"],
    sizes: Float[np.ndarray, "box 2"],
) -> str:
    """What a finding says of boxes that are written in another way than was said.

    Args:
        guess: how they seem to be written.
        declared: how they were said to be.
        boxes: as they are written; one that does not fit is shown.
        sizes: of the image of each.
    """
    bad = misfits(corners(boxes, sizes, declared), sizes)
    shown = int(bad.argmax())
    said = (
        f"expected {declared}, found {numbers(boxes[shown])} in an image of {numbers(sizes[shown])}"
    )
    if bad.any():
        said += f" and {bad.sum():,} of {len(bad):,} boxes that do not fit so"
    said += f"; nearly all boxes fit as {guess}"
    if guess.units == "shares" and guess.order in ("xyxy", "yxyx"):
        said += " (which of x and y comes first, shares do not tell)"
    return said


def numbers(values: np.ndarray) -> str:
    """A few numbers for people."""
    return "(" + ", ".join(f"{value:g}" for value in values) + ")"
