"""Names of objects: a detector's vocabulary, and COCO's human boxes as labels of regions."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int

from cpfean.data.convert.captions import image_key, open_coco
from cpfean.data.findings import Findings
from cpfean.data.texts import blank_end, read_lines
from cpfean.errors import DataError
from cpfean.files import is_there

NOTHING = "background"  # the label of a region that shows no annotated object
_LEAST_OVERLAP = 0.5


def read_vocabulary(path: Path) -> list[str]:
    """The names of a detector's labels, one a line; of several in a line, the first.

    Raises:
        DataError: no such file, or a line without a name.
    """
    findings = Findings()
    if not os.path.exists(path):
        link = f"a link that leads nowhere, to {os.readlink(path)}" if is_there(path) else ""
        raise DataError(f"{path}: cannot be read: {link or 'no such file'}; check the path.")
    lines = read_lines(path, findings) or []
    if not findings and not blank_end(path, lines, findings):
        names = [line.split(",")[0].strip() for line in lines]
        findings.add_rows(
            "vocabulary",
            path.name,
            [i for i, name in enumerate(names) if not name],
            lambda i: (f"line {i + 1}", "expected a label's name, found none; write it"),
        )
    if findings:
        first = findings.listed()[0]
        raise DataError(f"{path.parent / first.where}: {first.message}.")
    if not lines:
        raise DataError(f"{path}: expected one name a line, found none; is it the vocabulary?")
    return names


class CocoObjects:
    """The human boxes of COCO's instance files, and what they say about any region.

    A region gets the class of the box that it overlaps most, with the overlap (IoU) as its
    confidence, if that is 0.5 or more; else `NOTHING` with confidence 0. Features taken at the
    human boxes themselves thus get their class with confidence 1. Crowds are left out.

    Attributes:
        names: the classes in the order of their ids, then `NOTHING`.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        """Reads instance files, `instances_train2014.json` and the like, as one.

        Raises:
            DataError: not such a file, or files with different classes.
        """
        self._boxes: dict[str, Float[np.ndarray, "box 4"]] = {}  # x, y, width, height
        self._classes: dict[str, Int[np.ndarray, " box"]] = {}
        self._sizes: dict[str, tuple[int, int]] = {}
        self.names: list[str] = []
        for path in paths:
            try:
                self._read(path)
            except (KeyError, TypeError, ValueError) as error:
                raise DataError(
                    f"{path}: expected images with width and height, annotations with bbox and "
                    f"category_id, and categories, found otherwise ({error!r}); is it an instance "
                    "file of COCO?"
                ) from None

    def size(self, key: str) -> tuple[int, int] | None:
        """Width and height of an image; None for one that is in no file."""
        return self._sizes.get(key)

    def label(
        self, key: str, boxes: Float[np.ndarray, "region 4"]
    ) -> tuple[Int[np.ndarray, " region"], Float[np.ndarray, " region"]]:
        """Labels and confidences of regions given by their corners."""
        from pycocotools import mask

        labels = np.full(len(boxes), len(self.names) - 1, dtype=np.int64)
        scores = np.zeros(len(boxes), dtype=np.float32)
        human = self._boxes[key]
        if len(human):
            regions = boxes.astype(np.float64)
            regions[:, 2:] -= regions[:, :2]  # pycocotools wants x, y, width, height
            overlaps = mask.iou(regions, human, np.zeros(len(human), dtype=np.uint8))
            best = overlaps.argmax(axis=1)
            most = overlaps.max(axis=1)
            close = most >= _LEAST_OVERLAP
            labels[close] = self._classes[key][best[close]]
            # A float32 box may be a hair larger or smaller than the one it was written from.
            scores[close] = np.where(most > 1 - 1e-4, 1.0, most)[close]
        return labels, scores

    def _read(self, path: Path) -> None:
        coco = open_coco(path)
        numbers = sorted(coco.cats)
        names = [str(coco.cats[number]["name"]) for number in numbers] + [NOTHING]
        if not numbers or (self.names and names != self.names):
            raise DataError(
                f"{path}: expected {'classes' if not self.names else 'the same classes as before'}"
                f", found {len(numbers)}; give instance files of one release."
            )
        self.names = names
        for number, image in coco.imgs.items():
            key = image_key(str(image.get("file_name", number)))
            notes = [n for n in coco.imgToAnns.get(number, []) if not n.get("iscrowd")]
            boxes = np.array([note["bbox"] for note in notes], dtype=np.float64).reshape(-1, 4)
            if not (np.isfinite(boxes).all() and (boxes[:, 2:] >= 0).all()):
                raise DataError(
                    f"{path}, image {number}: expected boxes x, y, width, height, found {boxes}; "
                    "download the file again."
                )
            self._boxes[key] = boxes
            classes = [numbers.index(note["category_id"]) for note in notes]
            self._classes[key] = np.array(classes, dtype=np.int64)
            self._sizes[key] = (int(image["width"]), int(image["height"]))
