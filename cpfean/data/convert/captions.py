"""Which images a data set has, in which split, with which captions.

Read from Karpathy's split files (`dataset_flickr30k.json`, `dataset_coco.json`) or from COCO's own
caption files. Images keep the captions they have. Where most have five, as in Flickr30K and COCO,
every image gets five as in the published splits: a sixth is dropped and counted, fewer are refused.
How many are kept can also be said.
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
from typing import Any, BinaryIO, Literal, NamedTuple

from cpfean.data.caption_groups import PER_IMAGE
from cpfean.data.findings import Findings
from cpfean.data.split import SPLITS
from cpfean.errors import DataError
from cpfean.files import open_file, what_it_is

logger = logging.getLogger(__name__)

Each = int | Literal["all"] | None  # how many captions of an image are kept

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
        captions: of each image, at least one; of a gallery's images none.
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


def read_karpathy(path: Path, *, restval: bool = True, each: Each = None) -> dict[str, Captioned]:
    """Reads a file of Karpathy's splits; "val" becomes "dev", "restval" a part of "train".

    Args:
        restval: False leaves the images of "restval" out.
        each: captions of an image that are kept, the first ones; "all" keeps what there is; None
            keeps five if most images have five, else all.

    Raises:
        DataError: lists every image with fewer captions than are kept or with none, an empty
            caption, an unknown split, or a name that another image has.
    """
    data = read_json(path, without=("tokens", "sentids"))
    images = data.get("images") if isinstance(data, dict) else None
    if not isinstance(images, list):
        raise DataError(
            f'{path}: expected an object with a list "images", as in dataset_flickr30k.json; is '
            "it the file of the splits?"
        )
    findings = Findings()
    gathered = _Gathered(findings)
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
            place = f"images[{position}]"
            gathered.add(_SPLIT_NAMES[split], name, raw, file=path.name, place=place)
    if left_out:
        logger.info("%s: %d images of restval were left out", path.name, left_out)
    return gathered.finish(path, each=each)


def read_coco_captions(files: Mapping[str, Path], *, each: Each = None) -> dict[str, Captioned]:
    """Reads COCO's caption files, `captions_train2017.json` and the like, one for each split.

    Captions of an image come in the order of their annotations, images in that of the file.

    Args:
        each: as in `read_karpathy`, of the images of all files.

    Raises:
        DataError: as `read_karpathy`, over all files.
    """
    gathered = _Gathered(Findings())
    for split, path in files.items():
        coco = open_coco(path)
        for number, image in coco.imgs.items():
            raw = [str(note.get("caption", "")) for note in coco.imgToAnns.get(number, [])]
            name = str(image.get("file_name", number))
            gathered.add(split, name, raw, file=path.name, place=f"image {number}")
        if not coco.imgs:
            raise DataError(f"{path}: expected images with captions, found none; is it complete?")
    return gathered.finish(next(iter(files.values())).parent, each=each)


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


class _Image(NamedTuple):
    """An image as it came: where it is told of, and its captions, cleaned and not cut."""

    file: str
    place: str
    name: str
    captions: list[str]
    faults: dict[int, str]  # by the caption's number


class _Gathered:
    """Images as they come, each checked for its name, and at the end for its captions."""

    def __init__(self, findings: Findings) -> None:
        self._findings = findings
        self._keys: dict[str, str] = {}
        self._splits: dict[str, list[_Image]] = {}

    def add(self, split: str, name: str, raw: Sequence[str], *, file: str, place: str) -> None:
        place = f"{place} ({name})"
        key = image_key(name)
        if key in self._keys or not key or _CONTROL.search(name):
            found = f"{self._keys[key]} has it already" if key in self._keys else f"{name!r}"
            self._findings.add(
                "duplicate-id" if key in self._keys else "empty-id",
                file,
                f"expected a name of its own, found that {found}; drop one"
                if key in self._keys
                else f"expected an image's name, found {found}; write it",
                place=place,
            )
            return
        self._keys[key] = place
        image = _Image(file, place, name.strip(), [], {})
        for number, text in enumerate(raw):
            try:
                image.captions.append(clean_caption(text))
            except ValueError as error:
                image.faults[number] = str(error)
                image.captions.append("")
        self._splits.setdefault(split, []).append(image)

    def finish(self, source: Path, *, each: Each) -> dict[str, Captioned]:
        """The images of each split.

        Args:
            source: what errors are about.
            each: as in `read_karpathy`.
        """
        if not self._splits and not self._findings:
            raise DataError(f"{source}: expected images with captions, found none; is it complete?")
        images = [image for split in self._splits.values() for image in split]
        numbers = Counter(len(image.captions) for image in images)
        most_have_five = 2 * numbers[PER_IMAGE] > numbers.total()
        kept = each
        if each is None:
            kept = PER_IMAGE if most_have_five else "all"
        most = None if kept == "all" else kept
        self._check(images, most, by_majority=each is None)
        self._findings.refuse(source)
        self._tell(numbers, most)
        return {
            split: Captioned(
                names=[image.name for image in self._splits[split]],
                captions=[image.captions[:most] for image in self._splits[split]],
            )
            for split in SPLITS
            if split in self._splits
        }

    def _check(self, images: Sequence[_Image], most: int | None, *, by_majority: bool) -> None:
        """Findings for captions that are none, and for images with too few.

        Args:
            most: captions of an image that are kept; None keeps all.
            by_majority: whether that is so because most images have as many.
        """
        wanted, advice = "at least one caption", "drop the image"
        if most is not None:
            wanted = f"{most} captions{', as most images have' if by_majority else ''}"
            advice += ", or keep what each image has with --captions-each all"
        for image in images:
            for number, fault in image.faults.items():
                if most is None or number < most:
                    where = f"{image.place}, caption {number}"
                    self._findings.add("empty-caption", image.file, fault, place=where)
            found = len(image.captions)
            if found < (most or 1):
                self._findings.add(
                    "caption-count",
                    image.file,
                    f"expected {wanted}, found {found or 'none'}; {advice}",
                    place=image.place,
                )

    def _tell(self, numbers: Counter[int], most: int | None) -> None:
        """Says what was dropped, or that images have other than the usual five."""
        if most is not None:
            more = sum((n - most) * images for n, images in numbers.items() if n > most)
            if more:
                logger.info(
                    "%d captions beyond the first %d of their image were dropped; "
                    "--captions-each all keeps them",
                    more,
                    most,
                )
        elif set(numbers) != {PER_IMAGE}:
            told = ", ".join(f"{images:,} with {n}" for n, images in sorted(numbers.items())[:8])
            others = ", and others" if len(numbers) > 8 else ""
            logger.info("all captions are kept; of the images are %s%s", told, others)
