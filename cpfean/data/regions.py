"""The regions of a split's images: features, boxes and object labels, as they lie on disk.

Axes:  image    of the split                    region   stored for an image, the first k of them
       row      of a file: one an image, or     feature  width of a stored region vector
                some equal ones

Features stay on disk, memory-mapped; everything else is small, checked whole and kept in memory.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float, Float16, Int, Int32
from pycocotools import mask as coco_mask

from cpfean import commands
from cpfean.data.arrays import map_array
from cpfean.data.boxes import (
    NATIVE,
    PIXEL,
    Layout,
    corners,
    guessed_layout,
    misfits,
    numbers,
    wrong_layout,
)
from cpfean.data.caption_groups import PER_IMAGE
from cpfean.data.findings import Findings
from cpfean.files import is_there
from cpfean.progress import Progress

logger = logging.getLogger(__name__)

_CHUNK_BYTES = 64 * 2**20  # of features, looked at together
_ZERO_SHARE = 0.001  # all-zero vectors beyond this share mean a broken extraction


@dataclass(frozen=True, kw_only=True)
class RegionStore:
    """The regions of the images of one split.

    Attributes:
        features: a view of the mapped file; index it with images once per batch.
        geometry: (x1/W, y1/H, x2/W, y2/H, area/(W H)), in [0, 1]; None without boxes.
        iou: overlap of every two regions of an image, by pycocotools; None without boxes.
        labels: position in the label vocabulary; None without labels.
        confidences: of the labels, in [0, 1]; None without scores.
        counts: real regions of each image, the first ones; at least 1.
        num_clipped: boxes that reached out of their image by a pixel at most, and were cut.
        sizes: width and height of each image; None without boxes.
        cut: what is to be said of the regions that were left out; "" if there is nothing.
    """

    features: Float[np.ndarray, "image region feature"]
    geometry: Float[np.ndarray, "image region 5"] | None
    iou: Float16[np.ndarray, "image region region"] | None
    labels: Int32[np.ndarray, "image region"] | None
    confidences: Float[np.ndarray, "image region"] | None
    counts: Int[np.ndarray, "image"]
    num_clipped: int = 0
    sizes: Float[np.ndarray, "image 2"] | None = None
    cut: str = ""

    @property
    def num_images(self) -> int:
        return self.features.shape[0]

    @property
    def num_regions(self) -> int:
        return self.features.shape[1]

    @property
    def feature_dim(self) -> int:
        return self.features.shape[2]


@dataclass(frozen=True, kw_only=True)
class Annotations:
    """What the small files say of a split's regions; None for what there is no file of.

    Attributes:
        counts: real regions of each image, the first ones; at least 1.
        boxes: x1, y1, x2, y2 in pixels, clipped to the image, and zero for padding.
        sizes: width and height of each image.
        num_clipped: boxes that reached out of their image by a pixel at most, and were cut.
        labels: positions in the label vocabulary.
        confidences: of the labels, in [0, 1].
    """

    counts: Int[np.ndarray, "image"]
    boxes: Float[np.ndarray, "image region 4"] | None
    sizes: Float[np.ndarray, "image 2"] | None
    num_clipped: int
    labels: Int32[np.ndarray, "image region"] | None
    confidences: Float[np.ndarray, "image region"] | None


class RegionFiles:
    """Reads and checks one split's region files; faults go to `findings`.

    Args:
        stem: what the files' names begin with.
        names: the images' ids, for messages; may be shorter than there are images.
        layout: how the boxes are written.
        labels_from: the number of the vocabulary's first label.
        converting: whether the command that runs has flags to declare these two; else messages
            show the whole command that makes a folder of them.
        boxes_file: where the boxes are, if not under their own name.
        rows_each: equal rows that an image may have in a file, besides a single one.
    """

    def __init__(
        self,
        folder: Path,
        stem: str,
        names: list[str],
        findings: Findings,
        *,
        layout: Layout = NATIVE,
        labels_from: int = 0,
        converting: bool = False,
        boxes_file: str | None = None,
        rows_each: int = PER_IMAGE,
    ) -> None:
        self._folder = folder
        self._stem = stem
        self._names = names
        self._findings = findings
        self._layout = layout
        self._labels_from = labels_from
        self._converting = converting
        self._boxes_file = boxes_file
        self._rows_each = rows_each

    def file(self, kind: str) -> str:
        """The name of a file of this split: `train_boxes.npy`."""
        if kind == "boxes" and self._boxes_file is not None:
            return self._boxes_file
        return f"{self._stem}_{kind}.npy"

    def place(self, image: int) -> str:
        """An image as messages name it: its position, from 0, and its id."""
        return (
            f"image {image} ({self._names[image]})"
            if image < len(self._names)
            else f"image {image}"
        )

    def map_features(self) -> np.ndarray | None:
        """The features file as it is, "row region feature", or None."""
        name = self.file("ims")
        features = map_array(self._folder / name, self._findings)
        if features is None:
            return None
        if (
            features.dtype not in (np.dtype("<f2"), np.dtype("<f4"))
            or not features.flags.c_contiguous
        ):
            order = "" if features.flags.c_contiguous else " in Fortran order"
            self._findings.add(
                "dtype",
                name,
                "expected float16 or float32, little-endian, in C order, found "
                f"{features.dtype.str!r}{order}; {self._anew()}",
            )
            return None
        if features.ndim != 3:
            self._findings.add(
                "shape",
                name,
                f"expected (images, regions, feature width), found {features.shape}; save it so",
            )
            return None
        return features

    def open(
        self,
        features: np.ndarray,
        *,
        stride: int,
        num_regions: int,
        num_labels: int | None,
        scan: bool,
        overlaps: bool,
    ) -> RegionStore | None:
        """Reads everything beside the features.

        Args:
            features: what `map_features` gave.
            stride: rows that one image takes in it.
            num_regions: keep the first so many regions.
            num_labels: size of the label vocabulary, None without one.
            scan: also read every feature: for numbers that are not finite, vectors that are all
                zero, and whether rows stored several times are equal.
            overlaps: compute the IoU; who only checks or looks has no use for it.

        Returns:
            None if a fault makes the store unusable.
        """
        before = len(self._findings)
        stored = features.shape[1]
        num_images = features.shape[0] // stride
        if num_regions > stored:
            self._findings.add(
                "too-few-regions",
                self.file("ims"),
                f"expected at least {num_regions} regions an image, found {stored}; set "
                f"data.num_regions to {stored} or less",
            )
            num_regions = stored

        told = self.annotations(num_images, stored, num_labels=num_labels)
        if scan:
            real = np.arange(stored) < told.counts[:, None]
            self._scan(features, stride=stride, real=real)
        if len(self._findings) > before:
            return None

        geometry = iou = None
        if told.boxes is not None and told.sizes is not None:
            geometry = region_geometry(told.boxes[:, :num_regions], told.sizes)
            iou = region_overlaps(told.boxes[:, :num_regions]) if overlaps else None
        labels, confidences = told.labels, told.confidences
        return RegionStore(
            features=features[::stride, :num_regions],
            geometry=geometry,
            iou=iou,
            labels=None if labels is None else labels[:, :num_regions],
            confidences=None if confidences is None else confidences[:, :num_regions],
            counts=np.minimum(told.counts, num_regions),
            num_clipped=told.num_clipped,
            sizes=told.sizes,
            cut=_cut(num_regions, told.counts, confidences),
        )

    def annotations(
        self,
        num_images: int,
        stored: int,
        *,
        num_labels: int | None,
        boxes: np.ndarray | None = None,
        sizes: np.ndarray | None = None,
    ) -> Annotations:
        """Reads and checks all files but that of the features.

        Args:
            num_images: in the split.
            stored: regions of an image.
            num_labels: size of the label vocabulary, None without one.
            boxes, sizes: in place of those files, if they are elsewhere.
        """
        with np.errstate(all="ignore"):  # files may hold any bits; what comes of them is looked at
            counts = self._counts(num_images, stored)
            real = np.arange(stored) < counts[:, None]
            if boxes is None:
                boxes = self._rows("boxes", num_images, (stored, 4))
                sizes = self._rows("sizes", num_images, (2,))
            found = None if boxes is None else self._boxes(boxes, sizes, real)
            return Annotations(
                counts=counts,
                boxes=None if found is None else found[0],
                sizes=None if found is None else found[1],
                num_clipped=0 if found is None else found[2],
                labels=self._labels(num_images, real, num_labels),
                confidences=self._confidences(num_images, real),
            )

    def _rows(self, kind: str, num_images: int, shape: tuple[int, ...]) -> np.ndarray | None:
        """A small file as "image ...", or None if it is absent or a fault was found."""
        name = self.file(kind)
        if not is_there(self._folder / name):
            return None
        array = map_array(self._folder / name, self._findings)
        if array is None:
            return None
        each = self._rows_each
        if array.shape[:1] != (each * num_images,):
            each = 1
        if array.shape != (each * num_images, *shape):
            found = array.shape[0]
            lacks = found < num_images and array.shape[1:] == shape
            self._findings.add(
                "shape",
                name,
                f"expected {(num_images, *shape)} to go with {self.file('ims')}, found "
                f"{array.shape}; both must come from one extraction",
                place=f"{self.place(found)} is the first without a row" if lacks else "",
            )
            return None
        if each == 1:
            return array
        groups = array.reshape(num_images, each, *shape)
        same = (groups == groups[:, :1]) | ((groups != groups) & (groups[:, :1] != groups[:, :1]))
        unequal = np.flatnonzero(~same.reshape(num_images, -1).all(axis=1))
        self._unequal(name, unequal)
        return groups[:, 0]

    def _unequal(self, name: str, images: np.ndarray) -> None:
        self._findings.add_rows(
            "unequal-rows",
            name,
            images,
            lambda i: (
                f"rows {self._rows_each * i} to {self._rows_each * (i + 1) - 1} of {self.place(i)}",
                f"expected {self._rows_each} equal rows for an image's {self._rows_each} captions, "
                "found unequal ones; store one row an image",
            ),
        )

    def _whole(self, kind: str, array: np.ndarray) -> bool:
        """Whether all numbers are whole; if not, a finding for each row that has others."""
        if array.dtype.kind in "iu":
            return True
        broken = ~np.isfinite(array) | (array != np.trunc(np.where(np.isfinite(array), array, 0)))
        rows = np.flatnonzero(broken.reshape(len(array), -1).any(axis=1))
        self._findings.add_rows(
            "dtype",
            self.file(kind),
            rows,
            lambda i: (
                self.place(i),
                f"expected whole numbers, found {array[i][broken[i]].flat[0]}; save integers",
            ),
        )
        return not len(rows)

    def _counts(self, num_images: int, stored: int) -> Int[np.ndarray, "image"]:
        every = np.full(num_images, stored, dtype=np.int64)
        counts = self._rows("counts", num_images, ())
        if counts is None or not self._whole("counts", counts):
            return every
        name = self.file("counts")
        self._findings.add_rows(
            "no-regions",
            name,
            np.flatnonzero(counts <= 0),
            lambda i: (
                self.place(i),
                f"expected at least 1 region, found {counts[i]}; drop the image and its captions",
            ),
        )
        self._findings.add_rows(
            "region-count",
            name,
            np.flatnonzero(counts > stored),
            lambda i: (
                self.place(i),
                f"expected at most the {stored} regions stored in {self.file('ims')}, found "
                f"{counts[i]}; both must come from one extraction",
            ),
        )
        return np.clip(counts, 1, stored).astype(np.int64)

    def _boxes(
        self, boxes: np.ndarray, sizes: np.ndarray | None, real: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, int] | None:
        """Corners, clipped to the image and zero for padding; sizes; how many were clipped."""
        name = self.file("boxes")
        if sizes is None:
            if not is_there(self._folder / self.file("sizes")):
                self._findings.add(
                    "no-size",
                    self.file("sizes"),
                    f"expected the images' widths and heights in pixels to go with {name}, found "
                    "no such file; write it, or take the boxes away to train without",
                )
            return None
        sizes = sizes.astype(np.float64)
        unsized = np.flatnonzero(~(np.isfinite(sizes) & (sizes > 0)).all(axis=1))
        self._findings.add_rows(
            "no-size",
            self.file("sizes"),
            unsized,
            lambda i: (
                self.place(i),
                f"expected a width and a height above 0, found {numbers(sizes[i])}; write the "
                "size in pixels that the boxes belong to",
            ),
        )
        boxes = np.where(real[..., None], boxes, 0).astype(np.float64)
        not_finite = ~np.isfinite(boxes).all(axis=-1)
        self._box_findings(
            "box-not-finite", not_finite, boxes, "four finite numbers", "detect its regions again"
        )
        if len(unsized) or not_finite.any():
            return None

        of_each = np.broadcast_to(sizes[:, None], (*real.shape, 2))[real]
        guess = guessed_layout(boxes[real], of_each, self._layout)
        if guess is not None:
            self._other_layout(guess, boxes, sizes, real)
            return None
        boxes = np.where(real[..., None], corners(boxes, sizes[:, None], self._layout), 0)
        limits = np.concatenate([sizes, sizes], axis=1)[:, None]  # image 1 4
        clipped = np.clip(boxes, 0, limits)
        far = np.abs(boxes - clipped).max(axis=-1)
        outside = far > PIXEL
        self._box_findings(
            "box-outside",
            outside,
            boxes,
            "x1, y1, x2, y2 in pixels inside the image, or out of it by 1 at most",
            "check that sizes and boxes are of the same resolution",
            sizes,
        )
        flat = ~((clipped[..., 2] > clipped[..., 0]) & (clipped[..., 3] > clipped[..., 1]))
        self._box_findings(
            "box-inverted",
            flat & real & ~outside,
            boxes,
            "x1 < x2 and y1 < y2 inside the image",
            "correct or replace the box; it is never turned round silently",
            sizes,
        )
        return clipped, sizes, int((far > 0).sum())

    def _other_layout(
        self, guess: Layout, boxes: np.ndarray, sizes: np.ndarray, real: np.ndarray
    ) -> None:
        wrong = misfits(corners(boxes, sizes[:, None], self._layout), sizes[:, None]) & real
        image, region = np.argwhere(wrong if wrong.any() else real)[0]
        of_each = np.broadcast_to(sizes[:, None], (*real.shape, 2))[real]
        given = wrong_layout(guess, self._layout, boxes[real], of_each)
        self._findings.add(
            "box-format",
            self.file("boxes"),
            f"{given}; if they are that, "
            f"{self._declare(*(guess.flags or ('--box-order', 'xyxy')))}",
            place=f"{self.place(image)}, region {region}",
        )

    def _declare(self, *flags: str) -> str:
        """How to say what these files are, for the end of a message."""
        if self._converting:
            return f"say so: {commands.shell(*flags)}"
        return self._anew(*flags)

    def _anew(self, *flags: str) -> str:
        """How to write the folder in the native format, for the end of a message."""
        new = f"{self._folder}.new"
        line = commands.script("prepare.py", new, "--scan", self._folder, *flags)
        return f"write the folder anew: {line}"

    def _box_findings(
        self,
        kind: str,
        bad: np.ndarray,
        boxes: np.ndarray,
        expected: str,
        advice: str,
        sizes: np.ndarray | None = None,
    ) -> None:
        regions = bad.shape[1]

        def describe(position: int) -> tuple[str, str]:
            image, region = divmod(position, regions)
            of = "" if sizes is None else f" in an image of {numbers(sizes[image])}"
            found = numbers(boxes[image, region])
            place = f"{self.place(image)}, region {region}"
            return place, f"expected {expected}, found {found}{of}; {advice}"

        self._findings.add_rows(kind, self.file("boxes"), np.flatnonzero(bad), describe)

    def _labels(
        self, num_images: int, real: np.ndarray, num_labels: int | None
    ) -> Int32[np.ndarray, "image region"] | None:
        labels = self._rows("labels", num_images, real.shape[1:])
        if labels is None or not self._whole("labels", labels):
            return None
        if num_labels is None:
            return None  # `split` has said that the vocabulary is missing or unreadable
        first = self._labels_from
        last = first + num_labels - 1
        bad = ((labels < first) | (labels > last)) & real
        lowest, highest = labels[real].min(), labels[real].max()
        advice = "are labels and vocabulary of one detector?"
        if lowest > first and highest == last + 1:
            advice = (
                f"all are from {lowest} to {highest}: if they count from {first + 1}, "
                f"{self._declare('--labels-from', str(first + 1))}"
            )

        def describe(position: int) -> tuple[str, str]:
            image, region = divmod(position, real.shape[1])
            return (
                f"{self.place(image)}, region {region}",
                f"expected a line of objects_vocab.txt, from {first} to {last}, found "
                f"{labels[image, region]}; {advice}",
            )

        self._findings.add_rows("label-range", self.file("labels"), np.flatnonzero(bad), describe)
        return None if bad.any() else np.where(real, labels - first, 0).astype(np.int32)

    def _confidences(
        self, num_images: int, real: np.ndarray
    ) -> Float[np.ndarray, "image region"] | None:
        scores = self._rows("scores", num_images, real.shape[1:])
        if scores is None:
            return None
        bad = ~((scores >= 0) & (scores <= 1)) & real  # NaN is neither

        def describe(position: int) -> tuple[str, str]:
            image, region = divmod(position, real.shape[1])
            return (
                f"{self.place(image)}, region {region}",
                f"expected a confidence from 0 to 1, found {scores[image, region]}; "
                "write probabilities, not logits or percent",
            )

        self._findings.add_rows("score-range", self.file("scores"), np.flatnonzero(bad), describe)
        return None if bad.any() else np.where(real, scores, 0).astype(np.float32)

    def _scan(self, features: np.ndarray, *, stride: int, real: np.ndarray) -> None:
        """Reads all features once, in chunks, and says how far it is if that takes long."""
        name = self.file("ims")
        rows, regions, _ = features.shape
        chunk = max(1, _CHUNK_BYTES // features[0].nbytes) * stride
        # Sign off, a float's bits order like an integer's: one maximum finds NaN, Inf and zeros.
        integer = np.dtype(f"u{features.itemsize}")
        magnitude = integer.type(np.iinfo(integer).max >> 1)
        infinity = np.array(np.inf, dtype=features.dtype).view(integer)
        zeros: list[np.ndarray] = []
        progress = Progress(f"reading {name}", total=rows, unit="%")
        for start in range(0, rows, chunk):
            part = features[start : start + chunk]
            if stride > 1:
                groups = part.reshape(-1, stride, *part.shape[1:]).view(integer)
                unequal = (groups != groups[:, :1]).reshape(len(groups), -1).any(axis=1)
                self._unequal(name, start // stride + np.flatnonzero(unequal))
                part = part[::stride]
            first = start // stride
            largest = (part.view(integer) & magnitude).max(axis=-1)  # image region

            def describe(
                position: int, part: np.ndarray = part, first: int = first
            ) -> tuple[str, str]:
                image, region = divmod(position, regions)
                values = part[image, region]
                broken = values[~np.isfinite(values)]
                return (
                    f"{self.place(first + image)}, region {region}",
                    f"expected finite numbers, found {len(broken)} that are not (the first: "
                    f"{broken[0]}); extract the image again or drop it with its captions",
                )

            self._findings.add_rows(
                "not-finite", name, np.flatnonzero(largest >= infinity), describe
            )
            zero = (largest == 0) & real[first : first + len(part)]
            zeros.append(np.flatnonzero(zero) + first * regions)
            progress.step(start + len(part) * stride)

        places = np.concatenate(zeros)
        if len(places) > _ZERO_SHARE * real.sum():
            self._findings.add_rows(
                "zero-feature",
                name,
                places,
                lambda p: (
                    f"{self.place(p // regions)}, region {p % regions}",
                    f"expected a feature vector, found zeros only (more than {_ZERO_SHARE:.1%} of "
                    "all regions are so); extract again, or write a counts file if it is padding",
                ),
            )
        elif len(places):
            logger.warning("%s: %d feature vectors are all zero", name, len(places))


def _cut(num_regions: int, counts: np.ndarray, confidences: np.ndarray | None) -> str:
    """What the first regions of images with more are, if they need not be the best."""
    cut = counts > num_regions
    if not cut.any():
        return ""
    kept = f"the first {num_regions} of up to {counts.max()} regions an image are kept"
    if confidences is None:
        return f"{kept}; without scores nothing tells whether they are the best ones"
    others = np.where(np.arange(confidences.shape[1]) < counts[:, None], confidences, -1)
    better = others[:, num_regions:].max(axis=1) > others[:, :num_regions].min(axis=1)
    share = (better & cut).sum() / cut.sum()
    if share == 0:
        return ""
    return (
        f"{kept}; in {share:.0%} of the images one of the others has a higher score, the order is "
        "not that of confidence"
    )


def region_geometry(
    corners: Float[np.ndarray, "image region 4"], sizes: Float[np.ndarray, "image 2"]
) -> Float[np.ndarray, "image region 5"]:
    """(x1/W, y1/H, x2/W, y2/H, area/(W H)) of boxes in pixels, from images of these sizes."""
    scaled = corners / np.concatenate([sizes, sizes], axis=1)[:, None]
    area = (scaled[..., 2] - scaled[..., 0]) * (scaled[..., 3] - scaled[..., 1])
    return np.concatenate([scaled, area[..., None]], axis=-1).astype(np.float32)


def region_overlaps(
    corners: Float[np.ndarray, "image region 4"],
) -> Float16[np.ndarray, "image region region"]:
    """Intersection over union of every two boxes of an image, by pycocotools."""
    boxes = corners.copy()
    boxes[..., 2:] -= boxes[..., :2]  # pycocotools wants x, y, width, height
    images, regions, _ = boxes.shape
    result = np.zeros((images, regions, regions), dtype=np.float16)
    crowd = np.zeros(regions, dtype=np.uint8)
    for image in range(images):
        result[image] = coco_mask.iou(boxes[image], boxes[image], crowd)
    return result
