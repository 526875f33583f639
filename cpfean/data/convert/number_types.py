"""Which type the numbers of a table have: nothing in it says so, and tables differ.

How many bytes a number of the boxes, labels and confidences takes follows from the count of
regions. That of the features does not, as their width is unknown too; and no count of bytes tells
floats from integers or one byte order from the other. So the numbers are looked at: read as another
type than their own, they are not finite, spread over dozens of orders of magnitude, or differ
between even and odd places, as halves of numbers do.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

# Narrow ones first: numbers of a wide type are never taken for a narrow one, but the pairs that
# narrow ones make may now and then look like numbers. Little-endian first, as nearly all are.
FEATURE_TYPES = ("<f2", "<f4", "<f8", ">f2", ">f4", ">f8")
_BOX_TYPES = ("<f2", "<f4", "<f8", "<i2", "<i4", "<i8", ">f2", ">f4", ">f8", ">i2", ">i4", ">i8")
_LABEL_TYPES = ("u1", "<i2", "<i4", "<i8", "<f2", "<f4", "<f8", ">i2", ">i4", ">i8", ">f4", ">f8")
_SCORE_TYPES = ("<f2", "<f4", "<f8", ">f2", ">f4", ">f8")

_SPREAD = (
    6.0  # standard deviation of log2 of features; they have 1 to 4, pairs of them 8 times that
)
_PHASE = 4.0  # how far the mean log2 of every second number may be from that of the others
_ORDINARY = (2.0**-16, 2.0**20)  # where the median of features lies
_TINY = 2.0**-60  # below it are no features but integers, or halves of numbers
_LARGEST_LABEL = 100_000
_AGREE = 0.75  # of the rows: some may be broken


class Sample(NamedTuple):
    """A row of a table whose number types are wanted.

    Attributes:
        num_regions: how many there are.
        size: the larger one of the image's width and height.
        width: bytes of features a region has; no whole number if the row is cut.
        features: decoded bytes of the first features.
        columns: decoded bytes of the other columns.
    """

    num_regions: int
    size: int
    width: float
    features: bytes
    columns: dict[str, bytes]


def feature_type(samples: Sequence[Sample]) -> str | None:
    """The type under which the features of nearly all rows look like features; None if none.

    Rows whose bytes no type divides, or which differ from most, are left aside.
    """
    usual = usual_width(samples)
    rows = [sample.features for sample in samples if sample.width == usual]
    if not rows or usual % 2:
        return None
    if not any(any(row) for row in rows):
        return "<f4"  # nothing but zeros, in any type
    fitting = [t for t in FEATURE_TYPES if usual % np.dtype(t).itemsize == 0]
    return next((t for t in fitting if _most(rows, t, looks_like_features)), None)


def usual_width(samples: Sequence[Sample]) -> float:
    """Bytes of features that a region has in most rows."""
    widths = [sample.width for sample in samples]
    return max(set(widths), key=widths.count) if widths else 0


def small_type(column: str, samples: Sequence[Sample], each: int, usual: str) -> str:
    """The type of a column whose numbers are counted.

    Args:
        column: "boxes", "objects_id" or "objects_conf".
        samples: some rows.
        each: numbers of a region.
        usual: the type that is taken if nothing fits; what is wrong is then told of the rows.
    """
    sizes = [len(s.columns[column]) / (s.num_regions * each) for s in samples]
    size = max(set(sizes), key=sizes.count) if sizes else 0
    rows = [s for s, found in zip(samples, sizes, strict=True) if found == size]
    types, fits = _SMALL[column]
    same_size = [t for t in types if np.dtype(t).itemsize == size]
    if usual in same_size:
        same_size = [usual, *(t for t in same_size if t != usual)]
    for kind in same_size:
        agree = sum(
            fits(np.frombuffer(s.columns[column], kind).astype(np.float64), s.size) for s in rows
        )
        if agree >= _AGREE * len(rows):
            return kind
    return next(iter(same_size), usual)


def described(sample: Sample) -> str:
    """What a row's features would be as each type, for people."""
    told = []
    for kind in FEATURE_TYPES[:3]:
        size = np.dtype(kind).itemsize
        if sample.width % size:
            continue
        values = np.frombuffer(sample.features, kind)
        with np.errstate(all="ignore"):
            finite = values[np.isfinite(values)].astype(np.float64)
        low, high = (finite.min(), finite.max()) if len(finite) else (np.nan, np.nan)
        broken = 1 - len(finite) / len(values)
        told.append(
            f"{values.dtype.name} of width {sample.width / size:.0f}: {low:.3g} to {high:.3g}, "
            f"{broken:.1%} not finite"
        )
    return "; ".join(told) or "no whole number of floats a region"


def looks_like_features(values: np.ndarray) -> bool:
    """Whether numbers, decoded as some type, can be features."""
    with np.errstate(all="ignore"):
        values = values.astype(np.float64)
        if not np.isfinite(values).all():
            return False
        magnitude = np.abs(values)
    there = magnitude > 0
    if not there.any():
        return True
    logs = np.log2(magnitude, out=np.zeros_like(magnitude), where=there)
    low, high = _ORDINARY
    tiny = (magnitude[there] < _TINY).mean()
    if tiny > 0.001 or not low <= np.median(magnitude[there]) <= high:
        return False
    return bool(logs[there].std() <= _SPREAD) and _is_even(values, there, logs)


def _is_even(values: np.ndarray, there: np.ndarray, logs: np.ndarray) -> bool:
    """Whether numbers at all places of two and of four are alike, as halves of numbers are not."""
    for step in (2, 4):
        shares, means, different = [], [], []
        for phase in range(step):
            different.append(len(np.unique(values[phase::step])))
            share = there[phase::step].mean()
            shares.append(share)
            if share:
                means.append(logs[phase::step][there[phase::step]].mean())
        if min(shares) < 0.01 and max(shares) > 0.5:
            return False
        # The lower halves of numbers that were rounded before have but a few values.
        if max(different) > 16 and max(different) > 2.5 * min(different):
            return False
        if max(means) - min(means) > _PHASE:
            return False
    return True


def _most(rows: Sequence[bytes], kind: str, fits: Callable[[np.ndarray], bool]) -> bool:
    return sum(fits(np.frombuffer(row, kind)) for row in rows) >= _AGREE * len(rows)


def _can_be_boxes(values: np.ndarray, size: int) -> bool:
    magnitude = np.abs(values)
    return bool(
        np.isfinite(values).all()
        and magnitude.max() <= 4 * size
        and magnitude.max() >= 1e-3
        and not ((magnitude > 0) & (magnitude < _TINY)).any()
    )


def _can_be_labels(values: np.ndarray, size: int) -> bool:
    whole = np.isfinite(values).all() and (values == np.trunc(values)).all()
    return bool(whole and np.abs(values).max() <= _LARGEST_LABEL)


def _can_be_scores(values: np.ndarray, size: int) -> bool:
    return bool(
        ((values >= 0) & (values <= 1)).all() and not ((values > 0) & (values < _TINY)).any()
    )


_SMALL: dict[str, tuple[Sequence[str], Callable[[np.ndarray, int], bool]]] = {
    "boxes": (_BOX_TYPES, _can_be_boxes),
    "objects_id": (_LABEL_TYPES, _can_be_labels),
    "objects_conf": (_SCORE_TYPES, _can_be_scores),
}
