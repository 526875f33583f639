"""Folders of arrays and texts: SCAN's data release with the boxes of GSMN's, or our own format.

    S_ims.npy         SCAN   floats (N, R, D), or five equal rows for each image
    S_caps.txt        SCAN   five captions an image, one a line; other numbers with our own
                             S_image_of_caption.npy, and then a row and a name an image
    S_ids.txt         SCAN   an image's name in one line, or in five
    S_ims_bbx.npy     GSMN   (N, R, 4): x1, y1, x2, y2 in pixels
    S_ims_size.json   GSMN   a list of {"image_w": ..., "image_h": ...}

S is train, dev or test; where there is a "testall", as for COCO, it is the test split, and the
smaller "test" is not used. GSMN's sizes come as `S_ims_size.npy`, a pickle, which is never
loaded here; the message says how whoever trusts it makes the JSON file of it.

A folder in the native format may have boxes in another order, labels that count from 1, or features
in another number type; it is written anew as what these are said to be.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np

from cpfean import commands
from cpfean.data.agreement import agree, read_texts
from cpfean.data.arrays import map_array
from cpfean.data.boxes import NATIVE, Layout
from cpfean.data.caption_groups import CaptionGroups
from cpfean.data.convert.captions import Captioned, clean_caption, read_json
from cpfean.data.convert.native import LARGEST_HALF, NativeWriter, Regions, check_target
from cpfean.data.findings import Findings
from cpfean.data.regions import Annotations, RegionFiles
from cpfean.data.split import (
    REQUIRED,
    SPLITS,
    WHOLE_TEST,
    absent,
    is_folder,
    read_label_names,
    split_stem,
)
from cpfean.errors import DataError
from cpfean.files import is_there
from cpfean.progress import Progress

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class _Source:
    """One split; features are mapped, a row or five an image."""

    stem: str
    features: np.ndarray
    stride: int
    images: Captioned
    told: Annotations


def convert_precomp(
    source: Path,
    folder: Path,
    *,
    boxes: Path | None = None,
    num_regions: int | None = None,
    half: bool = False,
    layout: Layout = NATIVE,
    labels_from: int = 0,
) -> None:
    """Writes a folder of SCAN's, or one in the native format, in that format, one row an image.

    Args:
        source: one of `f30k_precomp` and `coco_precomp`, or one like them; boxes, labels and scores
            under their native names are taken too.
        folder: to be made; must not exist.
        boxes: folder of GSMN's boxes and sizes, in place of those in `source`.
        num_regions: keep the first so many; None keeps all.
        half: store features as float16.
        layout: how the boxes are written.
        labels_from: the number of the vocabulary's first label.

    Raises:
        DataError: lists what is wrong; nothing is left behind.
    """
    check_target(folder)
    findings = Findings()
    for given in (source, boxes):
        if given is not None and not is_folder(given, findings):
            raise DataError(f"{given}: {findings.listed()[0].message}.")
    names = None
    if any(is_there(source / f"{split_stem(source, s)}_labels.npy") for s in SPLITS):
        names = read_label_names(source, findings)
    splits = {}
    for split in SPLITS:
        stem = split_stem(source, split)
        if stem == WHOLE_TEST:
            logger.info("testall is taken as the test split")
        opened = _open(
            source,
            stem,
            boxes,
            findings,
            layout=layout,
            labels_from=labels_from,
            num_labels=None if names is None else len(names),
        )
        if opened is not None:
            splits[split] = opened
    dims = {part.features.shape[1:] for part in splits.values()}
    if len(dims) > 1:
        findings.add(
            "shape",
            "*_ims.npy",
            f"expected (regions, feature width) to be the same in all splits, found {dims}; are "
            "all of one release?",
        )
    has = {
        kind: _given(kind, {split: getattr(part.told, kind) for split, part in splits.items()})
        for kind in ("boxes", "labels", "confidences")
    }
    findings.refuse(source)
    if layout != NATIVE and not has["boxes"]:
        raise DataError(f"{source}: has no boxes of which --box-order and --box-units could tell.")
    if labels_from and not has["labels"]:
        raise DataError(f"{source}: has no labels of which --labels-from could tell.")
    regions, dim = dims.pop()
    if num_regions is not None and num_regions > regions:
        raise DataError(
            f"{source}: expected at least {num_regions} regions an image, found {regions}; ask for "
            "fewer."
        )
    with NativeWriter(
        folder,
        {split: part.images for split, part in splits.items()},
        num_regions=num_regions or regions,
        feature_dim=dim,
        half=half,
        boxes=has["boxes"],
        vocabulary=names if has["labels"] else None,
        scores=has["confidences"],
    ) as writer:
        total = sum(len(part.images.names) for part in splits.values())
        progress = Progress(f"converting {source}", total=total)
        done = 0
        for split, part in splits.items():
            for row in range(len(part.images.names)):
                writer.write(split, row, _regions(part, row, half=half, findings=findings))
                done += 1
                progress.step(done)
        findings.refuse(source)
        writer.finish()


def _given(kind: str, by_split: dict[str, np.ndarray | None]) -> bool:
    """Whether all splits have something.

    Raises:
        DataError: some have it and others lack it.
    """
    lacking = [split for split, values in by_split.items() if values is None]
    if lacking and len(lacking) < len(by_split):
        raise DataError(
            f"expected {kind} in every split or in none, found none in {' and '.join(lacking)}; "
            "give them to all."
        )
    return not lacking


def _regions(part: _Source, row: int, *, half: bool, findings: Findings) -> Regions:
    """One image; what is wrong with its features goes to `findings`."""
    rows = part.features[row * part.stride : (row + 1) * part.stride]
    file, place = f"{part.stem}_ims.npy", f"image {row} ({part.images.names[row]})"
    count = int(part.told.counts[row])
    largest = np.abs(rows[0]).max()
    if not np.isfinite(rows[0]).all():
        region = int(np.flatnonzero(~np.isfinite(rows[0]).all(axis=1))[0])
        message = f"expected finite numbers, found others in region {region}; download it again"
        findings.add("not-finite", file, message, place=place)
    elif largest > (LARGEST_HALF if half else np.finfo(np.float32).max):
        message = (
            f"expected features up to {LARGEST_HALF:,.0f}; convert without --half"
            if half
            else f"expected features that float32 can hold, found {largest:g}; extract it again"
        )
        findings.add("dtype", file, message, place=place)
    elif part.stride > 1 and (rows != rows[0]).any():
        findings.add(
            "unequal-rows",
            file,
            f"expected rows {row * part.stride} to {(row + 1) * part.stride - 1} to be equal, one "
            "for each caption, found others; are captions and features of one release?",
            place=place,
        )

    def of_image(values: np.ndarray | None) -> np.ndarray | None:
        return None if values is None else values[row, :count]

    with np.errstate(over="ignore"):  # which has been told above
        features = np.asarray(rows[0][:count], dtype=np.float32)
    told = part.told
    return Regions(
        features=features,
        boxes=of_image(told.boxes),
        size=None
        if told.sizes is None
        else (math.ceil(told.sizes[row, 0]), math.ceil(told.sizes[row, 1])),
        labels=of_image(told.labels),
        scores=of_image(told.confidences),
        ordered=True,
    )


def _open(
    source: Path,
    stem: str,
    boxes: Path | None,
    findings: Findings,
    *,
    layout: Layout,
    labels_from: int,
    num_labels: int | None,
) -> _Source | None:
    """Maps and checks the files of one split; None after a fault that makes it unusable."""
    before = len(findings)
    file = f"{stem}_ims.npy"
    for name in (f"{stem}_{part}" for part in REQUIRED):
        if not is_there(source / name):
            findings.add("missing", name, absent(source, name))
    if len(findings) > before:
        return None
    features = map_array(source / file, findings)
    texts = read_texts(source, stem, findings)
    if features is None:
        return None
    if features.ndim != 3 or features.dtype.kind != "f":
        findings.add(
            "shape",
            file,
            "expected floats of shape (images, regions, feature width), found "
            f"{features.dtype} of {features.shape}; is it of the release?",
        )
        return None
    if features.dtype not in (np.dtype("<f2"), np.dtype("<f4")):
        order = ", big-endian" if features.dtype.str[0] == ">" else ""
        logger.info("%s: read as %s%s, stored as float32", file, features.dtype.name, order)
    agreed = agree(source, stem, texts, findings, rows=len(features))
    if agreed is None or len(findings) > before or texts.captions is None:
        return None
    stride, names, groups = agreed
    assert groups is not None  # there was no finding
    num_images = len(features) // stride
    files = RegionFiles(
        source,
        stem,
        names,
        findings,
        layout=layout,
        labels_from=labels_from,
        converting=True,
        boxes_file=None if boxes is None else f"{stem}_ims_bbx.npy",
        rows_each=texts.rows_each,
    )
    corners = sizes = None
    if boxes is not None:
        each = texts.rows_each
        corners = _boxes(boxes, stem, features.shape[1], num_images, findings, rows_each=each)
        sizes = _sizes(boxes, stem, num_images, findings, rows_each=each)
        if corners is None or sizes is None:
            return None
    captions = _by_image(f"{stem}_caps.txt", texts.captions, groups, findings)
    images = Captioned(names=names, captions=captions)
    told = files.annotations(
        num_images, features.shape[1], num_labels=num_labels, boxes=corners, sizes=sizes
    )
    if len(findings) > before:
        return None
    return _Source(stem=stem, features=features, stride=stride, images=images, told=told)


def _by_image(
    file: str, captions: list[str], groups: CaptionGroups, findings: Findings
) -> list[list[str]]:
    cleaned = []
    for number, caption in enumerate(captions, start=1):
        try:
            cleaned.append(clean_caption(caption))
        except ValueError as error:
            findings.add("empty-caption", file, str(error), place=f"line {number}")
            cleaned.append("")
    return [cleaned[start:stop] for start, stop in pairwise(groups.edges.tolist())]


def _boxes(
    folder: Path, name: str, regions: int, num_images: int, findings: Findings, *, rows_each: int
) -> np.ndarray | None:
    file = f"{name}_ims_bbx.npy"
    if not is_there(folder / file):
        findings.add("missing", file, f"expected the boxes of GSMN's release, none in {folder}")
        return None
    boxes = map_array(folder / file, findings)
    if boxes is None:
        return None
    if boxes.shape == (num_images * rows_each, regions, 4):
        fives = boxes.reshape(num_images, rows_each, regions, 4)
        if (fives == fives[:, :1]).all():
            return fives[:, 0]
    if boxes.shape != (num_images, regions, 4):
        findings.add(
            "shape",
            file,
            f"expected {(num_images, regions, 4)} to go with {name}_ims.npy, found {boxes.shape}; "
            "are features and boxes of the same images and regions?",
        )
        return None
    return boxes


def _sizes(
    folder: Path, name: str, num_images: int, findings: Findings, *, rows_each: int
) -> np.ndarray | None:
    """Widths and heights, "image 2"."""
    file, pickled = f"{name}_ims_size.json", f"{name}_ims_size.npy"
    if not is_there(folder / file):
        if is_there(folder / pickled):
            found = (
                f"expected the sizes as JSON, found only {pickled}, which is a pickle: loading it "
                "can run any code, so it is not done here. If you trust where it comes from: "
                f"{commands.unpickled_sizes(folder / pickled, folder / file)}"
            )
        else:
            found = f"expected the images' widths and heights, no such file in {folder}"
        findings.add("missing", file, found)
        return None
    entries = read_json(folder / file)
    try:
        sizes = np.array([(entry["image_w"], entry["image_h"]) for entry in entries])
        if sizes.dtype.kind != "i" or sizes.shape[1:] != (2,):
            raise TypeError(f"{sizes.dtype} of shape {sizes.shape}")
    except (KeyError, TypeError, ValueError, IndexError) as error:
        findings.add(
            "bad-json",
            file,
            'expected a list of {"image_w": number, "image_h": number}, found otherwise '
            f"({error!r}); write it so",
        )
        return None
    if len(sizes) == num_images * rows_each:
        sizes = sizes[::rows_each]
    if len(sizes) != num_images:
        findings.add(
            "shape", file, f"expected {num_images:,} sizes, one an image, found {len(sizes):,}"
        )
        return None
    if sizes.min() <= 0:
        row = int(np.flatnonzero((sizes <= 0).any(axis=1))[0])
        findings.add(
            "no-size",
            file,
            f"expected a width and a height above 0, found {sizes[row].tolist()}",
            place=f"image {row}",
        )
        return None
    return sizes
