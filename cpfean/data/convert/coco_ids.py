"""COCO's ids of a split's images and captions, found in the file that its captions are from.

A data folder has names of images, which hold COCO's id, and texts. A caption's id is that of the
annotation of the same image with the same letters and digits: releases differ in case and in blanks
before a full stop. Equal captions of one image take the ids in the file's order.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any, NamedTuple

from cpfean.data.convert.captions import image_key, read_json
from cpfean.data.split import Split
from cpfean.errors import DataError

_MOST_DIGITS = 18  # of an id; COCO's names have 12


class CocoIds(NamedTuple):
    """One for each image and for each caption of a split, in its order."""

    images: list[int]
    captions: list[int]


def coco_ids(split: Split, path: Path) -> CocoIds:
    """Finds the ids.

    Args:
        split: with captions.
        path: `captions_val2014.json` or another caption file of COCO, or Karpathy's
            `dataset_coco.json`, whose `sentid` is that id.

    Raises:
        DataError: no such file, an image whose name has no id, or a caption that is not in the
            file.
    """
    known = _annotations(path)
    images = []
    for name in split.image_ids:
        key = image_key(name)
        if not key.isdecimal() or len(key) > _MOST_DIGITS:
            raise DataError(
                f"{split.name}: expected COCO's names of images, such as "
                f"COCO_val2014_000000000042.jpg or 42, found {name!r}; is it COCO?"
            )
        images.append(int(key))
    captions, lacking = [], []
    for i, text in enumerate(split.captions):
        ids = known[images[split.image_of(i)]][_letters(text)]
        if ids:
            captions.append(ids.pop(0))
        else:
            lacking.append(i)
    if lacking:
        first = lacking[0]
        raise DataError(
            f"{path}: expected all captions of {split.name}, with their ids; {len(lacking):,} of "
            f"{split.num_captions:,} are not there. The first is {split.captions[first]!r}, "
            f"caption {first}, of image {split.image_ids[split.image_of(first)]}. Give the file "
            "that they are from: dataset_coco.json or captions_val2014.json."
        )
    return CocoIds(images, captions)


def _annotations(path: Path) -> dict[int, dict[str, list[int]]]:
    """Ids by image and letters; both layers give what is empty for what is not there."""
    data = read_json(path, without=("tokens", "sentids", "info", "licenses"))
    known: dict[int, dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
    try:
        for image, text, number in _told(data):
            if type(image) is not int or type(number) is not int:  # JSON's true is an int too
                raise ValueError(f"ids must be whole numbers; got {image!r:.40} and {number!r:.40}")
            known[image][_letters(text)].append(number)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise DataError(
            f'{path}: expected "annotations" with image_id, caption and id, or "images" with '
            f"cocoid and sentences, found otherwise ({error!r}); give captions_val2014.json or "
            "dataset_coco.json."
        ) from None
    return known


def _told(data: Any) -> list[tuple[int, str, int]]:
    """Image, text and id of each caption of a file, in its order."""
    if "annotations" in data:
        return [(note["image_id"], note["caption"], note["id"]) for note in data["annotations"]]
    return [
        (image["cocoid"], sentence["raw"], sentence["sentid"])
        for image in data["images"]
        for sentence in image["sentences"]
    ]


def _letters(text: str) -> str:
    return "".join(letter for letter in text.casefold() if letter.isalnum())
