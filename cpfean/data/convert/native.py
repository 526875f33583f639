"""Writes a folder in the native format, image by image, in any order.

Axes:  region   of an image, padded to the number that is stored     feature   of a region vector

Features go to their place in the file at once, so that memory does not grow with the data; all
else is small and kept until the end. The folder appears under its name when all of it has been
written and checked, or not at all.
"""

from __future__ import annotations

import contextlib
import logging
import math
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

import numpy as np
from jaxtyping import Float, Int

from cpfean.data.caption_groups import IMAGE_OF_CAPTION, CaptionGroups
from cpfean.data.convert.captions import Captioned
from cpfean.data.provenance import write_provenance
from cpfean.data.split import GALLERY, SPLITS, VOCABULARY, check_folder
from cpfean.errors import DataError
from cpfean.files import is_there

logger = logging.getLogger(__name__)

LARGEST_HALF = float(np.finfo(np.float16).max)


@dataclass(frozen=True, kw_only=True)
class Regions:
    """What is known about one image; all but the features may be unknown, for all images alike.

    Attributes:
        boxes: x1, y1, x2, y2 in pixels.
        size: width and height in the same pixels.
        labels: lines of the vocabulary.
        scores: confidence in the labels.
        ordered: whether the order of the regions is meant, and not to be changed.
    """

    features: Float[np.ndarray, "region feature"]
    boxes: np.ndarray | None = None
    size: tuple[int, int] | None = None
    labels: Int[np.ndarray, " region"] | None = None
    scores: Float[np.ndarray, " region"] | None = None
    ordered: bool = False

    def best(self, count: int) -> Regions:
        """The first `count` regions, by confidence where there is one and nothing is against it."""
        total = len(self.features)
        by_confidence = self.scores is not None and not self.ordered
        if not by_confidence and total <= count:
            return self
        order = np.arange(total)
        if self.scores is not None and by_confidence:
            order = np.argsort(-self.scores.astype(np.float64), kind="stable")
        order = order[:count]

        def taken(array: np.ndarray | None) -> np.ndarray | None:
            return None if array is None else array[order]

        return Regions(
            features=self.features[order],
            boxes=taken(self.boxes),
            size=self.size,
            labels=taken(self.labels),
            scores=taken(self.scores),
            ordered=self.ordered,
        )


class NativeWriter:
    """A context: leaves the finished folder behind, or nothing."""

    def __init__(
        self,
        folder: Path,
        images: Mapping[str, Captioned],
        *,
        num_regions: int,
        feature_dim: int,
        half: bool,
        boxes: bool,
        vocabulary: list[str] | None,
        scores: bool | None = None,
        provenance: Mapping[str, Any] | None = None,
    ) -> None:
        """Makes the unfinished folder, with all texts.

        Args:
            folder: must not exist.
            images: by split; those of a gallery have no captions.
            num_regions: stored for an image; where there are more, the first are taken.
            half: store features as float16.
            boxes: whether boxes and sizes will come.
            vocabulary: names of the labels, if labels will come.
            scores: whether scores will come; None if they do with labels.
            provenance: what made the features, for `provenance.json`, without its "format".

        Raises:
            DataError: the folder exists, or its disk is too small or not to be written to.
        """
        self.folder = folder
        self._unfinished = folder.with_name(f"{folder.name}.unfinished")
        self._images = images
        self._regions = num_regions
        self._dtype = np.dtype("<f2" if half else "<f4")
        self._dim = feature_dim
        self._vocabulary = vocabulary
        self._files: dict[str, tuple[BinaryIO, int]] = {}
        self._small: dict[str, dict[str, np.ndarray]] = {}
        self._boxes = boxes
        self._provenance = provenance
        self._scores = vocabulary is not None if scores is None else scores
        check_target(folder)

    def __enter__(self) -> Self:
        total = sum(len(split.names) for split in self._images.values())
        small = 4 + 24 * self._boxes + 8 * (self._vocabulary is not None)
        needed = total * self._regions * (self._dim * self._dtype.itemsize + small)
        try:
            self.folder.parent.mkdir(parents=True, exist_ok=True)
            free = shutil.disk_usage(self.folder.parent).free
            if free < needed:
                raise DataError(
                    f"{self.folder}: needs {needed / 1e9:,.1f} GB, and its disk has "
                    f"{free / 1e9:,.1f} GB left; make room, choose another disk, or halve it with "
                    "--half."
                )
            self._unfinished.mkdir()
        except OSError as error:
            raise self._unwritable(error) from None
        try:
            self._start()
        except BaseException as error:
            self._remove()
            if isinstance(error, OSError):
                raise self._unwritable(error) from None
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._remove()

    def write(self, split: str, row: int, regions: Regions) -> None:
        """Stores an image, whose regions are `Regions.best` already or are cut to the first.

        Raises:
            DataError: the disk is full.
        """
        regions = regions.best(self._regions)
        count = len(regions.features)
        file, offset = self._files[split]
        try:
            file.seek(offset + row * self._regions * self._dim * self._dtype.itemsize)
            file.write(np.ascontiguousarray(regions.features, dtype=self._dtype).data)
        except OSError as error:
            raise self._unwritable(error) from None
        small = self._small[split]
        small["counts"][row] = count
        for name, values in (
            ("boxes", regions.boxes),
            ("labels", regions.labels),
            ("scores", regions.scores),
        ):
            if values is not None:
                small[name][row, :count] = values
        if regions.size is not None:
            small["sizes"][row] = regions.size

    def finish(self) -> None:
        """Writes what is small, checks everything and gives the folder its name.

        Raises:
            DataError: what the checks found, or the disk is full.
        """
        padded = any((s["counts"] < self._regions).any() for s in self._small.values())
        try:
            for split, arrays in self._small.items():
                self._files[split][0].close()
                for name, array in arrays.items():
                    if name != "counts" or padded:
                        path = self._unfinished / f"{split}_{name}.npy"
                        np.save(path, array, allow_pickle=False)
            logger.info("checking all of it")
            check_folder(self._unfinished, splits=tuple(self._images))
            self._unfinished.rename(self.folder)
        except OSError as error:
            raise self._unwritable(error) from None
        lacking = [split for split in SPLITS if split not in self._images]
        if lacking and GALLERY not in self._images:
            logger.warning("no images of %s: training needs all splits", " and ".join(lacking))

    def _start(self) -> None:
        """Texts, and features as large as they will be; what is not written is zero."""
        if self._provenance is not None:
            write_provenance(self._unfinished, self._provenance)
        if self._vocabulary is not None:
            _write_lines(self._unfinished / VOCABULARY, self._vocabulary)
        for split, images in self._images.items():
            if split != GALLERY:
                self._write_captions(split, images)
            _write_lines(self._unfinished / f"{split}_ids.txt", images.names)
            shape = (len(images.names), self._regions, self._dim)
            # Written and not mapped: on a full disk a mapped file ends the process by a signal.
            file = (self._unfinished / f"{split}_ims.npy").open("wb")
            np.lib.format.write_array_header_1_0(
                file, {"descr": self._dtype.str, "fortran_order": False, "shape": shape}
            )
            offset = file.tell()
            file.truncate(offset + math.prod(shape) * self._dtype.itemsize)
            self._files[split] = (file, offset)
            total, regions = shape[:2]
            small = {"counts": np.zeros(total, dtype=np.int32)}
            if self._boxes:
                small["boxes"] = np.zeros((total, regions, 4), dtype=np.float32)
                small["sizes"] = np.zeros((total, 2), dtype=np.int32)
            if self._vocabulary is not None:
                small["labels"] = np.zeros((total, regions), dtype=np.int32)
            if self._scores:
                small["scores"] = np.zeros((total, regions), dtype=np.float32)
            self._small[split] = small

    def _write_captions(self, split: str, images: Captioned) -> None:
        captions = [caption for own in images.captions for caption in own]
        _write_lines(self._unfinished / f"{split}_caps.txt", captions)
        groups = CaptionGroups.of_sizes([len(own) for own in images.captions])
        if not groups.is_default:
            path = self._unfinished / f"{split}_{IMAGE_OF_CAPTION}"
            np.save(path, groups.image_of_caption.astype(np.int32), allow_pickle=False)

    def _remove(self) -> None:
        for file, _ in self._files.values():
            with contextlib.suppress(OSError):  # what it still held has no room on the disk
                file.close()
        shutil.rmtree(self._unfinished, ignore_errors=True)

    def _unwritable(self, error: OSError) -> DataError:
        return DataError(
            f"{self.folder}: cannot be written: {error.strerror}; check the disk and the rights."
        )


def check_target(folder: Path) -> None:
    """Refuses a folder that is there, or that another conversion is making.

    Raises:
        DataError: says which.
    """
    if is_there(folder):
        raise DataError(f"{folder}: exists already; remove it, or name another folder.")
    unfinished = folder.with_name(f"{folder.name}.unfinished")
    if is_there(unfinished):
        raise DataError(
            f"{unfinished}: is there from a conversion that still runs or was killed; if it was, "
            "remove it."
        )


def _write_lines(path: Path, lines: list[str]) -> None:
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8", newline="")
