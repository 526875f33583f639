"""COCO's ids found in annotation files of both layouts, however a release writes captions."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cpfean.data.convert.coco_ids import coco_ids
from cpfean.data.split import Split, open_split
from cpfean.errors import DataError

TEXTS = {
    42: ["A dog.", "Two dogs, running", "a dog", "One dog on a hill", "Dogs"],
    7: ["A cat.", "The cat's bed", "A Cat sleeps.", "One cat", "A dog."],
}


def notes() -> list[tuple[int, int, str]]:
    """Image, id and text of each annotation, those of the images mixed."""
    found = [(image, 100 * image + j, t) for image in TEXTS for j, t in enumerate(TEXTS[image])]
    return found[::2] + found[1::2]


def coco() -> Any:
    return {
        "annotations": [{"image_id": i, "id": n, "caption": f"{text}\n"} for i, n, text in notes()]
    }


def karpathy() -> Any:
    return {
        "images": [
            {
                "cocoid": image,
                "sentences": [
                    {"raw": t, "sentid": n, "tokens": []} for i, n, t in notes() if i == image
                ],
            }
            for image in TEXTS
        ]
    }


def split(
    folder: Path, *, names: tuple[str, str] = ("COCO_val2014_000000000042.jpg", "7")
) -> Split:
    """As SCAN's release writes captions: lower case, a blank before the full stop."""
    captions = [text.lower().replace(".", " .") for own in TEXTS.values() for text in own]
    np.save(folder / "test_ims.npy", np.ones((2, 3, 4), dtype=np.float32))
    (folder / "test_caps.txt").write_text("\n".join(captions) + "\n", encoding="utf-8")
    (folder / "test_ids.txt").write_text("\n".join(names) + "\n", encoding="utf-8")
    return open_split(folder, "test", num_regions=None)


@pytest.mark.parametrize("layout", [coco, karpathy])
def test_ids_are_found_by_image_and_letters(layout: Any, tmp_path: Path) -> None:
    file = tmp_path / "captions.json"
    file.write_text(json.dumps(layout()), encoding="utf-8")
    found = coco_ids(split(tmp_path), file)
    assert found.images == [42, 7]
    # "A dog." and "a dog" are equal in letters: the ids come in the file's order.
    assert found.captions == [4200, 4201, 4202, 4203, 4204, 700, 701, 702, 703, 704]


def test_captions_and_images_that_are_not_there_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "captions.json"
    left = coco()
    left["annotations"] = [note for note in left["annotations"] if note["id"] not in (701, 704)]
    file.write_text(json.dumps(left), encoding="utf-8")
    with pytest.raises(DataError, match=r"2 of 10 are not there.*\"the cat's bed\", caption 6, of"):
        coco_ids(split(tmp_path), file)
    with pytest.raises(DataError, match=r"COCO's names.*found 'dog.jpg'"):
        coco_ids(split(tmp_path, names=("dog.jpg", "7")), file)


@pytest.mark.parametrize(
    "data",
    [[], 3, {"images": [{"id": 1}]}, {"annotations": [{"image_id": 1, "caption": 3, "id": 1}]}],
)
def test_another_file_is_refused(data: object, tmp_path: Path) -> None:
    file = tmp_path / "captions.json"
    file.write_text(json.dumps(data), encoding="utf-8")
    with pytest.raises(DataError, match=r"give captions_val2014.json or dataset_coco.json"):
        coco_ids(split(tmp_path), file)


@pytest.mark.parametrize(
    ("note", "said"),
    [
        ({"image_id": "42", "id": 1, "caption": "a"}, "whole numbers"),
        ({"image_id": 42, "id": 7.9, "caption": "a"}, "whole numbers"),
        ({"image_id": 42, "id": True, "caption": "a"}, "whole numbers"),
        ({"image_id": 42, "id": math.inf, "caption": "a"}, "whole numbers"),
    ],
)
def test_ids_that_are_no_whole_numbers_are_refused(
    tmp_path: Path, note: dict[str, object], said: str
) -> None:
    file = tmp_path / "captions.json"
    file.write_text(json.dumps({"annotations": [note]}))
    with pytest.raises(DataError, match=said):
        coco_ids(split(tmp_path), file)


def test_a_name_of_endless_digits_is_no_name_of_coco(tmp_path: Path) -> None:
    file = tmp_path / "captions.json"
    file.write_text(json.dumps(coco()))
    with pytest.raises(DataError, match="names of images"):
        coco_ids(split(tmp_path, names=("COCO_val2014_000000000042.jpg", 5000 * "7")), file)
