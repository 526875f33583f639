"""The folders of SCAN's data release, with the boxes of GSMN's.

    S_ims.npy         SCAN   float32 (N, R, D), or five equal rows for each image
    S_caps.txt        SCAN   five captions an image, one a line
    S_ids.txt         SCAN   an image's name in one line, or in five
    S_ims_bbx.npy     GSMN   (N, R, 4): x1, y1, x2, y2 in pixels
    S_ims_size.json   GSMN   a list of {"image_w": ..., "image_h": ...}

S is train, dev or test; where there is a "testall", as for COCO, it is the test split, and the
smaller "test" is not used. GSMN's sizes come as `S_ims_size.npy`, a pickle, which is never
loaded here; the message says how whoever trusts it makes the JSON file of it.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cpfean.data.arrays import map_array
from cpfean.data.convert.captions import CAPTIONS_PER_IMAGE, Captioned, clean_caption, read_json
from cpfean.data.convert.native import LARGEST_HALF, NativeWriter, Regions, check_target
from cpfean.data.findings import Findings
from cpfean.data.split import SPLITS
from cpfean.errors import DataError
from cpfean.progress import Progress

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class _Source:
    """One split; arrays are mapped, a row or five an image."""

    name: str
    features: np.ndarray
    stride: int
    images: Captioned
    boxes: np.ndarray | None
    sizes: np.ndarray | None


def convert_precomp(
    source: Path,
    folder: Path,
    *,
    boxes: Path | None = None,
    num_regions: int | None = None,
    half: bool = False,
) -> None:
    """Writes a folder of SCAN's as one in the native format, one row an image.

    Args:
        source: one of `f30k_precomp` and `coco_precomp`, or one like them.
        folder: to be made; must not exist.
        boxes: folder of GSMN's boxes and sizes; None leaves boxes out.
        num_regions: keep the first so many; None keeps all.
        half: store features as float16.

    Raises:
        DataError: lists what is wrong; nothing is left behind.
    """
    check_target(folder)
    if not source.is_dir():
        raise DataError(f"{source}: expected a folder, found none; check the path.")
    findings = Findings()
    splits = {}
    for split in SPLITS:
        whole = split == "test" and (source / "testall_ims.npy").exists()
        name = "testall" if whole else split
        if whole:
            logger.info("testall is taken as the test split")
        opened = _open(source, name, boxes, findings)
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
    findings.refuse(source)
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
        boxes=boxes is not None,
        vocabulary=None,
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


def _regions(part: _Source, row: int, *, half: bool, findings: Findings) -> Regions:
    """One image; what is wrong with its features goes to `findings`."""
    rows = part.features[row * part.stride : (row + 1) * part.stride]
    features = np.asarray(rows[0], dtype=np.float32)
    file, place = f"{part.name}_ims.npy", f"image {row} ({part.images.names[row]})"
    if not np.isfinite(features).all():
        region = int(np.flatnonzero(~np.isfinite(features).all(axis=1))[0])
        message = f"expected finite numbers, found others in region {region}; download it again"
        findings.add("not-finite", file, message, place=place)
    elif half and np.abs(features).max() > LARGEST_HALF:
        message = f"expected features up to {LARGEST_HALF:,.0f}; convert without --half"
        findings.add("dtype", file, message, place=place)
    elif part.stride > 1 and (rows != rows[0]).any():
        findings.add(
            "unequal-rows",
            file,
            f"expected rows {row * part.stride} to {(row + 1) * part.stride - 1} to be equal, one "
            "for each caption, found others; are captions and features of one release?",
            place=place,
        )
    return Regions(
        features=features,
        boxes=None if part.boxes is None else part.boxes[row],
        size=None if part.sizes is None else tuple(part.sizes[row].tolist()),
    )


def _open(source: Path, name: str, boxes: Path | None, findings: Findings) -> _Source | None:
    """Maps and checks the files of one split; None after a fault that makes it unusable."""
    before = len(findings)
    for part in ("ims.npy", "caps.txt", "ids.txt"):
        if not (source / f"{name}_{part}").exists():
            findings.add("missing", f"{name}_{part}", f"no such file in {source}")
    if len(findings) > before:
        return None
    file = f"{name}_ims.npy"
    features = map_array(source / file, findings)
    captions = _lines(source / f"{name}_caps.txt")
    ids = [line.strip() for line in _lines(source / f"{name}_ids.txt")]
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
    rows = len(features)
    stride = CAPTIONS_PER_IMAGE if rows == len(captions) else 1
    num_images = rows // stride
    if rows % stride or len(captions) != num_images * CAPTIONS_PER_IMAGE:
        findings.add(
            "caption-count",
            f"{name}_caps.txt",
            f"expected {CAPTIONS_PER_IMAGE} captions for each of {num_images:,} images in {file}, "
            f"found {len(captions):,}; are both of one release?",
        )
        return None
    images = Captioned(
        names=_one_each(f"{name}_ids.txt", ids, num_images, findings),
        captions=_fives(f"{name}_caps.txt", captions, findings),
    )
    corners = sizes = None
    if boxes is not None:
        corners = _boxes(boxes, name, features.shape[1], num_images, findings)
        sizes = _sizes(boxes, name, num_images, findings)
    if len(findings) > before:
        return None
    return _Source(
        name=name,
        features=features,
        stride=stride,
        images=images,
        boxes=corners,
        sizes=sizes,
    )


def _lines(path: Path) -> list[str]:
    try:
        return path.read_bytes().decode().removesuffix("\n").split("\n")
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}; check the disk.") from None
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}, byte {error.start}: expected UTF-8; convert the file to it."
        ) from None


def _fives(file: str, captions: list[str], findings: Findings) -> list[list[str]]:
    cleaned = []
    for number, caption in enumerate(captions, start=1):
        try:
            cleaned.append(clean_caption(caption))
        except ValueError as error:
            findings.add("empty-caption", file, str(error), place=f"line {number}")
            cleaned.append("")
    step = CAPTIONS_PER_IMAGE
    return [cleaned[i : i + step] for i in range(0, len(cleaned), step)]


def _one_each(file: str, ids: list[str], num_images: int, findings: Findings) -> list[str]:
    step = CAPTIONS_PER_IMAGE
    if len(ids) == num_images * step:
        groups = [ids[i : i + step] for i in range(0, len(ids), step)]
        unequal = [i for i, group in enumerate(groups) if len(set(group)) > 1]
        findings.add_rows(
            "image-count",
            file,
            unequal,
            lambda i: (
                f"lines {i * step + 1} to {(i + 1) * step}",
                f"expected one name five times, found {groups[i]}; is it of the same release?",
            ),
        )
        ids = [group[0] for group in groups]
    elif len(ids) != num_images:
        findings.add(
            "image-count",
            file,
            f"expected {num_images:,} names, or each five times, found {len(ids):,}; is it of the "
            "same release?",
        )
    first: dict[str, int] = {}
    again = [i for i, name in enumerate(ids) if first.setdefault(name, i) != i]
    findings.add_rows(
        "duplicate-id",
        file,
        again,
        lambda i: (
            f"image {i}",
            f"expected every image once, found {ids[i]!r} as image {first[ids[i]]} already",
        ),
    )
    return ids


def _boxes(
    folder: Path, name: str, regions: int, num_images: int, findings: Findings
) -> np.ndarray | None:
    file = f"{name}_ims_bbx.npy"
    if not (folder / file).exists():
        findings.add("missing", file, f"expected the boxes of GSMN's release, none in {folder}")
        return None
    boxes = map_array(folder / file, findings)
    if boxes is None:
        return None
    if boxes.shape == (num_images * CAPTIONS_PER_IMAGE, regions, 4):
        fives = boxes.reshape(num_images, CAPTIONS_PER_IMAGE, regions, 4)
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


def _sizes(folder: Path, name: str, num_images: int, findings: Findings) -> np.ndarray | None:
    """Widths and heights, "image 2"."""
    file, pickled = f"{name}_ims_size.json", f"{name}_ims_size.npy"
    if not (folder / file).exists():
        if (folder / pickled).exists():
            found = (
                f"expected the sizes as JSON, found only {pickled}, which is a pickle: loading it "
                "can run any code, so it is not done here. If you trust where it comes from, in "
                f'its folder: python -c "import json, numpy; json.dump([{{k: int(v) for k, v in '
                f"size.items()}} for size in numpy.load('{pickled}', allow_pickle=True, "
                f"encoding='latin1')], open('{file}', 'w'))\""
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
    if len(sizes) == num_images * CAPTIONS_PER_IMAGE:
        sizes = sizes[::CAPTIONS_PER_IMAGE]
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
