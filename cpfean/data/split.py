"""One split of a data folder: its images and captions, checked against each other.

The native format, every file and every refusal are described in docs/data.md. What is small is
checked on every opening; `validate_folder` also reads every feature, once, in chunks.
"""

from __future__ import annotations

import difflib
import hashlib
import logging
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cpfean import folders
from cpfean.data.agreement import GALLERY, agree, read_split_text, read_texts
from cpfean.data.caption_groups import IMAGE_OF_CAPTION, PER_IMAGE, Caption, CaptionGroups
from cpfean.data.findings import Finding, Findings
from cpfean.data.provenance import PROVENANCE, check_provenance
from cpfean.data.regions import RegionFiles, RegionStore
from cpfean.data.texts import blank_end, says_something
from cpfean.errors import DataError
from cpfean.files import is_there, open_file

logger = logging.getLogger(__name__)

SPLITS = ("train", "dev", "test")
VOCABULARY = "objects_vocab.txt"
REQUIRED = ("ims.npy", "caps.txt", "ids.txt")
OF_ALL_OR_NONE = ("boxes.npy", "sizes.npy", "labels.npy", "scores.npy")  # of the splits
OPTIONAL = (*OF_ALL_OR_NONE, "counts.npy", IMAGE_OF_CAPTION)

_OF_CAPTIONS = ("caps.txt", IMAGE_OF_CAPTION)

WHOLE_TEST = "testall"  # COCO's 5,000 test images, where "test" is a thousand of them

_CHECKS = 4  # to be counted up with every check that is added: folders are then read again


@dataclass(frozen=True, kw_only=True)
class Split:
    """The images and captions of one split.

    Attributes:
        name: "train", "dev", "test" or "gallery".
        regions: the images.
        captions: one text each, as in the file; a gallery has none.
        image_ids: the images' names.
        groups: which captions describe which image.
        label_names: the label vocabulary; None without labels.
    """

    name: str
    regions: RegionStore
    captions: list[str]
    image_ids: list[str]
    groups: CaptionGroups
    label_names: list[str] | None

    @property
    def num_images(self) -> int:
        return self.regions.num_images

    @property
    def num_captions(self) -> int:
        return len(self.captions)

    def image_of(self, caption: Caption) -> Caption:
        """The image that a caption describes; for one position or an array of them."""
        return self.groups.image_of(caption)

    def captions_of(self, image: int) -> range:
        """The captions of an image."""
        return self.groups.of_image(image)


def open_split(
    folder: Path,
    name: str,
    *,
    num_regions: int | None,
    num_images: int = 0,
    overlaps: bool = True,
) -> Split:
    """Opens a split without reading its features.

    Args:
        folder: in the native format.
        name: "train", "dev", "test" or "gallery".
        num_regions: keep the first so many regions of an image; None keeps all.
        num_images: keep the first so many images; 0 keeps all.
        overlaps: compute the IoU of the regions, which takes most of the time.

    Raises:
        DataError: files that are missing, damaged or do not belong together; all faults that do
            not take reading the features are listed.
    """
    findings = Findings()
    split = None
    if is_folder(folder, findings):
        split = _examine(
            folder,
            name,
            findings,
            num_regions=num_regions,
            num_images=num_images,
            scan=False,
            overlaps=overlaps,
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
    if not is_folder(folder, findings):
        return findings.listed()
    check_provenance(folder, findings)
    opened = []
    for name in splits:
        split = _examine(
            folder,
            name,
            findings,
            num_regions=num_regions,
            num_images=train_images if name == "train" else 0,
            scan=True,
            overlaps=False,
        )
        if split is not None:
            opened.append(split)
    _compare(folder, splits, opened, findings)
    _tell(folder, opened, num_regions=num_regions)
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

    SHA-256 over name, size and content of the files that are used, others left out. Of a
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
            with open_file(path) as file:
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
    named = [f"{stem}_{part}" for stem in (*SPLITS, WHOLE_TEST) for part in REQUIRED + OPTIONAL]
    gallery = [f"{GALLERY}_{part}" for part in REQUIRED + OPTIONAL if part not in _OF_CAPTIONS]
    return [VOCABULARY, PROVENANCE, *named, *gallery]


def used_names(names: Iterable[str]) -> list[str]:
    """Those of some files that are read: of the native format, and one test split of two.

    Args:
        names: of all files of a folder.
    """
    known = set(native_names())
    found = sorted(name for name in names if name in known)
    if any(name.startswith(f"{WHOLE_TEST}_") for name in found):
        found = [name for name in found if not name.startswith("test_")]
    return found


def native_files(folder: Path) -> list[Path]:
    """Those files of a folder that are read, by name; links that lead nowhere included."""
    return [folder / name for name in used_names(n for n in native_names() if is_there(folder / n))]


def split_stem(folder: Path, split: str) -> str:
    """What the names of a split's files begin with.

    SCAN's folder of COCO has its 5,000 test images as "testall" and the first thousand of them as
    "test". Where there is any file of "testall", it is the test split.
    """
    if split != "test":
        return split
    whole = (f"{WHOLE_TEST}_{part}" for part in REQUIRED + OPTIONAL)
    return WHOLE_TEST if any(is_there(folder / name) for name in whole) else split


def splits_of(folder: Path) -> tuple[str, ...]:
    """The splits that a folder is meant to have: the three, a gallery, or both.

    A folder of anything else is taken for one of the three, so that checks say what it lacks.
    """
    if not is_there(folder / f"{GALLERY}_ims.npy"):
        return SPLITS
    has_others = any(path.name.startswith(SPLITS) for path in native_files(folder))
    return (*SPLITS, GALLERY) if has_others else (GALLERY,)


def is_folder(folder: Path, findings: Findings) -> bool:
    """Whether a folder is there and can be read; if not, with a finding."""
    if os.path.isdir(folder):
        if os.access(folder, os.R_OK | os.X_OK):
            return True
        findings.add("unreadable", str(folder), "the folder cannot be read; check the rights")
        return False
    if os.path.exists(folder):
        found = "something else"
    elif is_there(folder):
        found = f"a link that leads nowhere, to {os.readlink(folder)}"
    else:
        found = "none"
    findings.add("missing", str(folder), f"expected a folder, found {found}; check the path")
    return False


def _examine(
    folder: Path,
    name: str,
    findings: Findings,
    *,
    num_regions: int | None,
    num_images: int,
    scan: bool,
    overlaps: bool,
) -> Split | None:
    """Reads one split; None if a fault makes it unusable."""
    before = len(findings)
    stem = split_stem(folder, name)
    required = [part for part in REQUIRED if name != GALLERY or part not in _OF_CAPTIONS]
    missing = [file for file in (f"{stem}_{p}" for p in required) if not is_there(folder / file)]
    for file in missing:
        findings.add("missing", file, absent(folder, file))
    texts = read_texts(folder, stem, findings)
    label_names = None
    if is_there(folder / f"{stem}_labels.npy"):
        label_names = read_label_names(folder, findings)

    files = RegionFiles(folder, stem, texts.ids or [], findings)
    features = None if files.file("ims") in missing else files.map_features()
    if features is None:
        return None
    agreed = agree(folder, stem, texts, findings, rows=len(features))
    if agreed is None or features.shape[0] % agreed.stride:
        return None
    stride, ids, groups = agreed
    files = RegionFiles(folder, stem, ids, findings, rows_each=texts.rows_each)
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
        overlaps=overlaps,
    )
    if regions is None or texts.captions is None or groups is None or len(findings) > before:
        return None
    split = Split(
        name=name,
        regions=regions,
        captions=texts.captions,
        image_ids=ids,
        groups=groups,
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
        sizes=cut(whole.sizes),
        cut=whole.cut,
    )
    groups = split.groups.first(num_images)
    return Split(
        name=split.name,
        regions=regions,
        captions=split.captions[: groups.num_captions],
        image_ids=split.image_ids[:num_images],
        groups=groups,
        label_names=split.label_names,
    )


def read_captions(folder: Path, name: str, *, num_images: int = 0) -> list[str]:
    """The captions of a split of a checked folder.

    Args:
        name: of the split.
        num_images: those of the first so many images; 0 takes all.

    Raises:
        DataError: a text that is none.
    """
    findings = Findings()
    texts = read_texts(folder, split_stem(folder, name), findings)
    findings.refuse(folder)
    captions = texts.captions or []
    if not num_images:
        return captions
    if texts.image_of_caption is None:
        return captions[: num_images * PER_IMAGE]
    return captions[: int((texts.image_of_caption < num_images).sum())]


def read_label_names(folder: Path, findings: Findings) -> list[str] | None:
    """The label vocabulary of a folder; None, and findings, without a sound one."""
    path = folder / VOCABULARY
    if not is_there(path):
        findings.add(
            "vocabulary",
            VOCABULARY,
            f"expected the names of the labels, one a line, found {absent(folder, VOCABULARY)}",
        )
        return None
    before = len(findings)
    names = read_split_text(path, findings)
    if names is None or blank_end(path, names, findings):
        return None
    names = [name.strip() for name in names]
    empty = [i for i, name in enumerate(names) if not says_something(name)]
    findings.add_rows(
        "vocabulary",
        VOCABULARY,
        empty,
        lambda i: (f"line {i + 1}", f"expected a label's name, found {names[i]!r}; write it"),
    )
    if not names:
        findings.add("vocabulary", VOCABULARY, "expected one name a line, found none; write them")
    return names if len(findings) == before else None


def _compare(folder: Path, names: Sequence[str], splits: list[Split], findings: Findings) -> None:
    """What holds between splits: same width, same files, no image in two."""
    for split in splits[1:]:
        if split.regions.feature_dim != splits[0].regions.feature_dim:
            findings.add(
                "feature-width",
                f"{split_stem(folder, split.name)}_ims.npy",
                f"expected vectors of {splits[0].regions.feature_dim} numbers as in "
                f"{splits[0].name}_ims.npy, found {split.regions.feature_dim}; extract both alike",
            )
    stems = [split_stem(folder, name) for name in names]
    for part in OF_ALL_OR_NONE:
        have = [stem for stem in stems if is_there(folder / f"{stem}_{part}")]
        for stem in stems:
            if have and stem not in have and is_there(folder / f"{stem}_ims.npy"):
                findings.add(
                    "missing",
                    f"{stem}_{part}",
                    f"expected it, because {have[0]}_{part} is there; give it to every split or to "
                    "none",
                )
    # What nobody asks for is not looked for, so that a slip of the case would go unseen.
    present = {name.lower(): name for name in _present(folder)}
    for name in (f"{stem}_{part}" for stem in stems for part in OPTIONAL):
        found = present.get(name)
        if not is_there(folder / name) and found is not None:
            findings.add("missing", name, f"expected this name, found {found}; rename it")
    # Plain counting from 0 names rows, not images, and every split counts anew.
    # And what is searched may well be what a model was trained on.
    named = [
        split
        for split in splits
        if split.name != GALLERY and split.image_ids != [str(i) for i in range(split.num_images)]
    ]
    for position, split in enumerate(named):
        for other in named[:position]:
            _leaks(split_stem(folder, split.name), split, other, findings)


def _leaks(stem: str, split: Split, other: Split, findings: Findings) -> None:
    seen = {image: row for row, image in enumerate(other.image_ids)}
    findings.add_rows(
        "leak",
        f"{stem}_ids.txt",
        [i for i, image in enumerate(split.image_ids) if image in seen],
        lambda i: (
            f"image {i}",
            f"expected images of {split.name} only, found {split.image_ids[i]!r}, image "
            f"{seen[split.image_ids[i]]} of {other.name}; take it out of one of them",
        ),
    )


def _tell(folder: Path, splits: list[Split], *, num_regions: int | None) -> None:
    for split in splits:
        if split.name != split_stem(folder, split.name):
            logger.info(
                "test is testall, %s images; the smaller test_* is not used",
                f"{split.num_images:,}",
            )
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
    cut = [split.regions.cut for split in splits if split.regions.cut]
    if cut:
        logger.info("%s", cut[0])


def absent(folder: Path, name: str) -> str:
    """What is there in place of a file that is not: the same in other letters, or near names."""
    present = _present(folder)
    same = [other for other in present if other.lower() == name]
    if same:
        return f"no such file in {folder}, but {same[0]}; rename it, letters count"
    if is_there(folder / f"{GALLERY}_ims.npy") and splits_of(folder) == (GALLERY,):
        return f"{folder} has a {GALLERY} alone: images without captions, which can be searched"
    near = difflib.get_close_matches(name, present, n=3, cutoff=0.6)
    if near:
        return f"no such file in {folder}; nearest: {', '.join(near)}"
    has = f"{', '.join(present[:5]) or 'nothing'}{', ...' if len(present) > 5 else ''}"
    return f"no such file in {folder}; it has {has}"


def _present(folder: Path) -> list[str]:
    try:
        return sorted(os.listdir(folder))
    except OSError:
        return []


__all__ = [
    "GALLERY",
    "SPLITS",
    "Finding",
    "Split",
    "check_folder",
    "data_fingerprint",
    "is_folder",
    "native_files",
    "open_split",
    "split_stem",
    "splits_of",
    "used_names",
    "validate_folder",
]
