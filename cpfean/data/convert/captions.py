"""Which images a data set has, in which split, with which captions.

Read from Karpathy's split files (`dataset_flickr30k.json`, `dataset_coco.json`) or from COCO's own
caption files. Every image gets five captions: a sixth is dropped and counted, fewer are refused, in
one line where most images of a split have fewer.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from cpfean.data.findings import Findings
from cpfean.data.split import SPLITS
from cpfean.errors import DataError
from cpfean.files import open_file, what_it_is

logger = logging.getLogger(__name__)

CAPTIONS_PER_IMAGE = 5

_SPLIT_NAMES = {"train": "train", "restval": "train", "val": "dev", "test": "test"}
_SUFFIX = re.compile(r"\.(jpe?g|png)$", re.IGNORECASE)
_COCO_NAME = re.compile(r"COCO_[A-Za-z]+\d{4}_(\d+)")
_LARGEST_JSON = 2**31  # bytes; COCO's instances take 450 million
_CONTROL = re.compile("[\x00-\x1f\x7f\ud800-\udfff]")  # and halves of characters


@dataclass
class Captioned:
    """The images of one split, in order.

    Attributes:
        names: one each, as they go to `S_ids.txt`.
        captions: five each.
    """

    names: list[str] = field(default_factory=list)
    captions: list[list[str]] = field(default_factory=list)


def image_key(name: str) -> str:
    """What all names of one image have in common.

    "COCO_val2014_000000000042.jpg", "000000000042" and "42" are "42"; of other names only the
    ending is taken away. Flickr's photographs and COCO's are never in one data set.
    """
    stem = _SUFFIX.sub("", name.strip())
    coco = _COCO_NAME.fullmatch(stem)
    digits = coco[1] if coco else stem
    return digits.lstrip("0") or "0" if digits.isascii() and digits.isdecimal() else stem


def read_karpathy(path: Path, *, restval: bool = True) -> dict[str, Captioned]:
    """Reads a file of Karpathy's splits; "val" becomes "dev", "restval" a part of "train".

    Args:
        restval: False leaves the images of "restval" out.

    Raises:
        DataError: lists every image with fewer than five captions, an empty one, an unknown split,
            or a name that another image has.
    """
    data = read_json(path, without=("tokens", "sentids"))
    images = data.get("images") if isinstance(data, dict) else None
    if not isinstance(images, list):
        raise DataError(
            f'{path}: expected an object with a list "images", as in dataset_flickr30k.json; is '
            "it the file of the splits?"
        )
    findings = Findings()
    gathered = _Gathered(path.name, findings)
    left_out = 0
    for position, image in enumerate(images):
        try:
            name, split = image["filename"], image["split"]
            raw = [sentence["raw"] for sentence in image["sentences"]]
            if not all(isinstance(text, str) for text in (name, split, *raw)):
                raise TypeError
        except (KeyError, TypeError):
            findings.add(
                "bad-json",
                path.name,
                "expected filename, split and sentences with raw texts, found another entry; "
                "download the file again",
                place=f"images[{position}]",
            )
            continue
        if split not in _SPLIT_NAMES:
            findings.add(
                "bad-json",
                path.name,
                f"expected one of {', '.join(_SPLIT_NAMES)} as split, found {split!r}; correct it",
                place=f"images[{position}] ({name})",
            )
        elif split == "restval" and not restval:
            left_out += 1
        else:
            gathered.add(_SPLIT_NAMES[split], name, raw, place=f"images[{position}]")
    if left_out:
        logger.info("%s: %d images of restval were left out", path.name, left_out)
    return gathered.finish(path)


def read_coco_captions(files: Mapping[str, Path]) -> dict[str, Captioned]:
    """Reads COCO's caption files, `captions_train2017.json` and the like, one for each split.

    Captions of an image come in the order of their annotations, images in that of the file.

    Raises:
        DataError: as `read_karpathy`, over all files.
    """
    findings = Findings()
    splits: dict[str, Captioned] = {}
    keys: dict[str, str] = {}
    for split, path in files.items():
        coco = open_coco(path)
        gathered = _Gathered(path.name, findings, keys=keys)
        for number, image in coco.imgs.items():
            raw = [str(note.get("caption", "")) for note in coco.imgToAnns.get(number, [])]
            name = str(image.get("file_name", number))
            gathered.add(split, name, raw, place=f"image {number}")
        splits |= gathered.finish(path, refuse=False)
    findings.refuse(next(iter(files.values())).parent)
    return splits


def clean_caption(raw: str) -> str:
    """One line: white space of every kind becomes a blank.

    Raises:
        ValueError: says what is wrong with the text.
    """
    text = " ".join(raw.split())
    control = _CONTROL.search(text)
    if control:
        raise ValueError(f"expected text, found the control character {control[0]!r}; remove it")
    if not any(unicodedata.category(c)[0] not in "ZCM" and c != "\ufffd" for c in text):
        raise ValueError(f"expected a caption, found {raw!r}; write one, or drop the image")
    return text


def read_json(path: Path, *, without: Iterable[str] = ()) -> Any:
    """A JSON file's content.

    Args:
        without: keys that are dropped while reading, wherever they are: of Karpathy's files the
            tokens take most of the memory.

    A byte order mark is passed over, and UTF-16 is read too: JSON says how to tell them.

    Raises:
        DataError: no such file, or not JSON.
    """
    dropped = frozenset(without)

    def kept(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        return {key: value for key, value in pairs if key not in dropped}

    try:
        with open_file(path) as file:
            _check_json(path, file)
            return json.load(file, object_pairs_hook=kept)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}; check the path.") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: expected JSON: {error}; download it again.") from None


def _check_json(path: Path, file: BinaryIO) -> None:
    """Looks at both ends of a file before all of it is read.

    Raises:
        DataError: too large, or no text.
    """
    size = os.fstat(file.fileno()).st_size
    start = file.read(64)
    file.seek(max(0, size - 64))
    end = file.read(64)
    file.seek(0)
    known = what_it_is(start)
    if known and "UTF-16" not in known:
        raise DataError(f"{path}: expected JSON, found {known}.")
    if size > _LARGEST_JSON or (size and not end.strip(b"\0")):
        raise DataError(
            f"{path}: expected JSON of at most {_LARGEST_JSON:,} bytes, found {size:,}"
            f"{' that end in zeros' if not end.strip(bytes(1)) else ''}; download it again."
        )


def open_coco(path: Path) -> Any:
    """A pycocotools COCO of an annotation file; its index is made without a word on the screen.

    Raises:
        DataError: not an annotation file of COCO.
    """
    from pycocotools.coco import COCO  # only those who need it pay for the import

    data = read_json(path, without=("segmentation", "licenses", "info"))
    coco = COCO()
    coco.dataset = data
    try:
        for part in ("images", "annotations"):
            if not isinstance(data[part], list):
                raise TypeError(part)
        with contextlib.redirect_stdout(io.StringIO()):
            coco.createIndex()
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f'{path}: expected lists "images" and "annotations" with ids, as in COCO\'s annotation '
            f"files, found none ({error!r}); is it one of those?"
        ) from None
    if len(coco.imgs) != len(data["images"]):
        raise DataError(
            f"{path}: expected every image once, found {len(data['images']):,} entries with "
            f"{len(coco.imgs):,} different ids; download it again."
        )
    return coco


class _Gathered:
    """Images as they come, each checked for its captions and its name."""

    def __init__(self, file: str, findings: Findings, *, keys: dict[str, str] | None = None):
        self._file = file
        self._findings = findings
        self._keys = {} if keys is None else keys
        self._splits: dict[str, Captioned] = {}
        self._more = 0
        self._numbers: dict[str, Counter[int]] = {}
        self._short: dict[str, list[tuple[str, int]]] = {}  # place and captions

    def add(self, split: str, name: str, raw: Sequence[str], *, place: str) -> None:
        place = f"{place} ({name})"
        key = image_key(name)
        if key in self._keys or not key or _CONTROL.search(name):
            found = f"{self._keys[key]} has it already" if key in self._keys else f"{name!r}"
            self._findings.add(
                "duplicate-id" if key in self._keys else "empty-id",
                self._file,
                f"expected a name of its own, found that {found}; drop one"
                if key in self._keys
                else f"expected an image's name, found {found}; write it",
                place=place,
            )
            return
        self._keys[key] = place
        captions = []
        for number, text in enumerate(raw[:CAPTIONS_PER_IMAGE]):
            try:
                captions.append(clean_caption(text))
            except ValueError as error:
                where = f"{place}, caption {number}"
                self._findings.add("empty-caption", self._file, str(error), place=where)
        self._numbers.setdefault(split, Counter())[len(raw)] += 1
        if len(raw) < CAPTIONS_PER_IMAGE:
            self._short.setdefault(split, []).append((place, len(raw)))
        self._more += max(0, len(raw) - CAPTIONS_PER_IMAGE)
        images = self._splits.setdefault(split, Captioned())
        images.names.append(name.strip())
        images.captions.append(captions)

    def finish(self, path: Path, *, refuse: bool = True) -> dict[str, Captioned]:
        for split, short in self._short.items():
            self._tell_short(split, short)
        if refuse:
            self._findings.refuse(path)
        if not self._splits and not self._findings:
            raise DataError(f"{path}: expected images with captions, found none; is it complete?")
        if self._more:
            logger.info(
                "%s: %d captions beyond the fifth of their image were dropped",
                self._file,
                self._more,
            )
        return {split: self._splits[split] for split in SPLITS if split in self._splits}

    def _tell_short(self, split: str, short: Sequence[tuple[str, int]]) -> None:
        """Each image with fewer than five captions, or in one line that most have fewer."""
        numbers = self._numbers[split]
        total = numbers.total()
        if 2 * len(short) > total:
            found = ", ".join(f"{images:,} with {n}" for n, images in numbers.most_common(4))
            self._findings.add(
                "caption-count",
                self._file,
                f"expected {CAPTIONS_PER_IMAGE} captions an image, the number that is supported, "
                f"found of {total:,} images of {split} {found}"
                f"{', and others' if len(numbers) > 4 else ''}",
            )
            return
        self._findings.add_rows(
            "caption-count",
            self._file,
            range(len(short)),
            lambda i: (
                short[i][0],
                f"expected {CAPTIONS_PER_IMAGE} captions, found {short[i][1]}; drop the image",
            ),
        )
