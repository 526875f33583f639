"""Tables of detected regions, a line an image, as detectors in the field write them.

Columns are separated by tabs, without a header line; numbers of the regions are base64 of
little-endian arrays (float32, labels int64), or of another type that is found by looking at them:

    bottom-up attention  image_id image_w image_h num_boxes boxes features
    LXMERT               img_id img_h img_w objects_id objects_conf attrs_id attrs_conf num_boxes
                         boxes features                             (the height before the width)

A table is read twice: first for all that does not take decoding the features, so that a missing
image or a cut line is found in minutes and not after hours; then to write them. Where an image has
several rows of which one is sound, that one is taken, and this is said.
"""

from __future__ import annotations

import binascii
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np

from cpfean import commands
from cpfean.data.boxes import (
    NATIVE,
    PIXEL,
    Layout,
    corners,
    guessed_layout,
    numbers,
    wrong_layout,
)
from cpfean.data.convert.captions import Captioned, image_key
from cpfean.data.convert.native import LARGEST_HALF, NativeWriter, Regions, check_target
from cpfean.data.convert.number_types import (
    Sample,
    described,
    feature_type,
    small_type,
    usual_width,
)
from cpfean.data.convert.objects import CocoObjects
from cpfean.data.findings import Findings
from cpfean.errors import DataError
from cpfean.files import open_file, what_it_is
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
_SAMPLED = 16  # first rows of a table, by which the types of its numbers are found
_SAMPLED_BYTES = 2**16  # of the features of each
_TRIED = 20_000  # boxes, by which their layout is guessed
_MOST_LINES = 5_000  # that a command to paste can name
_NOT_CUT = ("box-outside", "box-inverted")  # what boxes in another layout look like


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
    layout: Layout = NATIVE,
    labels_from: int = 0,
    features_as: str | None = None,
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
        layout: how the boxes are written.
        labels_from: the number of the vocabulary's first label.
        features_as: type of the features' numbers, as numpy names it; None looks at them.

    Raises:
        DataError: lists what is wrong, with file and row; nothing is left behind.
    """
    check_target(folder)
    reader = _Reader(
        paths,
        images,
        vocabulary,
        keep_labels=keep_labels,
        objects=objects,
        layout=layout,
        labels_from=labels_from,
        features_as=features_as,
    )
    reader.survey()
    if reader.most_regions > num_regions and reader.vocabulary is None and objects is None:
        logger.info(
            "the first %d of up to %d regions an image are kept; without scores nothing tells "
            "whether they are the best ones",
            num_regions,
            reader.most_regions,
        )
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


class _Types(NamedTuple):
    """Number types of one table."""

    boxes: str
    features: str
    labels: str
    scores: str


class _RowError(Exception):
    """What is wrong with a row; becomes a finding."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


@dataclass(frozen=True, kw_only=True, slots=True)
class _Row:
    """One line; `fields` by the names of its columns, still undecoded."""

    path: Path
    number: int
    offset: int
    name: str
    fields: dict[str, bytes]

    @property
    def file(self) -> str:
        return self.path.name

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

    def decoded(self, name: str) -> bytes:
        """What the base64 of a column stands for."""
        try:
            return binascii.a2b_base64(_bare(self.fields[name]), strict_mode=True)
        except binascii.Error as error:
            raise _RowError(
                "base64", f"expected {name} as base64, found otherwise ({error}); extract it again"
            ) from None

    def array(self, name: str, dtype: str, count: int) -> np.ndarray:
        """The decoded numbers of a column; `count` is how many there have to be."""
        expected = count * np.dtype(dtype).itemsize
        found = self.length(name)
        data = self.decoded(name)
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
        layout: Layout,
        labels_from: int,
        features_as: str | None,
    ) -> None:
        self._paths = paths
        self._layout = layout
        self._labels_from = labels_from
        self._features_as = features_as
        self._tried: list[tuple[np.ndarray, np.ndarray]] = []  # boxes and sizes
        self._label_range = (np.iinfo(np.int64).max, -1)
        self._images = images
        self._places = {
            image_key(name): (split, position)
            for split, part in images.items()
            for position, name in enumerate(part.names)
        }
        self._objects = objects
        self._total = 0
        known: dict[tuple[int, int], Path] = {}
        for path in paths:
            try:
                with open_file(path) as file:
                    found = os.fstat(file.fileno())
            except OSError as error:
                raise DataError(
                    f"{path}: cannot be read: {error.strerror}; check the path."
                ) from None
            self._total += found.st_size
            twin = known.setdefault((found.st_dev, found.st_ino), path)
            if twin is not path:
                raise DataError(f"{path}: is given twice, as {twin} too; leave one out.")
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
        if labels_from and not labelled:
            raise DataError(
                f"{paths[0]}: no labels of a table are used of which --labels-from could tell; "
                "leave it out."
            )
        self.vocabulary = vocabulary if labelled else None
        self.feature_dim = 0
        self.most_regions = 0
        self._used: dict[str, tuple[Path, int]] = {}
        self._types = {path: self._types_of(path) for path in paths}

    def survey(self) -> None:
        """First reading: everything but the features themselves.

        Raises:
            DataError: lists every fault, images without a row included.
        """
        findings = Findings()
        rows: dict[str, list[tuple[Path, int, int]]] = {}  # path, number and offset of each
        faults: dict[tuple[Path, int], tuple[str, _RowError]] = {}  # in the order of the rows
        others = 0
        for row in self._rows("looking through"):
            key = image_key(row.name)
            if key not in self._places:
                others += 1
                continue
            rows.setdefault(key, []).append((row.path, row.number, row.offset))
            try:
                self._examine(row, key)
            except _RowError as error:
                faults[row.path, row.number] = (row.place, error)
        if not rows:
            known = next(iter(self._places), "none")
            raise DataError(
                f"{self._paths[0]}: expected the images of the captions, such as {known}, found "
                f"none of them among {others:,}; are both of one data set?"
            )
        self._refuse_layout(findings, faults)
        self._used = {key: places[0][:2] for key, places in rows.items()}
        self._choose({key: p for key, p in rows.items() if len(p) > 1}, faults, findings)
        self._tell_labels(findings, faults)
        for (path, _), (place, fault) in faults.items():
            findings.add(fault.kind, path.name, str(fault), place=place)
        for split, part in self._images.items():
            missing = [i for i, name in enumerate(part.names) if image_key(name) not in rows]

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

    def _choose(
        self,
        repeated: Mapping[str, Sequence[tuple[Path, int, int]]],
        faults: dict[tuple[Path, int], tuple[str, _RowError]],
        findings: Findings,
    ) -> None:
        """Settles which row of an image is used that has several.

        A broken row is passed over where there is a sound one, and one of equal rows is enough;
        both are said. Sound rows that differ are faults.
        """
        passed: list[str] = []
        equal = 0
        unequal: dict[Path, list[tuple[_Row, _Row]]] = {}
        for places in repeated.values():
            sound: list[_Row] = []
            broken: list[tuple[_Row, _RowError]] = []
            for place in places:
                row = self._row_at(*place)
                known = faults.get((row.path, row.number))
                try:
                    if known is not None:
                        raise known[1]
                    self.regions(row, half=False)
                    sound.append(row)
                except _RowError as error:
                    broken.append((row, error))
            if not sound:
                continue  # what is wrong with each row is told
            self._used[image_key(sound[0].name)] = (sound[0].path, sound[0].number)
            for row, fault in broken:
                passed.append(f"{row.file}, {row.place}: {fault}")
                faults.pop((row.path, row.number), None)
            values = list(sound[0].fields.values())[1:]
            for row in sound[1:]:
                if list(row.fields.values())[1:] == values:
                    equal += 1
                else:
                    unequal.setdefault(row.path, []).append((row, sound[0]))
        if passed:
            logger.warning(
                "%d broken rows are passed over, as their images have a sound one too; the first: "
                "%s",
                len(passed),
                passed[0],
            )
        if equal:
            logger.warning("%d rows are there twice, word for word; one of each is taken", equal)
        for path, pairs in unequal.items():
            line = commands.without_lines(path, [row.number for row, _ in pairs])
            few = len(pairs) <= _MOST_LINES
            advice = f"to keep the first ones: {line}" if few else "drop one of each"
            by_number = {row.number: (row, first) for row, first in pairs}

            def describe(
                number: int,
                by_number: Mapping[int, tuple[_Row, _Row]] = by_number,
                advice: str = advice,
            ) -> tuple[str, str]:
                row, first = by_number[number]
                return (
                    row.place,
                    "expected every image once, found it with other numbers in row "
                    f"{first.number} of {first.file} already; {advice}",
                )

            findings.add_rows("duplicate-id", path.name, list(by_number), describe)

    def _refuse_layout(
        self, findings: Findings, faults: dict[tuple[Path, int], tuple[str, _RowError]]
    ) -> None:
        """One fault in place of thousands, if the boxes are written in another layout."""
        if not self._tried:
            return
        boxes, sizes = (np.concatenate(part) for part in zip(*self._tried, strict=True))
        guess = guessed_layout(boxes, sizes, self._layout)
        if guess is None:
            return
        wrong = [at for at, (_, fault) in faults.items() if fault.kind in _NOT_CUT]
        path, number = wrong[0] if wrong else (self._paths[0], 0)
        place = faults[path, number][0] if wrong else ""
        flags = commands.shell(*(guess.flags or ("--box-order", "xyxy")))
        findings.add(
            "box-format",
            path.name,
            f"{wrong_layout(guess, self._layout, boxes, sizes)}; if they are that, say so: {flags}",
            place=place,
        )
        for at in wrong:
            del faults[at]

    def _tell_labels(
        self, findings: Findings, faults: dict[tuple[Path, int], tuple[str, _RowError]]
    ) -> None:
        """One fault in place of thousands, if the labels count from another number."""
        if self.vocabulary is None:
            return
        first, (lowest, highest) = self._labels_from, self._label_range
        wrong = [at for at, (_, fault) in faults.items() if fault.kind == "label-range"]
        if wrong and lowest > first and highest == first + len(self.vocabulary):
            path, number = wrong[0]
            findings.add(
                "label-range",
                path.name,
                f"{faults[path, number][1]}; all are from {lowest} to {highest}: if they count "
                f"from {first + 1}, say so: {commands.shell('--labels-from', str(first + 1))}",
                place=faults[path, number][0],
            )
            for at in wrong:
                del faults[at]

    def wanted(self, what: str) -> Iterator[tuple[_Row, tuple[str, int]]]:
        """Second reading: rows of wanted images, with split and position."""
        for row in self._rows(what):
            key = image_key(row.name)
            if self._used.get(key) == (row.path, row.number):
                yield row, self._places[key]

    def regions(self, row: _Row, *, half: bool) -> Regions:
        """A row, decoded."""
        types = self._types[row.path]
        count = row.whole("num_boxes")
        features = row.array("features", types.features, count * self.feature_dim)
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
        if np.abs(features).max() > np.finfo(np.float32).max:
            raise _RowError(
                "dtype",
                f"expected features that float32 can hold, found {np.abs(features).max():g}; "
                "extract the image again",
            )
        if half and np.abs(features).max() > LARGEST_HALF:
            raise _RowError(
                "dtype",
                f"expected features up to {LARGEST_HALF:,.0f}, the largest float16, found "
                f"{np.abs(features).max():,.0f}; convert without --half",
            )
        size = (row.whole("image_w", "img_w"), row.whole("image_h", "img_h"))
        boxes = row.array("boxes", types.boxes, count * 4).reshape(count, 4)
        boxes = corners(boxes, np.tile(np.array(size), (count, 1)), self._layout)
        labels = scores = None
        if self._objects is not None:
            labels, scores = self._objects.label(image_key(row.name), boxes)
        elif self.vocabulary is not None:
            labels = row.array("objects_id", types.labels, count).astype(np.int64)
            labels = labels - self._labels_from
            scores = row.array("objects_conf", types.scores, count).astype(np.float32)
        return Regions(
            features=features.astype(np.float32),
            boxes=boxes.astype(np.float32),
            size=size,
            labels=labels,
            scores=scores,
        )

    def _types_of(self, path: Path) -> _Types:
        """Looks at a table's first rows; says which types its numbers have, if not the usual ones.

        Raises:
            DataError: the features look like numbers of no type.
        """
        columns = ["boxes"] if self.vocabulary is None else ["boxes", "objects_id", "objects_conf"]
        samples = []
        for row in islice(_table_rows(path, self._columns), _SAMPLED):
            try:
                count = row.whole("num_boxes")
                if not 0 < count <= _MOST_REGIONS:
                    continue
                size = max(row.whole("image_w", "img_w"), row.whole("image_h", "img_h"))
                features = row.decoded("features")
                decoded = {name: row.decoded(name) for name in columns}
            except _RowError:
                continue  # told when all rows are looked through
            whole = features[: len(features) // 8 * 8]
            samples.append(
                Sample(count, size, len(features) / count, whole[:_SAMPLED_BYTES], decoded)
            )
        if not samples:
            return _Types("<f4", "<f4", "<i8", "<f4")
        kind = self._features_as or feature_type(samples)
        if kind is None:
            raise DataError(
                f"{path}: expected features in float16, float32 or float64, found numbers that "
                f"look like features in none of them; the first row as {described(samples[0])}. "
                "Extract them again, or say what they are (--feature-type)."
            )
        types = _Types(
            boxes=small_type("boxes", samples, 4, "<f4"),
            features=kind,
            labels=small_type("objects_id", samples, 1, "<i8") if self.vocabulary else "<i8",
            scores=small_type("objects_conf", samples, 1, "<f4") if self.vocabulary else "<f4",
        )
        if not self.feature_dim:
            width = usual_width(samples) / np.dtype(kind).itemsize
            self.feature_dim = int(width) if width == int(width) else 0
        for name, found, usually in zip(
            types._fields, types, ("<f4", "<f4", "<i8", "<f4"), strict=True
        ):
            if found != usually:
                order = ", big-endian" if found[0] == ">" else ""
                logger.info(
                    "%s: the %s are numbers of type %s%s, and read as such",
                    path.name,
                    name,
                    np.dtype(found).newbyteorder("=").name,
                    order,
                )
        return types

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
        types = self._types[row.path]
        boxes = row.array("boxes", types.boxes, count * 4).reshape(count, 4)
        sizes = np.tile(np.array([width, height]), (count, 1))
        if len(self._tried) * count < _TRIED and np.isfinite(boxes).all():
            self._tried.append((boxes.astype(np.float64), sizes))
        fault = self._box_fault(boxes, sizes, width, height)
        length = row.length("features")
        kind = np.dtype(types.features)
        dim, rest = divmod(length, kind.itemsize * count)
        if rest or not dim or (self.feature_dim and dim != self.feature_dim):
            expected = (
                f"{kind.itemsize * count * self.feature_dim:,} bytes of features ({count} regions "
                f"of {self.feature_dim} numbers in {kind.name})"
                if self.feature_dim
                else f"a multiple of {kind.itemsize * count} bytes of features ({count} regions in "
                f"{kind.name})"
            )
            raise _RowError(
                "base64",
                f"expected {expected}, found {length:,}; is the line cut? Extract the image again",
            )
        if fault is not None:
            raise fault
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

    def _box_fault(
        self, written: np.ndarray, sizes: np.ndarray, width: int, height: int
    ) -> _RowError | None:
        with np.errstate(all="ignore"):  # a row may hold any bits
            boxes = corners(written, sizes, self._layout)
            finite = np.isfinite(boxes).all(axis=1)
            clipped = np.clip(boxes, 0, np.array([width, height, width, height]))
            outside = np.abs(boxes - clipped).max(axis=1) > PIXEL
        flat = (clipped[:, 2:] <= clipped[:, :2]).any(axis=1)
        for kind, bad, expected in (
            ("box-not-finite", ~finite, "four finite numbers"),
            ("box-outside", outside, f"{self._layout} within {width} x {height} pixels"),
            ("box-inverted", flat, "x1 < x2 and y1 < y2 inside the image"),
        ):
            if bad.any():
                region = int(bad.argmax())
                return _RowError(
                    kind,
                    f"expected a box as {expected}, found {numbers(written[region])} in region "
                    f"{region}; are width and height in the order of the table's kind, and of this "
                    "image?",
                )
        return None

    def _examine_labels(self, row: _Row, count: int, names: int) -> None:
        types = self._types[row.path]
        labels = row.array("objects_id", types.labels, count)
        if not np.isfinite(labels).all() or (labels != np.trunc(labels)).any():
            raise _RowError("dtype", "expected whole numbers as labels, found others")
        first, last = self._labels_from, self._labels_from + names - 1
        lowest, highest = self._label_range
        self._label_range = (min(lowest, int(labels.min())), max(highest, int(labels.max())))
        if labels.min() < first or labels.max() > last:
            bad = labels[(labels < first) | (labels > last)][0]
            raise _RowError(
                "label-range",
                f"expected labels from {first} to {last}, lines of the vocabulary, found {bad:g}; "
                "is it the vocabulary of this detector?",
            )
        scores = row.array("objects_conf", types.scores, count)
        if not ((scores >= 0) & (scores <= 1)).all():
            bad = scores[~((scores >= 0) & (scores <= 1))][0]
            raise _RowError("score-range", f"expected confidences from 0 to 1, found {bad}")

    def _rows(self, what: str) -> Iterator[_Row]:
        progress = Progress(f"{what} {self._paths[0].parent}", total=self._total, unit="%")
        before = 0
        for path in self._paths:
            for row in _table_rows(path, self._columns):
                progress.step(before + row.offset)
                yield row
            before += path.stat().st_size

    def _row_at(self, path: Path, number: int, offset: int) -> _Row:
        """Reads a row again."""
        return next(_table_rows(path, self._columns, number=number, offset=offset))


def _table_rows(
    path: Path, columns: tuple[str, ...], *, number: int = 1, offset: int = 0
) -> Iterator[_Row]:
    """Rows of a table, a header line left out.

    Args:
        number, offset: of the line to begin with.
    """
    for at, line in _lines(path, offset):
        # Not by the csv module: the texts hold no tab or quote, and this needs no limit on the
        # length of a field.
        fields = line.rstrip(b"\r\n").split(b"\t")
        header = number == 1 and fields[0].decode(errors="replace") == columns[0]
        if not header and len(fields) != len(columns):
            raise DataError(
                f"{path}, row {number}: expected {len(columns)} columns ({' '.join(columns)}), "
                f"{_otherwise(path, number, fields)}"
            )
        if not header:  # which _layout has looked at
            yield _Row(
                path=path,
                number=number,
                offset=at,
                name=fields[0].decode(errors="replace").strip(),
                fields=dict(zip(columns, fields, strict=True)),
            )
        number += 1


def _otherwise(path: Path, number: int, fields: Sequence[bytes]) -> str:
    """What a line without the right columns is."""
    if any(field.strip() for field in fields):
        return (
            f"found {len(fields)}; is the file complete? Download it again, or take the line away: "
            f"{commands.without_lines(path, [number])}"
        )
    return f"found a blank line; take it away: {commands.without_lines(path, [number])}"


def _layout(path: Path) -> tuple[str, ...]:
    """The columns of a table, by their number or by its header line.

    Raises:
        DataError: neither kind.
    """
    number = 1
    _, line = next(_lines(path), (0, b""))
    known = what_it_is(line)
    if line.startswith(b"\xef\xbb\xbf"):
        raise DataError(
            f"{path}: begins with a byte order mark; save it without: "
            f"{commands.without_first_bytes(path, 3)}"
        )
    if known:
        raise DataError(f"{path}: expected a table, a text of lines, found {known}.")
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


def _lines(path: Path, offset: int = 0) -> Iterator[tuple[int, bytes]]:
    """Lines with the places where they begin; bounded, so that no file can fill the memory."""
    try:
        with open_file(path) as file:
            file.seek(offset)
            while line := file.readline(_LONGEST_LINE):
                if len(line) == _LONGEST_LINE:
                    raise DataError(
                        f"{path}, at byte {offset:,}: expected lines of at most {_LONGEST_LINE:,} "
                        "bytes, found a longer one; is it a table of regions?"
                    )
                yield offset, line
                offset += len(line)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}; check the disk.") from None


def _bare(text: bytes) -> bytes:
    """Base64 without the b'...' that Python 3 puts around it where the writer was Python 2's."""
    return text[2:-1] if text[:2] in (b"b'", b'b"') else text
