"""Tables of detected regions, a line an image, as detectors in the field write them.

Columns are separated by tabs, without a header line; numbers of the regions are base64 of
little-endian arrays (float32, labels int64):

    bottom-up attention  image_id image_w image_h num_boxes boxes features
    LXMERT               img_id img_h img_w objects_id objects_conf attrs_id attrs_conf num_boxes
                         boxes features                             (the height before the width)

A table is read twice: first for all that does not take decoding the features, so that a missing
image or a cut line is found in minutes and not after hours; then to write them.
"""

from __future__ import annotations

import binascii
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cpfean.data.convert.captions import Captioned, image_key
from cpfean.data.convert.native import LARGEST_HALF, NativeWriter, Regions, check_target
from cpfean.data.convert.objects import CocoObjects
from cpfean.data.findings import Findings
from cpfean.errors import DataError
from cpfean.progress import Progress

logger = logging.getLogger(__name__)

BOTTOM_UP = ("image_id", "image_w", "image_h", "num_boxes", "boxes", "features")
LXMERT = (
    "img_id",
    "img_h",
    "img_w",
    "objects_id",
    "objects_conf",
    "attrs_id",
    "attrs_conf",
    "num_boxes",
    "boxes",
    "features",
)
_LONGEST_LINE = 2**26  # bytes; a hundred regions of 2048 numbers take 1.1 million
_MOST_REGIONS = 10_000
_PIXEL = 1.0 + 1e-3  # as the checks of the native format


def convert_tables(
    paths: Sequence[Path],
    images: Mapping[str, Captioned],
    folder: Path,
    *,
    num_regions: int = 36,
    half: bool = False,
    vocabulary: list[str] | None = None,
    keep_labels: bool = True,
    objects: CocoObjects | None = None,
) -> None:
    """Writes tables as a folder in the native format.

    Lines about other images than those wanted are passed over.

    Args:
        paths: all of one kind; an image is in one of them, once.
        images: those wanted, by split.
        folder: to be made; must not exist.
        num_regions: stored for an image, the first by confidence where there is one; fewer if no
            image has as many. Images with fewer are padded and counted.
        half: store features as float16.
        vocabulary: names of the labels in LXMERT's tables.
        keep_labels: False leaves those labels out.
        objects: gives the regions labels instead.

    Raises:
        DataError: lists what is wrong, with file and row; nothing is left behind.
    """
    check_target(folder)
    reader = _Reader(paths, images, vocabulary, keep_labels=keep_labels, objects=objects)
    reader.survey()
    names = objects.names if objects is not None else reader.vocabulary
    writer = NativeWriter(
        folder,
        images,
        num_regions=min(num_regions, reader.most_regions),
        feature_dim=reader.feature_dim,
        half=half,
        boxes=True,
        vocabulary=names,
    )
    with writer:
        findings = Findings()
        for row, (split, position) in reader.wanted("converting"):
            try:
                regions = reader.regions(row, half=half)
            except _RowError as fault:
                if not findings:
                    logger.warning("%s; the rest is read to find all faults", fault)
                findings.add(fault.kind, row.file, str(fault), place=row.place)
                continue
            writer.write(split, position, regions)
        findings.refuse(paths[0].parent)
        writer.finish()


class _RowError(Exception):
    """What is wrong with a row; becomes a finding."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


@dataclass(frozen=True, kw_only=True, slots=True)
class _Row:
    """One line; `fields` by the names of its columns, still undecoded."""

    file: str
    number: int
    name: str
    fields: dict[str, bytes]

    @property
    def place(self) -> str:
        return f"row {self.number} ({self.name})"

    def whole(self, *names: str) -> int:
        """The number in the first of these columns that the table has."""
        name = next(name for name in names if name in self.fields)
        text = self.fields[name].strip()
        if not text.isdigit() or len(text) > 9:
            shown = text[:20].decode(errors="replace")
            raise _RowError("bad-table", f"expected a whole number as {name}, found {shown!r}")
        return int(text)

    def array(self, name: str, dtype: str, count: int) -> np.ndarray:
        """The decoded numbers of a column; `count` is how many there have to be."""
        expected = count * np.dtype(dtype).itemsize
        found = self.length(name)
        try:
            data = binascii.a2b_base64(_bare(self.fields[name]), strict_mode=True)
        except binascii.Error as error:
            raise _RowError(
                "base64", f"expected {name} as base64, found otherwise ({error}); extract it again"
            ) from None
        if len(data) != expected:
            raise _RowError(
                "base64",
                f"expected {expected:,} bytes of {name} ({count:,} of {dtype!r}), found {found:,}; "
                "is the line cut, or of another number type? Extract the image again",
            )
        return np.frombuffer(data, dtype=dtype)

    def length(self, name: str) -> int:
        """Bytes that a column holds, by the length of its text."""
        text = _bare(self.fields[name])
        return len(text) * 3 // 4 - text[-2:].count(b"=")


class _Reader:
    """Rows of all tables, and what they have in common."""

    def __init__(
        self,
        paths: Sequence[Path],
        images: Mapping[str, Captioned],
        vocabulary: list[str] | None,
        *,
        keep_labels: bool,
        objects: CocoObjects | None,
    ) -> None:
        self._paths = paths
        self._images = images
        self._places = {
            image_key(name): (split, position)
            for split, part in images.items()
            for position, name in enumerate(part.names)
        }
        self._objects = objects
        try:
            self._total = sum(path.stat().st_size for path in paths)
        except OSError as error:
            raise DataError(f"{error.filename}: cannot be read: {error.strerror}.") from None
        layouts = {path: _layout(path) for path in paths}
        self._columns = layouts[paths[0]]
        for path, columns in layouts.items():
            if columns != self._columns:
                raise DataError(
                    f"{path}: expected the columns of {paths[0]}, found {' '.join(columns)}; give "
                    "tables of one kind."
                )
        labelled = self._columns == LXMERT and keep_labels and objects is None
        if labelled and vocabulary is None:
            raise DataError(
                f"{paths[0]}: has object labels, and no vocabulary with their names was given; "
                "give it (--vocabulary objects_vocab.txt) or leave the labels out (--no-labels)."
            )
        if vocabulary is not None and not labelled:
            raise DataError(
                f"{paths[0]}: a vocabulary was given for labels that are not used: a table of "
                f"{len(self._columns)} columns; leave it out."
            )
        self.vocabulary = vocabulary if labelled else None
        self.feature_dim = 0
        self.most_regions = 0

    def survey(self) -> None:
        """First reading: everything but the features themselves.

        Raises:
            DataError: lists every fault, images without a row included.
        """
        findings = Findings()
        seen: dict[str, str] = {}
        others = 0
        for row in self._rows("looking through"):
            key = image_key(row.name)
            if key not in self._places:
                others += 1
                continue
            where = f"row {row.number} of {row.file}"
            if key in seen:
                findings.add(
                    "duplicate-id",
                    row.file,
                    f"expected every image once, found it in {seen[key]} already; drop one "
                    "(awk -F'\\t' '!seen[$1]++' keeps the first of a file)",
                    place=row.place,
                )
                continue
            seen[key] = where
            try:
                self._examine(row, key)
            except _RowError as fault:
                findings.add(fault.kind, row.file, str(fault), place=row.place)
        if not seen:
            known = next(iter(self._places), "none")
            raise DataError(
                f"{self._paths[0]}: expected the images of the captions, such as {known}, found "
                f"none of them among {others:,}; are both of one data set?"
            )
        for split, part in self._images.items():
            missing = [i for i, name in enumerate(part.names) if image_key(name) not in seen]

            def describe(i: int, split: str = split, part: Captioned = part) -> tuple[str, str]:
                return (
                    f"image {i} of {split} ({part.names[i]})",
                    "expected its features in a table, found none; extract it, or drop it from "
                    "the captions",
                )

            findings.add_rows("missing", f"{split} images", missing, describe)
        findings.refuse(self._paths[0].parent)
        if others:
            logger.info("%d rows about other images are passed over", others)

    def wanted(self, what: str) -> Iterator[tuple[_Row, tuple[str, int]]]:
        """Second reading: rows of wanted images, with split and position."""
        for row in self._rows(what):
            place = self._places.get(image_key(row.name))
            if place is not None:
                yield row, place

    def regions(self, row: _Row, *, half: bool) -> Regions:
        """A row, decoded."""
        count = row.whole("num_boxes")
        features = row.array("features", "<f4", count * self.feature_dim)
        features = features.reshape(count, self.feature_dim)
        finite = np.isfinite(features)
        if not finite.all():
            region = int(np.flatnonzero(~finite.all(axis=1))[0])
            bad = features[region][~finite[region]]
            raise _RowError(
                "not-finite",
                f"expected finite features, found {len(bad)} that are not in region {region} (the "
                f"first: {bad[0]}); extract the image again",
            )
        if half and np.abs(features).max() > LARGEST_HALF:
            raise _RowError(
                "dtype",
                f"expected features up to {LARGEST_HALF:,.0f}, the largest float16, found "
                f"{np.abs(features).max():,.0f}; convert without --half",
            )
        boxes = row.array("boxes", "<f4", count * 4).reshape(count, 4)
        labels = scores = None
        if self._objects is not None:
            labels, scores = self._objects.label(image_key(row.name), boxes)
        elif self.vocabulary is not None:
            labels = row.array("objects_id", "<i8", count)
            scores = row.array("objects_conf", "<f4", count)
        return Regions(
            features=features,
            boxes=boxes,
            size=(row.whole("image_w", "img_w"), row.whole("image_h", "img_h")),
            labels=labels,
            scores=scores,
        )

    def _examine(self, row: _Row, key: str) -> None:
        """Raises _RowError for the first thing that is wrong with a row, features left out."""
        width, height = row.whole("image_w", "img_w"), row.whole("image_h", "img_h")
        if not (width and height):
            raise _RowError(
                "no-size", f"expected a width and a height above 0, found {width} and {height}"
            )
        count = row.whole("num_boxes")
        if not 0 < count <= _MOST_REGIONS:
            raise _RowError(
                "no-regions", f"expected 1 to {_MOST_REGIONS:,} regions, found {count}; drop it"
            )
        self._examine_boxes(row.array("boxes", "<f4", count * 4).reshape(count, 4), width, height)
        length = row.length("features")
        dim, rest = divmod(length, 4 * count)
        if rest or not dim or (self.feature_dim and dim != self.feature_dim):
            expected = (
                f"{4 * count * self.feature_dim:,} bytes of features ({count} regions of "
                f"{self.feature_dim} numbers in float32, as the rows before)"
                if self.feature_dim
                else f"a multiple of {4 * count} bytes of features ({count} regions in float32)"
            )
            raise _RowError(
                "base64",
                f"expected {expected}, found {length:,}; is the line cut? Extract the image again",
            )
        if self.vocabulary is not None:
            self._examine_labels(row, count, len(self.vocabulary))
        if self._objects is not None and self._objects.size(key) != (width, height):
            size = self._objects.size(key)
            found = "no such image" if size is None else f"{size[0]} x {size[1]}"
            raise _RowError(
                "no-size",
                f"expected the image with {width} x {height} pixels in the instance files, found "
                f"{found}; give those of all images, in the resolution of the boxes",
            )
        self.feature_dim = dim
        self.most_regions = max(self.most_regions, count)

    @staticmethod
    def _examine_boxes(boxes: np.ndarray, width: int, height: int) -> None:
        finite = np.isfinite(boxes).all(axis=1)
        clipped = np.clip(boxes, 0, np.array([width, height, width, height]))
        outside = np.abs(boxes - clipped).max(axis=1) > _PIXEL
        flat = (clipped[:, 2:] <= clipped[:, :2]).any(axis=1)
        for kind, bad, expected in (
            ("box-not-finite", ~finite, "four finite numbers"),
            ("box-outside", outside, f"x1, y1, x2, y2 within {width} x {height} pixels"),
            ("box-inverted", flat, "x1 < x2 and y1 < y2 inside the image"),
        ):
            if bad.any():
                region = int(bad.argmax())
                found = ", ".join(f"{value:g}" for value in boxes[region])
                raise _RowError(
                    kind,
                    f"expected a box as {expected}, found ({found}) in region {region}; are width "
                    "and height in the order of the table's kind, and of this image?",
                )

    @staticmethod
    def _examine_labels(row: _Row, count: int, names: int) -> None:
        labels = row.array("objects_id", "<i8", count)
        if labels.min() < 0 or labels.max() >= names:
            bad = labels[(labels < 0) | (labels >= names)][0]
            raise _RowError(
                "label-range",
                f"expected labels from 0 to {names - 1}, lines of the vocabulary, found {bad}; is "
                "it the vocabulary of this detector?",
            )
        scores = row.array("objects_conf", "<f4", count)
        if not ((scores >= 0) & (scores <= 1)).all():
            bad = scores[~((scores >= 0) & (scores <= 1))][0]
            raise _RowError("score-range", f"expected confidences from 0 to 1, found {bad}")

    def _rows(self, what: str) -> Iterator[_Row]:
        progress = Progress(f"{what} {self._paths[0].parent}", total=self._total, unit="%")
        before = 0
        for path in self._paths:
            done = before
            for number, line in _lines(path):
                done += len(line)
                progress.step(done)
                # Not by the csv module: the texts hold no tab or quote, and this needs no limit on
                # the length of a field.
                fields = line.rstrip(b"\r\n").split(b"\t")
                if number == 1 and fields[0].decode(errors="replace") == self._columns[0]:
                    continue  # a header, which _layout has looked at
                if len(fields) != len(self._columns):
                    raise DataError(
                        f"{path}, row {number}: expected {len(self._columns)} columns "
                        f"({' '.join(self._columns)}), found {len(fields)}; is the file complete? "
                        "Download it again, or take the line away."
                    )
                name = fields[0].decode(errors="replace").strip()
                yield _Row(
                    file=path.name,
                    number=number,
                    name=name,
                    fields=dict(zip(self._columns, fields, strict=True)),
                )
            before = done


def _layout(path: Path) -> tuple[str, ...]:
    """The columns of a table, by their number or by its header line.

    Raises:
        DataError: neither kind.
    """
    number, line = next(_lines(path), (1, b""))
    fields = line.rstrip(b"\r\n").split(b"\t")
    for columns in (BOTTOM_UP, LXMERT):
        if len(fields) == len(columns):
            header = tuple(field.decode(errors="replace") for field in fields)
            if set(header) & set(columns) and header != columns:
                raise DataError(
                    f"{path}, row {number}: expected the columns {' '.join(columns)}, found "
                    f"{' '.join(header)[:200]}; write them in this order."
                )
            return columns
    raise DataError(
        f"{path}, row {number}: expected {len(BOTTOM_UP)} columns ({' '.join(BOTTOM_UP)}) or "
        f"{len(LXMERT)} ({' '.join(LXMERT)}), separated by tabs, found {len(fields)}; is it such a "
        "table?"
    )


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Lines with their numbers, from 1; bounded, so that no file can fill the memory."""
    try:
        with path.open("rb") as file:
            number = 0
            while line := file.readline(_LONGEST_LINE):
                number += 1
                if len(line) == _LONGEST_LINE:
                    raise DataError(
                        f"{path}, row {number}: expected lines of at most {_LONGEST_LINE:,} bytes, "
                        "found a longer one; is it a table of regions?"
                    )
                yield number, line
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}; check the disk.") from None


def _bare(text: bytes) -> bytes:
    """Base64 without the b'...' that Python 3 puts around it where the writer was Python 2's."""
    return text[2:-1] if text[:2] in (b"b'", b'b"') else text
