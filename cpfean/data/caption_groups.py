"""Which captions describe which image: the one place that knows how many an image has.

The captions of an image lie next to each other, in the order of the images. How many there are is
what `S_image_of_caption.npy` says, one number a caption: the row of its image, from 0. Where there
is no such file an image has five, as in the field's releases.

A gallery, which is there to be searched, has no captions at all.

Axes:  image, caption   of a split
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Self, TypeVar

import numpy as np
from jaxtyping import Int, Int64

from cpfean.data.arrays import map_array
from cpfean.data.findings import Findings

PER_IMAGE = 5  # where nothing is said
IMAGE_OF_CAPTION = "image_of_caption.npy"

Caption = TypeVar("Caption", int, np.ndarray)  # one position in a split, or many


@dataclass(frozen=True, eq=False)
class CaptionGroups:
    """The captions of a split, image by image; every image has at least one, or none has any.

    Attributes:
        image_of_caption: position of the image that each caption describes; it never falls.
        num_without: images of a gallery, none of which has a caption.

    Raises:
        ValueError: captions that are not in the order of the images, or an image without any.
    """

    image_of_caption: Int64[np.ndarray, " caption"]
    num_without: int = 0

    def __post_init__(self) -> None:
        images = self.image_of_caption
        if self.num_without:
            if len(images) or self.num_without < 0:
                raise ValueError("either all images have captions, or none has")
        elif not len(images) or images[0] != 0 or not np.isin(np.diff(images), (0, 1)).all():
            raise ValueError("captions have to come in the order of the images, from 0, one each")

    @classmethod
    def of_sizes(cls, sizes: Sequence[int] | Int[np.ndarray, " image"]) -> Self:
        """From the number of captions of each image."""
        return cls(np.repeat(np.arange(len(sizes), dtype=np.int64), sizes))

    @classmethod
    def none(cls, num_images: int) -> Self:
        """No captions, of a gallery of so many images."""
        return cls(np.zeros(0, dtype=np.int64), num_images)

    @classmethod
    def even(cls, num_images: int, each: int = PER_IMAGE) -> Self:
        """The same number of captions for every image."""
        return cls.of_sizes(np.full(num_images, each))

    @property
    def num_captions(self) -> int:
        return len(self.image_of_caption)

    @property
    def num_images(self) -> int:
        return self.num_without or int(self.image_of_caption[-1]) + 1

    @cached_property
    def edges(self) -> Int64[np.ndarray, " image+1"]:
        """Where each image's captions begin, and behind the last image where they end."""
        return np.searchsorted(self.image_of_caption, np.arange(self.num_images + 1))

    @property
    def sizes(self) -> Int64[np.ndarray, " image"]:
        """The number of captions of each image."""
        return np.diff(self.edges)

    @property
    def described(self) -> str:
        """How many captions an image has, for people: "5" or "4 to 7"."""
        least, most = self.sizes.min(), self.sizes.max()
        return f"{least}" if least == most else f"{least} to {most}"

    @property
    def is_default(self) -> bool:
        """Whether every image has as many captions as where nothing is said."""
        return bool((self.sizes == PER_IMAGE).all())

    def image_of(self, caption: Caption) -> Caption:
        """The image that a caption describes; for one position or an array of them."""
        found = self.image_of_caption[caption]
        return int(found) if isinstance(caption, int) else found

    def of_image(self, image: int) -> range:
        """The captions of an image."""
        return self.of_images(range(image, image + 1))

    def of_images(self, images: range) -> range:
        """The captions of images next to each other."""
        return range(int(self.edges[images.start]), int(self.edges[images.stop]))

    def first(self, num_images: int) -> CaptionGroups:
        """Those of the first so many images."""
        if self.num_without:
            return CaptionGroups.none(num_images)
        return CaptionGroups(self.image_of_caption[: self.edges[num_images]])


def read_image_of_caption(path: Path, findings: Findings) -> Int64[np.ndarray, " caption"] | None:
    """What the file holds, as whole numbers; None, and findings, for anything else."""
    stored = map_array(path, findings)
    if stored is None:
        return None
    if stored.ndim != 1:
        findings.add(
            "shape",
            path.name,
            f"expected one number a caption, of shape (captions,), found {stored.shape}; save the "
            "row of each caption's image",
        )
        return None
    if stored.dtype.kind == "u":  # beyond what int64 holds is beyond every image
        most = np.uint64(np.iinfo(np.int64).max)
        return np.minimum(stored.astype(np.uint64), most).astype(np.int64)
    if stored.dtype.kind == "f":
        values = stored.astype(np.float64)
        finite = np.isfinite(values) & (np.abs(values) < 2**53)
        broken = np.flatnonzero(~finite | (np.where(finite, values, 0) % 1 != 0))
        findings.add_rows(
            "dtype",
            path.name,
            broken,
            lambda i: (
                f"row {i}",
                f"expected a whole number, the row of the caption's image, found {stored[i]}; "
                "save integers",
            ),
        )
        if len(broken):
            return None
    return stored.astype(np.int64)


def check_groups(
    numbers: Int64[np.ndarray, " caption"],
    findings: Findings,
    *,
    stem: str,
    num_images: int,
    num_captions: int,
    place: Callable[[int], str],
) -> CaptionGroups | None:
    """The groups that a split's file tells; None, and findings, if it does not fit the split.

    Args:
        numbers: as `read_image_of_caption` gave them.
        stem: what the names of the split's files begin with.
        num_images: rows of the features.
        num_captions: lines of the captions.
        place: an image as messages name it.
    """
    file, lines, rows = f"{stem}_{IMAGE_OF_CAPTION}", f"{stem}_caps.txt", f"{stem}_ims.npy"
    before = len(findings)

    def caption(i: int) -> str:
        return f"row {i} (line {i + 1} of {lines})"

    if len(numbers) != num_captions:
        first = min(len(numbers), num_captions)
        what = "a caption" if len(numbers) < num_captions else "a row"
        findings.add(
            "caption-count",
            file,
            f"expected a number for each of the {num_captions:,} captions of {lines}, found "
            f"{len(numbers):,}; are both of one release?",
            place=f"{caption(first)} is the first of which there is only {what}",
        )
    outside = np.flatnonzero((numbers < 0) | (numbers >= num_images))
    shifted = numbers.min() == 1 and numbers.max() == num_images
    hint = (
        f"all are from 1 to {num_images:,}: subtract 1" if shifted else "are both of one release?"
    )
    findings.add_rows(
        "image-range",
        file,
        outside,
        lambda i: (
            caption(i),
            f"expected a row of {rows}, from 0 to {num_images - 1:,}, found {numbers[i]}; {hint}",
        ),
    )
    # What lacks a caption where numbers are missing or wrong is not known.
    if len(findings) == before:
        has = np.bincount(numbers, minlength=num_images)
        findings.add_rows(
            "no-caption",
            file,
            np.flatnonzero(has == 0),
            lambda i: (
                place(i),
                "expected at least one caption, found none; write one, or drop the image",
            ),
        )
    findings.add_rows(
        "caption-order",
        file,
        1 + np.flatnonzero(np.diff(numbers) < 0),
        lambda i: (
            caption(i),
            f"expected the captions of an image next to each other, in the order of {rows}, found "
            f"row {numbers[i]} behind row {numbers[i - 1]}; sort {lines} and this file alike",
        ),
    )
    return CaptionGroups(numbers) if len(findings) == before else None
