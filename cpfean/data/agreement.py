"""How the captions of a split, the names of its images and the rows of its features fit together.

Axes:  row   of an array: one an image, or five equal ones where nothing tells of other groups
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Int64

from cpfean import commands
from cpfean.data.caption_groups import (
    IMAGE_OF_CAPTION,
    PER_IMAGE,
    CaptionGroups,
    check_groups,
    read_image_of_caption,
)
from cpfean.data.findings import Findings
from cpfean.data.texts import blank_end, read_lines, says_something
from cpfean.files import is_there

GALLERY = "gallery"  # the split of images that are only searched: it has no captions


class Texts(NamedTuple):
    """What the small files say of a split's captions and images.

    Attributes:
        captions: as they are; None for a text that is none.
        ids: the images' names, one each or one for every row of five; None as well.
        is_grouped: whether there is a file of the captions' images.
        is_gallery: whether the split has no captions, and is not meant to.
        image_of_caption: what it says; None without it, or with a fault of its own.
    """

    captions: list[str] | None
    ids: list[str] | None
    is_grouped: bool
    image_of_caption: Int64[np.ndarray, " caption"] | None
    is_gallery: bool = False

    @property
    def rows_each(self) -> int:
        """How many equal rows an image may have in an array, if not one."""
        return 1 if self.is_grouped or self.is_gallery else PER_IMAGE


def read_texts(folder: Path, stem: str, findings: Findings) -> Texts:
    """Reads the captions of a split, the names of its images, and which belongs to which."""
    if stem == GALLERY:
        ids = _read_ids(folder / f"{stem}_ids.txt", findings, lambda count: False)
        return Texts([], ids, False, None, is_gallery=True)
    path = folder / f"{stem}_{IMAGE_OF_CAPTION}"
    is_grouped = is_there(path)
    numbers = read_image_of_caption(path, findings) if is_grouped else None

    def captions_fit(count: int) -> bool:
        if is_grouped:
            return numbers is None or count == len(numbers)
        return count % PER_IMAGE == 0

    captions = _read_captions(folder / f"{stem}_caps.txt", findings, captions_fit)
    num_captions = len(captions or [])

    def ids_fit(count: int) -> bool:
        if is_grouped:
            return numbers is None or count == int(numbers.max()) + 1
        return count in (num_captions // PER_IMAGE, num_captions)

    ids = _read_ids(folder / f"{stem}_ids.txt", findings, ids_fit)
    return Texts(captions, ids, is_grouped, numbers)


class Agreed(NamedTuple):
    """How the files of a split belong together.

    Attributes:
        stride: rows of the features that an image takes, 1 or 5.
        ids: the images' names, one each; empty without a sound text of them.
        groups: which captions describe which image; None after a fault.
    """

    stride: int
    ids: list[str]
    groups: CaptionGroups | None


def agree(folder: Path, stem: str, texts: Texts, findings: Findings, *, rows: int) -> Agreed | None:
    """Finds how the features are stored, and which captions describe which image.

    None if the numbers of rows, captions and names are such that nothing can fit.

    Args:
        folder: of the files.
        stem: what the names of the split's files begin with.
        texts: of the split.
        rows: of its features.
    """
    if texts.is_gallery:
        if texts.ids is not None:
            _check_names(stem, texts.ids, findings, num_images=rows)
            _repeated(f"{stem}_ids.txt", texts.ids, findings)
        return Agreed(1, texts.ids or [], CaptionGroups.none(rows) if rows else None)
    if texts.is_grouped:
        return _agree_as_told(stem, texts, findings, rows=rows)
    ims, caps, names = f"{stem}_ims.npy", f"{stem}_caps.txt", f"{stem}_ids.txt"
    ids, count = texts.ids, None if texts.captions is None else len(texts.captions)
    num_ids = None if ids is None else len(ids)
    stride = PER_IMAGE if count == rows and rows % PER_IMAGE == 0 else 1
    other = _other_number(folder, stem, rows=rows, captions=count, ids=ids)
    if other is not None:
        findings.add("caption-count", caps, other)
        return None
    num_images = rows // stride
    if count is not None and count != num_images * PER_IMAGE:
        # The ids tell which of the two is short.
        if num_ids and num_ids != num_images and count == num_ids * PER_IMAGE:
            findings.add(
                "image-count",
                ims,
                f"expected {num_ids:,} images by {names} and {caps}, found {rows:,} rows; are all "
                "of one release?",
            )
            return Agreed(stride, ids or [], None)
        first = f"; the first without all is {_called(ids, count // PER_IMAGE)}"
        findings.add(
            "caption-count",
            caps,
            f"expected {PER_IMAGE} captions for each of {num_images:,} images, "
            f"{num_images * PER_IMAGE:,} in all, found {count:,}"
            f"{first if count < num_images * PER_IMAGE else ''}; are both of one release? If "
            f"images have other numbers of captions, write {stem}_{IMAGE_OF_CAPTION}",
        )
    groups = CaptionGroups.even(num_images)
    if ids is None:
        return Agreed(stride, [], groups)
    if num_ids == num_images * PER_IMAGE and num_images:
        fives = [ids[i : i + PER_IMAGE] for i in range(0, len(ids), PER_IMAGE)]
        findings.add_rows(
            "image-count",
            names,
            [i for i, five in enumerate(fives) if len(set(five)) > 1],
            lambda i: (
                f"lines {i * PER_IMAGE + 1} to {(i + 1) * PER_IMAGE}",
                f"expected one name {PER_IMAGE} times, found {fives[i]}; write one line an image",
            ),
        )
        ids = [five[0] for five in fives]
    else:
        _check_names(stem, ids, findings, num_images=num_images)
    _repeated(names, ids, findings)
    return Agreed(stride, ids, groups)


def _agree_as_told(stem: str, texts: Texts, findings: Findings, *, rows: int) -> Agreed | None:
    """As `agree`, for a split with a file of the captions' images: then a row is an image."""
    ids, captions = texts.ids, texts.captions
    if ids is not None and captions is not None and len(ids) < rows == len(captions):
        findings.add(
            "image-count",
            f"{stem}_ims.npy",
            f"expected one row an image, {len(ids):,} by {stem}_ids.txt, because "
            f"{stem}_{IMAGE_OF_CAPTION} is there, found {rows:,}, one a caption; store every image "
            "once",
        )
        return None
    if ids is not None:
        _check_names(stem, ids, findings, num_images=rows)
        _repeated(f"{stem}_ids.txt", ids, findings)
    groups = None
    if texts.image_of_caption is not None and captions is not None:
        groups = check_groups(
            texts.image_of_caption,
            findings,
            stem=stem,
            num_images=rows,
            num_captions=len(captions),
            place=lambda image: _called(ids, image),
        )
    return Agreed(1, ids or [], groups)


def _check_names(stem: str, ids: Sequence[str], findings: Findings, *, num_images: int) -> None:
    if len(ids) != num_images:
        findings.add(
            "image-count",
            f"{stem}_ids.txt",
            f"expected {num_images:,} names, one for each image of {stem}_ims.npy, found "
            f"{len(ids):,}; are both of one release?",
        )


def _other_number(
    folder: Path, stem: str, *, rows: int, captions: int | None, ids: Sequence[str] | None
) -> str | None:
    """What to say of data with another number of captions an image; None if that is not it.

    Args:
        folder, stem, rows: as in `agree`.
        captions: how many there are.
        ids: the images' names.
    """
    if not captions or captions == PER_IMAGE * len(ids or []):
        return None
    different = len(set(ids)) if ids else 0
    # An image may have a row, and a name, for each of its captions.
    images = different if rows == captions and different == len(ids or []) else rows
    if rows == captions and different and different != rows:
        images = different
    each, rest = divmod(captions, images)
    if rest or each in (0, PER_IMAGE):
        return None
    if rows == captions and not different:
        return None  # a row for each caption, of who knows how many images
    file = f"{stem}_{IMAGE_OF_CAPTION}"
    once = "" if rows == images else f"store every image once, {images:,} rows, and "
    return (
        f"expected {PER_IMAGE} captions an image, {PER_IMAGE * images:,} in all, because there is "
        f"no {file} that says otherwise, found {captions:,} captions for {images:,} images, "
        f"{each:,} an image; {once}write that file: "
        f"{commands.captions_of_images(folder / file, captions=captions, each=each)}"
    )


def _called(ids: list[str] | None, image: int) -> str:
    return f"image {image} ({ids[image]})" if ids and image < len(ids) else f"image {image}"


def _repeated(name: str, ids: list[str], findings: Findings) -> None:
    first: dict[str, int] = {}
    again = [i for i, image in enumerate(ids) if first.setdefault(image, i) != i and image]
    findings.add_rows(
        "duplicate-id",
        name,
        again,
        lambda i: (
            f"image {i}",
            f"expected every image once, found {ids[i]!r} as image {first[ids[i]]} already; "
            "drop one",
        ),
    )


def _read_captions(path: Path, findings: Findings, fits: Callable[[int], bool]) -> list[str] | None:
    """The captions of a split as they are; None, and findings, for a text that is none.

    Args:
        fits: whether there may be so many; another number may come of blank lines at the end.
    """
    captions = read_split_text(path, findings)
    if captions is None:
        return None
    # A last caption that is empty and one line too many are both blank; the number tells.
    if not fits(len(captions)) and blank_end(path, captions, findings):
        return None
    findings.add_rows(
        "empty-caption",
        path.name,
        [i for i, caption in enumerate(captions) if not says_something(caption)],
        lambda i: (
            f"line {i + 1}",
            f"expected a caption, found {captions[i]!r}; write one, or drop the image",
        ),
    )
    return captions


def _read_ids(path: Path, findings: Findings, fits: Callable[[int], bool]) -> list[str] | None:
    """The names of a split's images, as `_read_captions`."""
    ids = read_split_text(path, findings)
    if ids is None or (not fits(len(ids)) and blank_end(path, ids, findings)):
        return None
    ids = [line.strip() for line in ids]
    findings.add_rows(
        "empty-id",
        path.name,
        [i for i, name in enumerate(ids) if not name],
        lambda i: (f"line {i + 1}", "expected an image's name, found an empty line; write it"),
    )
    return ids


def read_split_text(path: Path, findings: Findings) -> list[str] | None:
    """As `read_lines`; a link that leads nowhere is a finding too."""
    if is_there(path) and not os.path.exists(path):
        findings.add("missing", path.name, f"a link that leads nowhere, to {os.readlink(path)}")
        return None
    return read_lines(path, findings)
