"""One split of a data folder: its images and captions, checked against each other.

The native format, every file and every refusal are described in docs/data.md. What is small is
checked on every opening; `validate_folder` also reads every feature, once, in chunks.
"""

from __future__ import annotations

import difflib
import hashlib
import logging
import os
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np

from cpfean import folders
from cpfean.data.findings import Finding, Findings
from cpfean.data.regions import RegionFiles, RegionStore
from cpfean.errors import DataError

logger = logging.getLogger(__name__)

SPLITS = ("train", "dev", "test")
VOCABULARY = "objects_vocab.txt"
REQUIRED = ("ims.npy", "caps.txt", "ids.txt")
OPTIONAL = ("boxes.npy", "sizes.npy", "labels.npy", "scores.npy", "counts.npy")

_CHECKS = 1  # to be counted up with every check that is added: folders are then read again
_LONGEST_LINE = 1_000_000  # characters
# Line separators of Unicode, form feeds and the like are part of a caption, however odd.
_CONTROL = re.compile("[\x00-\x08\x0e-\x1b\x1f\x7f]")
_LETTER = re.compile(r"\w")

Caption = TypeVar("Caption", int, np.ndarray)  # one position in a split, or many


@dataclass(frozen=True, kw_only=True)
class Split:
    """The images and captions of one split; captions 5 i to 5 i + 4 describe image i.

    Attributes:
        name: "train", "dev" or "test".
        regions: the images.
        captions: one text each, as in the file.
        image_ids: the images' names.
        captions_per_image: 5 in all released data sets.
        label_names: the label vocabulary; None without labels.
    """

    name: str
    regions: RegionStore
    captions: list[str]
    image_ids: list[str]
    captions_per_image: int
    label_names: list[str] | None

    @property
    def num_images(self) -> int:
        return self.regions.num_images

    @property
    def num_captions(self) -> int:
        return len(self.captions)

    def image_of(self, caption: Caption) -> Caption:
        """The image that a caption describes; for one position or an array of them."""
        return caption // self.captions_per_image


def open_split(
    folder: Path,
    name: str,
    *,
    num_regions: int,
    num_images: int = 0,
    captions_per_image: int = 5,
) -> Split:
    """Opens a split without reading its features.

    Args:
        folder: in the native format.
        name: "train", "dev" or "test".
        num_regions: keep the first so many regions of an image.
        num_images: keep the first so many images; 0 keeps all.

    Raises:
        DataError: files that are missing, damaged or do not belong together; all faults that do
            not take reading the features are listed.
    """
    findings = Findings()
    split = None
    if _folder_exists(folder, findings):
        split = _examine(
            folder,
            name,
            findings,
            num_regions=num_regions,
            num_images=num_images,
            captions_per_image=captions_per_image,
            scan=False,
        )
    findings.refuse(folder)
    assert split is not None
    return split


def validate_folder(
    folder: Path,
    *,
    num_regions: int | None = None,
    splits: Sequence[str] = SPLITS,
    train_images: int = 0,
) -> list[Finding]:
    """Everything that is wrong with a folder; reads all of it once, in chunks of 64 MB.

    What is worth knowing and no fault (clipped boxes, no labels) goes to the log.

    Args:
        num_regions: the region count that will be asked for; None takes what there is.
        splits: which splits have to be there.
        train_images: how many images of "train" will be asked for; 0 means all.

    Returns:
        The first 20 faults of each kind in each file, and how many more there are. An empty list
        means that `open_split` takes every one of `splits`.
    """
    findings = Findings()
    if not _folder_exists(folder, findings):
        return findings.listed()
    opened = []
    for name in splits:
        split = _examine(
            folder,
            name,
            findings,
            num_regions=num_regions,
            num_images=train_images if name == "train" else 0,
            captions_per_image=5,
            scan=True,
        )
        if split is not None:
            opened.append(split)
    _compare(folder, splits, opened, findings)
    _tell(opened)
    return findings.listed()


def check_folder(
    folder: Path,
    *,
    num_regions: int | None = None,
    splits: Sequence[str] = SPLITS,
    train_images: int = 0,
    cache_dir: Path | None = None,
) -> None:
    """Refuses a folder that `validate_folder` finds anything wrong with.

    Args:
        folder, num_regions, splits, train_images: as there.
        cache_dir: where it is noted that a folder was found sound. It is then not read again until
            a file changes, by size, time or fingerprint, or something else is asked of it.

    Raises:
        DataError: lists all that was found.
    """
    state = None
    if cache_dir is not None:
        state = _state(folder, (num_regions, sorted(splits), train_images))
    note = None if cache_dir is None or state is None else cache_dir / f"sound-{state}"
    # A folder that may not be looked into holds no note for us.
    if note is not None and os.path.exists(note):
        logger.info("%s: unchanged since all of it was checked", folder)
        return
    found = validate_folder(
        folder, num_regions=num_regions, splits=splits, train_images=train_images
    )
    if found:
        lines = "\n".join(f"  {finding}" for finding in found)
        raise DataError(f"{folder}: faults in the data.\n{lines}")
    if note is not None:
        folders.note(note, f"{folder}\n")


def data_fingerprint(folder: Path) -> str:
    """Sixteen hexadecimal digits that change when the data does.

    SHA-256 over name, size and content of the files of the native format, others left out. Of a
    file above 16 MB only 64 blocks of 64 kB are read, evenly spread, first and last included: an
    edit of a few rows that keeps the size can go unseen, another extraction cannot.

    Raises:
        DataError: the folder or a file cannot be read.
    """
    block, blocks = 2**16, 64
    digest = hashlib.sha256()
    try:
        for path in native_files(folder):
            size = path.stat().st_size
            digest.update(f"{path.name}\0{size}\0".encode())
            with path.open("rb") as file:
                if size <= 2**24:
                    digest.update(file.read())
                    continue
                for i in range(blocks):
                    file.seek(i * (size - block) // (blocks - 1))
                    digest.update(file.read(block))
    except OSError as error:
        raise DataError(f"{folder}: cannot be read: {error}") from None
    return digest.hexdigest()[:16]


def _state(folder: Path, asked: object) -> str | None:
    """Changes with any file of the folder, with what is asked of it, and with the checks.

    None if the folder cannot be read; the checks say why.
    """
    try:
        digest = hashlib.sha256(f"{_CHECKS} {asked} {data_fingerprint(folder)}".encode())
        for path in native_files(folder):
            # The fingerprint leaves out most of a large file; who writes to it changes its time.
            found = path.stat()
            digest.update(f"{path.name} {found.st_mtime_ns} {found.st_ino}".encode())
    except (DataError, OSError):
        return None
    return digest.hexdigest()[:32]


def native_names() -> list[str]:
    """Names of all files that belong to the native format."""
    return [VOCABULARY] + [f"{s}_{part}" for s in SPLITS for part in REQUIRED + OPTIONAL]


def native_files(folder: Path) -> list[Path]:
    """Those files of the native format that a folder has, by name."""
    return [folder / name for name in sorted(native_names()) if (folder / name).exists()]


def _folder_exists(folder: Path, findings: Findings) -> bool:
    if folder.is_dir():
        return True
    findings.add("missing", str(folder), "expected a folder, found none; check the path")
    return False


def _examine(
    folder: Path,
    name: str,
    findings: Findings,
    *,
    num_regions: int | None,
    num_images: int,
    captions_per_image: int,
    scan: bool,
) -> Split | None:
    """Reads one split; None if a fault makes it unusable."""
    before = len(findings)
    missing = [f"{name}_{part}" for part in REQUIRED if not (folder / f"{name}_{part}").exists()]
    for file in missing:
        findings.add("missing", file, f"no such file in {folder}{_nearest(folder, file)}")
    captions = _captions(folder / f"{name}_caps.txt", findings)
    ids = _ids(folder / f"{name}_ids.txt", findings)
    label_names = None
    if (folder / f"{name}_labels.npy").exists():
        label_names = _vocabulary(folder, findings)

    files = RegionFiles(folder, name, ids or [], findings)
    features = None if files.file("ims") in missing else files.map_features()
    if features is None:
        return None
    stride, ids = _agree(
        name,
        findings,
        rows=len(features),
        captions=captions,
        ids=ids,
        per_image=captions_per_image,
    )
    if features.shape[0] % stride:
        return None
    files = RegionFiles(folder, name, ids, findings)
    total = features.shape[0] // stride
    if num_images > total:
        findings.add(
            "too-few-images",
            files.file("ims"),
            f"expected at least {num_images} images, found {total}; set data.train_images to "
            f"{total} or less, or to 0 for all",
        )
    regions = files.open(
        features,
        stride=stride,
        num_regions=features.shape[1] if num_regions is None else num_regions,
        num_labels=None if label_names is None else len(label_names),
        scan=scan,
    )
    if regions is None or captions is None or len(findings) > before:
        return None
    split = Split(
        name=name,
        regions=regions,
        captions=captions,
        image_ids=ids,
        captions_per_image=captions_per_image,
        label_names=label_names,
    )
    return split if num_images in (0, total) else _first(split, num_images)


def _first(split: Split, num_images: int) -> Split:
    def cut(array: np.ndarray | None) -> np.ndarray | None:
        return None if array is None else array[:num_images]

    whole = split.regions
    regions = RegionStore(
        features=whole.features[:num_images],
        geometry=cut(whole.geometry),
        iou=cut(whole.iou),
        labels=cut(whole.labels),
        confidences=cut(whole.confidences),
        counts=whole.counts[:num_images],
        num_clipped=whole.num_clipped,
    )
    return Split(
        name=split.name,
        regions=regions,
        captions=split.captions[: num_images * split.captions_per_image],
        image_ids=split.image_ids[:num_images],
        captions_per_image=split.captions_per_image,
        label_names=split.label_names,
    )


def _lines(path: Path, findings: Findings) -> list[str] | None:
    """A text file's lines, split at "\\n" and nowhere else; None after a fault of its encoding."""
    name = path.name
    if not path.exists():
        return None
    try:
        if not path.is_file():
            findings.add("not-text", name, "expected a file, found something else; replace it")
            return None
        content = path.read_bytes()
    except OSError as error:
        findings.add("unreadable", name, f"cannot be read: {error}; check the disk and the rights")
        return None
    before = len(findings)
    if content.startswith(b"\xef\xbb\xbf"):
        findings.add(
            "bad-text",
            name,
            "expected plain UTF-8, found a byte order mark; save it without",
            place="line 1, byte 0",
        )
    raw = content.split(b"\n")
    if raw[-1] == b"":
        raw.pop()  # the newline that ends the last line
    lines: list[str] = []
    offset = 0
    for number, line in enumerate(raw, start=1):
        try:
            lines.append(line.decode().removesuffix("\r"))
        except UnicodeDecodeError as error:
            findings.add(
                "bad-text",
                name,
                f"expected UTF-8, found the byte {line[error.start]:#04x}; convert the file",
                place=f"line {number}, byte {offset + error.start}",
            )
            lines.append("")
        control = _CONTROL.search(lines[-1])
        if control:
            at = len(lines[-1][: control.start()].encode())
            findings.add(
                "bad-text",
                name,
                f"expected text, found the control character {control[0]!r}; remove it",
                place=f"line {number}, byte {offset + at}",
            )
        if len(line) > _LONGEST_LINE:
            findings.add(
                "long-line",
                name,
                f"expected at most {_LONGEST_LINE:,} bytes, found {len(line):,}; break it",
                place=f"line {number}",
            )
        offset += len(line) + 1
    return lines if len(findings) == before else None


def _captions(path: Path, findings: Findings) -> list[str] | None:
    captions = _lines(path, findings)
    if captions is None:
        return None
    findings.add_rows(
        "empty-caption",
        path.name,
        [i for i, caption in enumerate(captions) if not _says_something(caption)],
        lambda i: (
            f"line {i + 1}",
            f"expected a caption, found {captions[i]!r}; write one, or drop the image's five",
        ),
    )
    return captions


def _says_something(caption: str) -> bool:
    # Tokenizers of the BERT family drop white space, controls, format characters and bare accents.
    if _LETTER.search(caption):
        return True
    return any(unicodedata.category(c)[0] not in "ZCM" and c != "\ufffd" for c in caption)


def _ids(path: Path, findings: Findings) -> list[str] | None:
    ids = _lines(path, findings)
    if ids is None:
        return None
    ids = [line.strip() for line in ids]
    findings.add_rows(
        "empty-id",
        path.name,
        [i for i, name in enumerate(ids) if not name],
        lambda i: (f"line {i + 1}", "expected an image's name, found an empty line; write it"),
    )
    return ids


def _vocabulary(folder: Path, findings: Findings) -> list[str] | None:
    path = folder / VOCABULARY
    if not path.exists():
        findings.add(
            "vocabulary",
            VOCABULARY,
            f"expected the names of the labels, one a line, found no such file in {folder}"
            f"{_nearest(folder, VOCABULARY)}",
        )
        return None
    before = len(findings)
    names = _lines(path, findings)
    if names is None:
        return None
    names = [name.strip() for name in names]
    empty = [i for i, name in enumerate(names) if not _says_something(name)]
    findings.add_rows(
        "vocabulary",
        VOCABULARY,
        empty,
        lambda i: (f"line {i + 1}", f"expected a label's name, found {names[i]!r}; write it"),
    )
    if not names:
        findings.add("vocabulary", VOCABULARY, "expected one name a line, found none; write them")
    return names if len(findings) == before else None


def _agree(
    split: str,
    findings: Findings,
    *,
    rows: int,
    captions: list[str] | None,
    ids: list[str] | None,
    per_image: int,
) -> tuple[int, list[str]]:
    """Finds how the features are stored: rows an image takes, and the images' ids, one each."""
    ims, caps, names = f"{split}_ims.npy", f"{split}_caps.txt", f"{split}_ids.txt"
    num_ids = None if ids is None else len(ids)
    count = None if captions is None else len(captions)
    stride = per_image if count == rows and rows % per_image == 0 else 1
    if stride > 1 and ids is not None and num_ids == rows == len(set(ids)):
        findings.add(
            "caption-count",
            caps,
            f"expected {per_image} captions an image, found {rows:,} captions, {rows:,} rows in "
            f"{ims} and {rows:,} different names in {names}; if an image has a row for each of its "
            "captions, write its name once",
        )
        return 1, ids
    num_images = rows // stride
    if count is not None and count != num_images * per_image:
        # The ids tell which of the two is short.
        if num_ids and num_ids != num_images and count == num_ids * per_image:
            findings.add(
                "image-count",
                ims,
                f"expected {num_ids:,} images by {names} and {caps}, found {rows:,} rows; are all "
                "of one release?",
            )
            return stride, ids or []
        first = f"; the first without all is {_called(ids, count // per_image)}"
        findings.add(
            "caption-count",
            caps,
            f"expected {per_image} captions for each of {num_images:,} images, "
            f"{num_images * per_image:,} in all, found {count:,}"
            f"{first if count < num_images * per_image else ''}; are both of one release?",
        )
    if ids is None:
        return stride, []
    if num_ids == num_images * per_image and num_images:
        groups = [ids[i : i + per_image] for i in range(0, len(ids), per_image)]
        findings.add_rows(
            "image-count",
            names,
            [i for i, group in enumerate(groups) if len(set(group)) > 1],
            lambda i: (
                f"lines {i * per_image + 1} to {(i + 1) * per_image}",
                f"expected one name {per_image} times, found {groups[i]}; write one line an image",
            ),
        )
        ids = [group[0] for group in groups]
    elif num_ids != num_images:
        findings.add(
            "image-count",
            names,
            f"expected {num_images:,} names, one for each image of {ims}, found {num_ids:,}; are "
            "both of one release?",
        )
    _repeated(names, ids, findings)
    return stride, ids


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


def _compare(folder: Path, names: Sequence[str], splits: list[Split], findings: Findings) -> None:
    """What holds between splits: same width, same files, no image in two."""
    for split in splits[1:]:
        if split.regions.feature_dim != splits[0].regions.feature_dim:
            findings.add(
                "feature-width",
                f"{split.name}_ims.npy",
                f"expected vectors of {splits[0].regions.feature_dim} numbers as in "
                f"{splits[0].name}_ims.npy, found {split.regions.feature_dim}; extract both alike",
            )
    for part in OPTIONAL[:-1]:
        have = [name for name in names if (folder / f"{name}_{part}").exists()]
        for name in names:
            if have and name not in have and (folder / f"{name}_ims.npy").exists():
                findings.add(
                    "missing",
                    f"{name}_{part}",
                    f"expected it, because {have[0]}_{part} is there; give it to every split or to "
                    "none",
                )
    # Plain counting from 0 names rows, not images, and every split counts anew.
    named = [s for s in splits if s.image_ids != [str(i) for i in range(s.num_images)]]
    for position, split in enumerate(named):
        for other in named[:position]:
            _leaks(split, other, findings)


def _leaks(split: Split, other: Split, findings: Findings) -> None:
    seen = {image: row for row, image in enumerate(other.image_ids)}
    findings.add_rows(
        "leak",
        f"{split.name}_ids.txt",
        [i for i, image in enumerate(split.image_ids) if image in seen],
        lambda i: (
            f"image {i}",
            f"expected images of {split.name} only, found {split.image_ids[i]!r}, image "
            f"{seen[split.image_ids[i]]} of {other.name}; take it out of one of them",
        ),
    )


def _tell(splits: list[Split]) -> None:
    for split in splits:
        if split.regions.num_clipped:
            logger.info(
                "%s: %d boxes reached out of their image by 1 pixel at most and were clipped",
                split.name,
                split.regions.num_clipped,
            )
    if splits and splits[0].regions.geometry is None:
        logger.info("no boxes: every region is a neighbour of every other")
    if splits and splits[0].regions.labels is None:
        logger.info("no labels: regions have no textual prior")
    elif splits and splits[0].regions.confidences is None:
        logger.info("labels without scores: all are trusted alike")


def _nearest(folder: Path, name: str) -> str:
    try:
        present = sorted(path.name for path in folder.iterdir())
    except OSError:
        return ""
    near = difflib.get_close_matches(name, present, n=3, cutoff=0.6)
    if near:
        return f"; nearest: {', '.join(near)}"
    return f"; it has {', '.join(present[:5]) or 'nothing'}{', ...' if len(present) > 5 else ''}"


__all__ = [
    "SPLITS",
    "Finding",
    "Split",
    "check_folder",
    "data_fingerprint",
    "native_files",
    "open_split",
    "validate_folder",
]
