"""Every refusal, and that the validator and the loader agree on what is refused."""

import gzip
import os
import shutil
import subprocess
import tempfile
import tracemalloc
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cpfean.data import split as split_module
from cpfean.data.findings import Finding
from cpfean.data.split import (
    OPTIONAL,
    REQUIRED,
    SPLITS,
    check_folder,
    data_fingerprint,
    native_files,
    open_split,
    read_captions,
    validate_folder,
)
from cpfean.errors import DataError
from tests.things import THINGS
from tests.things import put as put_thing

REAL = Path(__file__).resolve().parents[3] / "shared" / "data" / "flickr8k-regions"
Edit = Callable[[Path], object]


def array(name: str, change: Callable[[np.ndarray], object]) -> Edit:
    """Changes an array in place, or replaces it by what `change` returns."""

    def edit(folder: Path) -> None:
        values = np.load(folder / name)
        changed = change(values)
        np.save(folder / name, values if changed is None else np.asarray(changed))

    return edit


def put(name: str, place: Any, value: Any) -> Edit:
    """Puts a value into an array."""
    return array(name, lambda values: values.__setitem__(place, value))


def text(name: str, change: Callable[[str], str]) -> Edit:
    def edit(folder: Path) -> None:
        (folder / name).write_text(change((folder / name).read_text("utf-8")), "utf-8", newline="")

    return edit


def line(name: str, number: int, content: str) -> Edit:
    """Replaces a line, counted from 1."""

    def change(whole: str) -> str:
        lines = whole.split("\n")
        lines[number - 1] = content
        return "\n".join(lines)

    return text(name, change)


def content(name: str, change: Callable[[bytes], bytes]) -> Edit:
    return lambda folder: (folder / name).write_bytes(change((folder / name).read_bytes()))


def absent(*names: str) -> Edit:
    def edit(folder: Path) -> None:
        for name in names:
            (folder / name).unlink()

    return edit


def header(name: str, old: bytes, new: bytes) -> Edit:
    """Rewrites a part of an npy header, padded to the same length."""

    def change(data: bytes) -> bytes:
        start, rest = data[:128], data[128:]
        assert old in start
        changed = start.replace(old, new).rstrip(b" \n")
        return changed.ljust(127) + b"\n" + rest

    return content(name, change)


def pixels_to_shares(folder: Path) -> None:
    for split in SPLITS:
        boxes, sizes = (np.load(folder / f"{split}_{part}.npy") for part in ("boxes", "sizes"))
        np.save(folder / f"{split}_boxes.npy", boxes / np.tile(sizes, 2)[:, None])


def corners_to_extents(folder: Path) -> None:
    for split in SPLITS:
        boxes = np.load(folder / f"{split}_boxes.npy")
        boxes[..., 2:] -= boxes[..., :2]
        np.save(folder / f"{split}_boxes.npy", boxes)


def store_objects(folder: Path) -> None:
    np.save(folder / "dev_ims.npy", np.array([[1, 2], [3]], dtype=object), allow_pickle=True)


def exchange_x_and_y(folder: Path) -> None:
    for split in SPLITS:
        boxes = np.load(folder / f"{split}_boxes.npy")
        np.save(folder / f"{split}_boxes.npy", boxes[..., [1, 0, 3, 2]])


def write_ones(folder: Path) -> None:
    np.savez(folder / "dev.npz", np.ones(3))
    (folder / "dev.npz").rename(folder / "dev_ims.npy")


def never_written(folder: Path) -> None:
    shape = (2, 5, 10**11)
    with (folder / "dev_ims.npy").open("wb") as file:
        np.lib.format.write_array_header_1_0(
            file, {"descr": "<f4", "fortran_order": False, "shape": shape}
        )
        file.truncate(file.tell() + 4 * 10**12)


def images_of(split: str, numbers: Any) -> Edit:
    """Writes which image each caption describes."""
    return lambda folder: np.save(folder / f"{split}_image_of_caption.npy", np.asarray(numbers))


def captions_each(number: int) -> Edit:
    def edit(folder: Path) -> None:
        for split in SPLITS:
            images = len((folder / f"{split}_ids.txt").read_text("utf-8").splitlines())
            lines = "".join(f"number {j} of {i}\n" for i in range(images) for j in range(number))
            (folder / f"{split}_caps.txt").write_text(lines, "utf-8")

    return edit


def drop_caption(folder: Path) -> None:
    lines = (folder / "train_caps.txt").read_text("utf-8").split("\n")
    (folder / "train_caps.txt").write_text("\n".join(lines[1:]), "utf-8")


def folder_for(name: str) -> Edit:
    def edit(folder: Path) -> None:
        (folder / name).unlink()
        (folder / name).mkdir()

    return edit


def long_header(folder: Path) -> None:
    start = b"\x93NUMPY\x02\x00" + (2**32 - 1).to_bytes(4, "little")
    (folder / "dev_ims.npy").write_bytes(start + b"{" * 100)


def nested_header(folder: Path) -> None:
    nested = b"-" * 9000 + b"1\n"
    start = b"\x93NUMPY\x01\x00" + len(nested).to_bytes(2, "little")
    (folder / "dev_ims.npy").write_bytes(start + nested)


def five_unequal_rows(folder: Path) -> None:
    features = np.repeat(np.load(folder / "train_ims.npy"), 5, axis=0)
    features[7, 2, 3] += 1
    np.save(folder / "train_ims.npy", features)


nan, inf = float("nan"), float("inf")

# The fault, its kind, where it is said to be, and words of the message.
REFUSALS: dict[str, tuple[Edit, str, str, tuple[str, ...]]] = {
    "nan in a feature": (
        put("train_ims.npy", (3, 2, slice(4, 6)), nan),
        "not-finite",
        "train_ims.npy, image 3 (train3.jpg), region 2",
        ("found 2", "nan"),
    ),
    "infinity in a float16 feature": (
        array("dev_ims.npy", lambda x: np.where(x == x[1, 4, 0], -inf, x).astype(np.float16)),
        "not-finite",
        "dev_ims.npy, image 1 (dev1.jpg), region 4",
        ("found 1", "-inf"),
    ),
    "features all zero": (
        put("test_ims.npy", (1, 3), 0),
        "zero-feature",
        "test_ims.npy, image 1 (test1.jpg), region 3",
        ("zeros only", "counts file"),
    ),
    "another width in one split": (
        array("dev_ims.npy", lambda x: x[..., :6]),
        "feature-width",
        "dev_ims.npy",
        ("8 numbers", "found 6"),
    ),
    "features in double precision": (
        array("dev_ims.npy", lambda x: x.astype(np.float64)),
        "dtype",
        "dev_ims.npy",
        ("float16 or float32", "'<f8'"),
    ),
    "features in big-endian order": (
        array("dev_ims.npy", lambda x: x.astype(">f4")),
        "dtype",
        "dev_ims.npy",
        ("little-endian", "'>f4'"),
    ),
    "features in Fortran order": (
        array("dev_ims.npy", np.asfortranarray),
        "dtype",
        "dev_ims.npy",
        ("C order", "Fortran"),
    ),
    "features without a region axis": (
        array("dev_ims.npy", lambda x: x[:, 0]),
        "shape",
        "dev_ims.npy",
        ("(images, regions, feature width)", "(2, 8)"),
    ),
    "five rows an image that differ": (
        five_unequal_rows,
        "unequal-rows",
        "train_ims.npy, rows 5 to 9 of image 1 (train1.jpg)",
        ("5 equal rows", "5 captions"),
    ),
    "more regions counted than stored": (
        lambda folder: np.save(folder / "dev_counts.npy", [5, 6]),
        "region-count",
        "dev_counts.npy, image 1 (dev1.jpg)",
        ("at most the 5", "found 6"),
    ),
    "no region": (
        lambda folder: np.save(folder / "dev_counts.npy", [0, 5]),
        "no-regions",
        "dev_counts.npy, image 0 (dev0.jpg)",
        ("at least 1", "found 0"),
    ),
    "half a region": (
        lambda folder: np.save(folder / "dev_counts.npy", [2.5, nan]),
        "dtype",
        "dev_counts.npy, image 0 (dev0.jpg)",
        ("whole numbers", "2.5"),
    ),
    "a box outside its image": (
        put("train_boxes.npy", (4, 1), [0, 0, 100, 900]),
        "box-outside",
        "train_boxes.npy, image 4 (train4.jpg), region 1",
        ("(0, 0, 100, 900)", "resolution"),
    ),
    "an inverted box": (
        put("train_boxes.npy", (5, 2), [120, 20, 60, 90]),
        "box-inverted",
        "train_boxes.npy, image 5 (train5.jpg), region 2",
        ("x1 < x2", "(120, 20, 60, 90)"),
    ),
    "a box without area": (
        put("train_boxes.npy", (5, 2), [120, 20, 160, 20]),
        "box-inverted",
        "train_boxes.npy, image 5 (train5.jpg), region 2",
        ("y1 < y2",),
    ),
    "boxes as shares of the image": (
        pixels_to_shares,
        "box-format",
        "train_boxes.npy, image 0 (train0.jpg), region 0",
        ("x1, y1, x2, y2 as shares", "--scan", "--box-units shares"),
    ),
    "boxes as corner and extent": (
        corners_to_extents,
        "box-format",
        "train_boxes.npy, image 0 (train0.jpg), region 1",
        ("x, y, width, height", "--box-order xywh"),
    ),
    "y before x": (
        exchange_x_and_y,
        "box-format",
        "train_boxes.npy, image 0 (train0.jpg), region 0",
        ("nearly all boxes fit as y1, x1, y2, x2", "--scan", "--box-order yxyx"),
    ),
    "labels that count from one": (
        put("dev_labels.npy", slice(None), [1, 2, 3, 4, 7]),
        "label-range",
        "dev_labels.npy, image 0 (dev0.jpg), region 4",
        ("from 0 to 6", "found 7", "all are from 1 to 7", "--labels-from 1"),
    ),
    "one caption an image": (
        captions_each(1),
        "caption-count",
        "train_caps.txt",
        ("5 captions an image", "found 6 captions for 6 images, 1 an image"),
    ),
    "two captions an image": (
        captions_each(2),
        "caption-count",
        "train_caps.txt",
        ("found 12 captions for 6 images, 2 an image",),
    ),
    "ten captions an image": (
        captions_each(10),
        "caption-count",
        "train_caps.txt",
        ("60 captions for 6 images, 10 an image", "30 in all", "train_image_of_caption.npy"),
    ),
    "half an image": (
        images_of("dev", [0, 0, 0.5, 0, 0, 1, 1, 1, 1, nan]),
        "dtype",
        "dev_image_of_caption.npy, row 2",
        ("whole number", "found 0.5", "save integers"),
    ),
    "an image that is not a number": (
        images_of("dev", [0, 0, 0, 0, 0, 1, 1, 1, 1, nan]),
        "dtype",
        "dev_image_of_caption.npy, row 9",
        ("whole number", "found nan"),
    ),
    "images as texts": (
        images_of("dev", ["0"] * 5 + ["1"] * 5),
        "dtype",
        "dev_image_of_caption.npy",
        ("whole numbers or floats", "<U1"),
    ),
    "images in a table": (
        images_of("dev", [[0] * 5, [1] * 5]),
        "shape",
        "dev_image_of_caption.npy",
        ("(captions,)", "found (2, 5)"),
    ),
    "captions without an image": (
        images_of("dev", [0, 0, 1, 1, 1, 1, 1]),
        "caption-count",
        "dev_image_of_caption.npy, row 7 (line 8 of dev_caps.txt) is the first of which there is "
        "only a caption",
        ("10 captions of dev_caps.txt", "found 7", "one release"),
    ),
    "images without their captions": (
        images_of("dev", [0] * 5 + [1] * 6),
        "caption-count",
        "dev_image_of_caption.npy, row 10 (line 11 of dev_caps.txt) is the first of which there is "
        "only a row",
        ("10 captions of dev_caps.txt", "found 11"),
    ),
    "an image beyond the last": (
        images_of("dev", [0] * 5 + [1] * 4 + [7]),
        "image-range",
        "dev_image_of_caption.npy, row 9 (line 10 of dev_caps.txt)",
        ("a row of dev_ims.npy, from 0 to 1", "found 7"),
    ),
    "an image before the first": (
        images_of("dev", [-1] + [0] * 4 + [1] * 5),
        "image-range",
        "dev_image_of_caption.npy, row 0 (line 1 of dev_caps.txt)",
        ("from 0 to 1", "found -1"),
    ),
    "an image beyond all numbers": (
        images_of("dev", np.array([0] * 5 + [1] * 4 + [2**64 - 1], dtype=np.uint64)),
        "image-range",
        "dev_image_of_caption.npy, row 9 (line 10 of dev_caps.txt)",
        ("from 0 to 1",),
    ),
    "images that count from one": (
        images_of("dev", [1] * 5 + [2] * 5),
        "image-range",
        "dev_image_of_caption.npy, row 5 (line 6 of dev_caps.txt)",
        ("from 0 to 1, found 2", "all are from 1 to 2: subtract 1"),
    ),
    "an image without a caption": (
        images_of("train", [0] * 10 + [1] * 5 + [3] * 5 + [4] * 5 + [5] * 5),
        "no-caption",
        "train_image_of_caption.npy, image 2 (train2.jpg)",
        ("at least one caption, found none", "drop the image"),
    ),
    "captions out of order": (
        images_of("dev", [0, 1] * 5),
        "caption-order",
        "dev_image_of_caption.npy, row 2 (line 3 of dev_caps.txt)",
        ("next to each other", "row 0 behind row 1", "sort dev_caps.txt and this file"),
    ),
    "a row a caption in spite of the file": (
        lambda folder: [
            images_of("dev", [0] * 3 + [1] * 7)(folder),
            array("dev_ims.npy", lambda x: np.repeat(x, 5, axis=0))(folder),
        ],
        "image-count",
        "dev_ims.npy",
        ("one row an image, 2 by dev_ids.txt", "found 10, one a caption", "store every image once"),
    ),
    "a name too few for the file": (
        lambda folder: [
            images_of("dev", [0] * 3 + [1] * 7)(folder),
            text("dev_ids.txt", lambda whole: "dev0.jpg\n")(folder),
        ],
        "image-count",
        "dev_ids.txt",
        ("expected 2", "found 1"),
    ),
    "a blank line behind captions with a file": (
        lambda folder: [
            images_of("dev", [0] * 3 + [1] * 7)(folder),
            text("dev_caps.txt", lambda whole: whole + "\n")(folder),
        ],
        "blank-end",
        "dev_caps.txt, line 11",
        ("head -n 10 ",),
    ),
    "a blank last line": (
        text("dev_caps.txt", lambda whole: whole + "\n \n"),
        "blank-end",
        "dev_caps.txt, line 11",
        ("end at line 10", "2 blank lines", "head -n 10 "),
    ),
    "a blank line behind the names": (
        text("dev_ids.txt", lambda whole: whole + "\n"),
        "blank-end",
        "dev_ids.txt, line 3",
        ("a blank line", "head -n 2 "),
    ),
    "a blank line behind the labels' names": (
        text("objects_vocab.txt", lambda whole: whole + "\n"),
        "blank-end",
        "objects_vocab.txt, line 8",
        ("head -n 7 ",),
    ),
    "a text in UTF-16": (
        content("dev_caps.txt", lambda data: data.decode().encode("utf-16")),
        "bad-text",
        "dev_caps.txt, line 1, byte 0",
        ("UTF-16", "iconv -f UTF-16 "),
    ),
    "lines of an old Mac": (
        content("dev_caps.txt", lambda data: data.replace(b"\n", b"\r")),
        "bad-text",
        "dev_caps.txt, line 1",
        ("carriage returns", "awk "),
    ),
    "a compressed text": (
        content("dev_caps.txt", gzip.compress),
        "not-text",
        "dev_caps.txt",
        ("gzip",),
    ),
    "an archive of arrays": (
        write_ones,
        "not-npy",
        "dev_ims.npy",
        ("zip archive", "npz"),
    ),
    "a name in other letters": (
        lambda folder: (folder / "dev_ims.npy").rename(folder / "Dev_ims.npy"),
        "missing",
        "dev_ims.npy",
        ("but Dev_ims.npy", "rename"),
    ),
    "an optional file in other letters": (
        lambda folder: [
            (folder / f"{s}_scores.npy").rename(folder / f"{s}_Scores.npy") for s in SPLITS
        ],
        "missing",
        "dev_scores.npy",
        ("found dev_Scores.npy", "rename"),
    ),
    "a terabyte after the array": (
        lambda folder: os.truncate(folder / "dev_ims.npy", 2**40),
        "extra-bytes",
        "dev_ims.npy",
        ("448 bytes", "1,099,511,627,776"),
    ),
    "a file that is nearly all hole": (
        never_written,
        "truncated",
        "dev_ims.npy",
        ("hole", "copy it again"),
    ),
    "a box that is not a number": (
        put("dev_boxes.npy", (1, 0, 2), nan),
        "box-not-finite",
        "dev_boxes.npy, image 1 (dev1.jpg), region 0",
        ("finite", "nan"),
    ),
    "boxes without sizes": (
        absent(*(f"{split}_sizes.npy" for split in SPLITS)),
        "no-size",
        "train_sizes.npy",
        ("widths and heights",),
    ),
    "an image without a width": (
        put("dev_sizes.npy", (1, 0), 0),
        "no-size",
        "dev_sizes.npy, image 1 (dev1.jpg)",
        ("above 0", "(0, "),
    ),
    "a label beyond the vocabulary": (
        put("dev_labels.npy", (1, 4), 7),
        "label-range",
        "dev_labels.npy, image 1 (dev1.jpg), region 4",
        ("from 0 to 6", "found 7"),
    ),
    "a negative label": (
        put("dev_labels.npy", (0, 3), -1),
        "label-range",
        "dev_labels.npy, image 0 (dev0.jpg), region 3",
        ("found -1",),
    ),
    "half a label": (
        array("dev_labels.npy", lambda x: x + 0.5),
        "dtype",
        "dev_labels.npy, image 0 (dev0.jpg)",
        ("whole numbers",),
    ),
    "fewer rows of labels than images": (
        array("train_labels.npy", lambda x: x[:4]),
        "shape",
        "train_labels.npy, image 4 (train4.jpg) is the first without a row",
        ("(6, 5)", "(4, 5)"),
    ),
    "boxes for other regions": (
        array("train_boxes.npy", lambda x: x[:, :4]),
        "shape",
        "train_boxes.npy",
        ("(6, 5, 4)", "(6, 4, 4)"),
    ),
    "a confidence in percent": (
        put("test_scores.npy", (2, 0), 93),
        "score-range",
        "test_scores.npy, image 2 (test2.jpg), region 0",
        ("from 0 to 1", "93"),
    ),
    "a confidence that is no number": (
        put("test_scores.npy", (2, 0), nan),
        "score-range",
        "test_scores.npy, image 2 (test2.jpg), region 0",
        ("nan",),
    ),
    "an empty caption": (
        line("dev_caps.txt", 3, ""),
        "empty-caption",
        "dev_caps.txt, line 3",
        ("''",),
    ),
    "a caption of white space": (
        line("dev_caps.txt", 3, " \t\u00a0"),
        "empty-caption",
        "dev_caps.txt, line 3",
        ("expected a caption",),
    ),
    "a caption that no tokenizer sees": (
        line("dev_caps.txt", 3, "\u200b\u0301\ufffd"),
        "empty-caption",
        "dev_caps.txt, line 3",
        ("expected a caption",),
    ),
    "a caption in another encoding": (
        content("dev_caps.txt", lambda data: data.replace(b"caption", b"caf\xe9", 1)),
        "bad-text",
        "dev_caps.txt, line 1, byte 5",
        ("UTF-8", "0xe9"),
    ),
    "a byte order mark": (
        content("dev_caps.txt", lambda data: b"\xef\xbb\xbf" + data),
        "bad-text",
        "dev_caps.txt, line 1, byte 0",
        ("byte order mark",),
    ),
    "a NUL in a caption": (
        line("dev_caps.txt", 2, "caf\u00e9\0"),
        "bad-text",
        "dev_caps.txt, line 2, byte 36",
        ("control character", "\\x00"),
    ),
    "a line beyond all measure": (
        line("dev_caps.txt", 2, "long " * 200_001),
        "long-line",
        "dev_caps.txt, line 2",
        ("1,000,000",),
    ),
    "a caption too few": (
        drop_caption,
        "caption-count",
        "train_caps.txt",
        ("30 in all", "found 29", "image 5 (train5.jpg)"),
    ),
    "captions of another release": (
        text("train_caps.txt", lambda whole: whole + whole),
        "caption-count",
        "train_caps.txt",
        ("30 in all", "found 60"),
    ),
    "no captions": (
        text("train_caps.txt", lambda whole: ""),
        "caption-count",
        "train_caps.txt",
        ("found 0", "image 0 (train0.jpg)"),
    ),
    "a truncated array": (
        content("dev_ims.npy", lambda data: data[:-1]),
        "truncated",
        "dev_ims.npy",
        ("448 bytes", "found 447"),
    ),
    "bytes after the array": (
        content("dev_ims.npy", lambda data: data + b"\0"),
        "extra-bytes",
        "dev_ims.npy",
        ("448 bytes", "found 449"),
    ),
    "an empty file": (
        content("dev_ims.npy", lambda data: b""),
        "not-npy",
        "dev_ims.npy",
        ("empty file", "numpy.save"),
    ),
    "a text in place of an array": (
        content("dev_boxes.npy", lambda data: b"1 2 3 4\n"),
        "not-npy",
        "dev_boxes.npy",
        ("1 2 3 ",),
    ),
    "pickled objects": (
        store_objects,
        "pickle",
        "dev_ims.npy",
        ("never loaded",),
    ),
    "an array of texts": (
        array("dev_labels.npy", lambda x: x.astype(str)),
        "dtype",
        "dev_labels.npy",
        ("<U",),
    ),
    "a header that promises terabytes": (
        header("dev_ims.npy", b"(2, 5, 8)", b"(2000000000, 5, 8000)"),
        "truncated",
        "dev_ims.npy",
        ("320,000,000,000,128 bytes", "found 448"),
    ),
    "a header beyond 64 bits": (
        header("dev_ims.npy", b"(2, 5, 8)", b"(18446744073709551616, 5, 8)"),
        "truncated",
        "dev_ims.npy",
        ("found 448",),
    ),
    "a header with a negative axis": (
        header("dev_ims.npy", b"(2, 5, 8)", b"(-2, -5, 8)"),
        "shape",
        "dev_ims.npy",
        ("at least one", "(-2, -5, 8)"),
    ),
    "an array of nothing": (
        array("dev_ims.npy", lambda x: x[:0]),
        "shape",
        "dev_ims.npy",
        ("at least one", "(0, 5, 8)"),
    ),
    "a header that promises a long header": (
        long_header,
        "bad-header",
        "dev_ims.npy",
        ("4,294,967,295 bytes",),
    ),
    "a header that nests too deep": (
        nested_header,
        "bad-header",
        "dev_ims.npy",
        ("cannot be read",),
    ),
    "a header of another version": (
        content("dev_ims.npy", lambda data: data[:6] + b"\x07\x00" + data[8:]),
        "not-npy",
        "dev_ims.npy",
        ("1.0 or 2.0", "\\x07"),
    ),
    "a folder in place of a file": (
        folder_for("dev_ims.npy"),
        "not-npy",
        "dev_ims.npy",
        ("expected a file",),
    ),
    "a folder in place of a text": (
        folder_for("dev_caps.txt"),
        "not-text",
        "dev_caps.txt",
        ("expected a file",),
    ),
    "a missing file": (
        lambda folder: (folder / "dev_ids.txt").rename(folder / "val_ids.txt"),
        "missing",
        "dev_ids.txt",
        ("nearest: val_ids.txt",),
    ),
    "boxes in one split only": (
        absent("dev_boxes.npy", "test_boxes.npy"),
        "missing",
        "dev_boxes.npy",
        ("train_boxes.npy is there",),
    ),
    "labels without their names": (
        absent("objects_vocab.txt"),
        "vocabulary",
        "objects_vocab.txt",
        ("one a line", "no such file"),
    ),
    "a label without a name": (
        line("objects_vocab.txt", 5, ""),
        "vocabulary",
        "objects_vocab.txt, line 5",
        ("expected a label's name",),
    ),
    "an image twice in a split": (
        line("test_ids.txt", 3, "test0.jpg"),
        "duplicate-id",
        "test_ids.txt, image 2",
        ("'test0.jpg'", "image 0"),
    ),
    "a training image in the test split": (
        line("test_ids.txt", 2, "train4.jpg"),
        "leak",
        "test_ids.txt, image 1",
        ("'train4.jpg'", "image 4 of train"),
    ),
    "an id too few": (
        text("train_ids.txt", lambda whole: whole.replace("train5.jpg\n", "")),
        "image-count",
        "train_ids.txt",
        ("expected 6", "found 5"),
    ),
    "an image too few": (
        array("train_ims.npy", lambda x: x[:5]),
        "image-count",
        "train_ims.npy",
        ("expected 6", "found 5"),
    ),
    "an image without a name": (
        line("dev_ids.txt", 2, ""),
        "empty-id",
        "dev_ids.txt, line 2",
        ("image's name",),
    ),
    "five different names for an image": (
        text("dev_ids.txt", lambda whole: "".join(f"{i}.jpg\n" for i in range(10))),
        "image-count",
        "dev_ids.txt, lines 1 to 5",
        ("one line an image",),
    ),
}
# What only shows when every feature is read, or when splits are compared.
NEEDS_SCAN = {"not-finite", "zero-feature", "unequal-rows", "feature-width", "leak"}


@pytest.mark.parametrize("fault", REFUSALS)
def test_a_fault_is_refused_with_its_place_and_nothing_else_is(fault: str, folder: Path) -> None:
    edit, kind, where, words = REFUSALS[fault]
    edit(folder)
    findings = validate_folder(folder)
    assert (kind, where) in {(finding.kind, finding.where) for finding in findings}
    message = next(f.message for f in findings if (f.kind, f.where) == (kind, where))
    assert [word for word in words if word not in message] == []
    # What follows from the fault may be told as well, but no sound file is blamed.
    assert {finding.kind for finding in findings} <= {kind, "shape"}

    with pytest.raises(DataError) as refusal:
        check_folder(folder)
    assert f"{where}: {message}" in str(refusal.value)


@pytest.mark.parametrize("fault", [f for f in REFUSALS if REFUSALS[f][1] not in NEEDS_SCAN])
def test_the_loader_refuses_what_it_can_see_without_reading_features(
    fault: str, folder: Path
) -> None:
    edit, kind, where, _ = REFUSALS[fault]
    edit(folder)
    split = where.split("_")[0]
    if fault in ("boxes in one split only", "an optional file in other letters"):
        open_split(folder, split, num_regions=5)  # by itself, the split has no fault
        return
    with pytest.raises(DataError, match=kind):
        open_split(folder, split if split in SPLITS else "train", num_regions=5)


@pytest.mark.timeout(30)
@pytest.mark.parametrize("thing", THINGS)
@pytest.mark.parametrize(
    "name",
    [f"dev_{part}" for part in (*REQUIRED, *OPTIONAL)] + ["objects_vocab.txt"],
)
def test_what_is_no_file_is_named_and_never_left_out(thing: str, name: str, folder: Path) -> None:
    words = put_thing(thing, folder / name)
    told = {finding.where.split(",")[0]: finding for finding in validate_folder(folder)}
    assert told.keys() == {name}
    assert words in told[name].message
    assert told[name].kind in ("missing", "not-npy", "not-text", "long-line")
    with pytest.raises(DataError, match=name):
        open_split(folder, "dev", num_regions=5)
    if "terabytes" not in thing:
        with pytest.raises(DataError, match=name):
            data_fingerprint(folder)


def test_a_folder_that_is_none_is_refused(folder: Path, tmp_path: Path) -> None:
    for thing, (_, words) in THINGS.items():
        if thing != "a folder":
            put_thing(thing, tmp_path / "given")
            with pytest.raises(DataError, match="expected a folder") as refusal:
                check_folder(tmp_path / "given", cache_dir=tmp_path / "cache")
            assert "leads nowhere" not in words or words in str(refusal.value)


@pytest.mark.parametrize(
    "fault",
    [
        "a blank last line",
        "a blank line behind the names",
        "a blank line behind the labels' names",
        "a byte order mark",
        "a text in UTF-16",
        "lines of an old Mac",
        "boxes as corner and extent",
        "y before x",
        "features in double precision",
        "features in big-endian order",
        "features in Fortran order",
    ],
)
def test_the_command_that_is_told_mends_what_it_is_told_for(fault: str, folder: Path) -> None:
    before = open_split(folder, "train", num_regions=5)
    geometry = np.array(before.regions.geometry)
    edit, kind, _, _ = REFUSALS[fault]
    edit(folder)
    message = next(f.message for f in validate_folder(folder) if f.kind == kind)
    command = message.rsplit(": ", 1)[1]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    subprocess.run(
        ["/bin/bash", "-c", command],
        check=True,
        capture_output=True,
        cwd=Path(__file__).resolve().parents[2],
        env=environment,
    )
    mended = folder.with_name(f"{folder.name}.new") if "prepare.py" in command else folder
    assert validate_folder(mended) == []
    after = open_split(mended, "train", num_regions=5)
    assert after.captions == before.captions
    np.testing.assert_allclose(after.regions.geometry, geometry, atol=1e-6)


def whole_test(
    folder: Path, *, images: int = 2, parts: Sequence[str] = REQUIRED + OPTIONAL
) -> None:
    """Makes the test split "testall", and the first images of it "test", as in SCAN's COCO."""
    for part in parts:
        path = folder / f"test_{part}"
        if not path.exists():
            continue
        path.rename(folder / f"testall_{part}")
        if part.endswith(".npy"):
            np.save(path, np.load(folder / f"testall_{part}")[:images])
        else:
            lines = (folder / f"testall_{part}").read_text("utf-8").splitlines(keepends=True)
            path.write_text("".join(lines[: len(lines) * images // 3]), "utf-8")


def test_testall_is_the_test_split_where_it_is_there(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    captions = open_split(folder, "test", num_regions=5).captions
    first = data_fingerprint(folder)
    whole_test(folder)
    caplog.set_level("INFO", logger="cpfean.data")
    assert validate_folder(folder) == []
    assert [r.message for r in caplog.records if "testall" in r.message] == [
        "test is testall, 3 images; the smaller test_* is not used"
    ]
    opened = open_split(folder, "test", num_regions=5)
    assert (opened.name, opened.captions) == ("test", captions)
    second = data_fingerprint(folder)
    assert second != first
    (folder / "test_caps.txt").write_text("not used\n", "utf-8")
    assert data_fingerprint(folder) == second
    assert validate_folder(folder) == []
    put("testall_labels.npy", (0, 0), 99)(folder)
    wheres = [finding.where for finding in validate_folder(folder)]
    assert wheres == ["testall_labels.npy, image 0 (test0.jpg), region 0"]


@pytest.mark.parametrize("lacking", [*REQUIRED, "boxes.npy"])
def test_a_testall_that_is_not_whole_is_refused(lacking: str, folder: Path) -> None:
    whole_test(folder)
    (folder / f"testall_{lacking}").unlink()
    kinds = {finding.where: finding.kind for finding in validate_folder(folder)}
    assert kinds[f"testall_{lacking}"] == "missing"
    assert all(where.startswith("testall_") for where in kinds)


def test_a_cut_of_regions_that_need_not_be_the_best_is_told(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="cpfean.data")

    def told(**options: Any) -> list[str]:
        caplog.clear()
        assert validate_folder(folder, **options) == []
        return [r.message for r in caplog.records if "are kept" in r.message]

    assert told() == []
    (unsorted,) = told(num_regions=3)
    assert "the first 3 of up to 5 regions" in unsorted
    assert "not that of confidence" in unsorted
    for split in SPLITS:
        scores = np.load(folder / f"{split}_scores.npy")
        np.save(folder / f"{split}_scores.npy", -np.sort(-scores, axis=1))
    assert told(num_regions=3) == []
    absent(*(f"{split}_scores.npy" for split in SPLITS))(folder)
    (blind,) = told(num_regions=3)
    assert "without scores" in blind


def test_a_valid_folder_has_no_findings_and_opens(folder: Path) -> None:
    assert validate_folder(folder, num_regions=5, train_images=6) == []
    check_folder(folder)
    split = open_split(folder, "train", num_regions=5)
    assert (split.num_images, split.num_captions) == (6, 30)
    assert split.image_ids[5] == "train5.jpg"
    assert split.captions[12] == "a caption, number 2 of image 2"
    assert split.image_of(12) == 2
    assert split.image_of(np.array([4, 5, 29])).tolist() == [0, 1, 5]
    assert split.label_names is not None
    assert split.label_names[6] == "thing 6"


SIZES = {"train": [1, 7, 4, 6, 5, 10], "dev": [1, 1], "test": [10, 10, 10]}


def regrouped(folder: Path, dtype: str = "<i4") -> None:
    """Gives the images other numbers of captions, 5 nowhere."""
    for split, sizes in SIZES.items():
        lines = "".join(f"number {j} of {i}\n" for i, size in enumerate(sizes) for j in range(size))
        (folder / f"{split}_caps.txt").write_text(lines, "utf-8")
        numbers = np.repeat(np.arange(len(sizes)), sizes).astype(dtype)
        np.save(folder / f"{split}_image_of_caption.npy", numbers)


@pytest.mark.parametrize("dtype", ["<i4", "<i8", "|u1", ">i2", "<f4", "<f2"])
def test_captions_an_image_are_what_the_file_says(folder: Path, dtype: str) -> None:
    regrouped(folder, dtype)
    assert validate_folder(folder) == []
    for name, sizes in SIZES.items():
        split = open_split(folder, name, num_regions=5)
        assert split.groups.sizes.tolist() == sizes
        assert split.num_captions == sum(sizes)
        for image in range(split.num_images):
            own = [split.captions[caption] for caption in split.captions_of(image)]
            assert own == [f"number {j} of {image}" for j in range(sizes[image])]
            assert {split.image_of(caption) for caption in split.captions_of(image)} == {image}
        assert read_captions(folder, name) == split.captions
    part = open_split(folder, "train", num_regions=5, num_images=3)
    assert part.groups.sizes.tolist() == [1, 7, 4]
    assert part.captions[-1] == "number 3 of 2"
    assert read_captions(folder, "train", num_images=3) == part.captions


def test_a_split_without_the_file_has_five_captions_an_image(folder: Path) -> None:
    images_of("train", np.repeat(np.arange(6), 5))(folder)
    assert validate_folder(folder) == []
    for name in SPLITS:
        assert set(open_split(folder, name, num_regions=5).groups.sizes.tolist()) == {5}
    assert len(read_captions(folder, "dev", num_images=1)) == 5


def test_the_fingerprint_is_of_the_file_too_and_without_it_what_it_was(folder: Path) -> None:
    before = data_fingerprint(folder)
    seen = {before}
    for sizes in ([5, 5], [4, 6]):
        images_of("dev", np.repeat([0, 1], sizes))(folder)
        seen.add(data_fingerprint(folder))
    assert len(seen) == 3
    (folder / "dev_image_of_caption.npy").unlink()
    assert data_fingerprint(folder) == before


@pytest.mark.parametrize("number", [1, 2, 10])
def test_the_command_that_is_told_says_how_many_captions_there_are(
    number: int, folder: Path
) -> None:
    captions_each(number)(folder)
    findings = validate_folder(folder)
    assert [finding.kind for finding in findings] == ["caption-count"] * 3
    for finding in findings:
        command = finding.message.rsplit("write that file: ", 1)[1]
        subprocess.run(["/bin/bash", "-c", command], check=True, capture_output=True)
    assert validate_folder(folder) == []
    split = open_split(folder, "train", num_regions=5)
    assert split.groups.sizes.tolist() == [number] * 6


def test_what_a_file_that_is_broken_says_is_not_guessed(folder: Path) -> None:
    regrouped(folder)
    (folder / "train_image_of_caption.npy").write_bytes(b"numbers")
    assert [(f.kind, f.where) for f in validate_folder(folder)] == [
        ("not-npy", "train_image_of_caption.npy")
    ]


def test_a_sound_folder_is_read_again_only_after_a_change(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads = []

    def counted(*arguments: Any, **options: Any) -> list[Finding]:
        reads.append(options)
        return validate_folder(*arguments, **options)

    monkeypatch.setattr(split_module, "validate_folder", counted)
    cache = tmp_path / "new" / "cache"

    def reads_of(**options: Any) -> int:
        before = len(reads)
        check_folder(folder, cache_dir=cache, **options)
        return len(reads) - before

    assert [reads_of(), reads_of()] == [1, 0]
    assert [reads_of(num_regions=4), reads_of(num_regions=4)] == [1, 0]
    assert [reads_of(splits=("test",)), reads_of(splits=("test",))] == [1, 0]
    assert [reads_of(train_images=3), reads_of(train_images=3)] == [1, 0]
    # The same content, written again: nobody knows that before it is read.
    features = folder / "train_ims.npy"
    features.write_bytes(features.read_bytes())
    os.utime(features, ns=(0, 0))
    assert [reads_of(), reads_of()] == [1, 0]
    (folder / "notes.txt").write_text("not of the format")
    assert reads_of() == 0
    monkeypatch.setattr(split_module, "_CHECKS", split_module._CHECKS + 1)
    assert [reads_of(), reads_of()] == [1, 0]


def test_a_fault_is_told_every_time_and_as_soon_as_it_is_there(
    folder: Path, tmp_path: Path
) -> None:
    check_folder(folder, cache_dir=tmp_path)
    REFUSALS["nan in a feature"][0](folder)
    for _ in range(2):
        with pytest.raises(DataError, match="not-finite"):
            check_folder(folder, cache_dir=tmp_path)
    with pytest.raises(DataError, match="expected a folder"):
        check_folder(folder / "nowhere", cache_dir=tmp_path)
    (folder / "dev_ims.npy").unlink()
    (folder / "dev_ims.npy").mkdir()
    with pytest.raises(DataError, match="expected a file") as refusal:
        check_folder(folder, cache_dir=tmp_path)
    assert "not-finite" in str(refusal.value)


def test_all_faults_are_told_at_once(folder: Path) -> None:
    faults = ["nan in a feature", "a label beyond the vocabulary", "a NUL in a caption"]
    for fault in faults:
        REFUSALS[fault][0](folder)
    with pytest.raises(DataError) as refusal:
        check_folder(folder)
    for fault in faults:
        assert REFUSALS[fault][2] in str(refusal.value)


def test_many_faults_of_a_kind_are_counted_and_twenty_are_listed(folder: Path) -> None:
    put("train_ims.npy", slice(None), nan)(folder)
    findings = validate_folder(folder)
    assert len(findings) == 21
    assert findings[-1].where == "train_ims.npy"
    assert "10 more" in findings[-1].message
    assert "30 in all" in findings[-1].message


def test_more_regions_or_images_than_there_are_is_refused(folder: Path) -> None:
    findings = validate_folder(folder, num_regions=6, train_images=7)
    kinds = [finding.kind for finding in findings]
    assert kinds.count("too-few-regions") == 3
    assert kinds.count("too-few-images") == 1
    assert "data.num_regions to 5" in findings[-1].message
    with pytest.raises(DataError, match="too-few-regions"):
        open_split(folder, "dev", num_regions=6)
    with pytest.raises(DataError, match="too-few-images"):
        open_split(folder, "train", num_regions=5, num_images=7)


def test_missing_folder_and_missing_split_are_refused(folder: Path) -> None:
    with pytest.raises(DataError, match="expected a folder"):
        check_folder(folder / "nowhere")
    with pytest.raises(DataError, match="expected a folder"):
        open_split(folder / "nowhere", "train", num_regions=5)
    absent(*(path.name for path in folder.glob("dev_*")))(folder)
    wheres = {finding.where for finding in validate_folder(folder)}
    assert wheres == {"dev_ims.npy", "dev_caps.txt", "dev_ids.txt"}
    assert validate_folder(folder, splits=("train", "test")) == []


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85", "\f", "\v", "\x1c"])
def test_a_line_is_one_caption_whatever_separators_it_holds(folder: Path, separator: str) -> None:
    odd = f"two{separator}halves"
    line("dev_caps.txt", 4, odd)(folder)
    assert validate_folder(folder) == []
    assert open_split(folder, "dev", num_regions=5).captions[3] == odd


def test_line_ends_of_other_systems_and_a_missing_last_one_are_read(folder: Path) -> None:
    before = open_split(folder, "dev", num_regions=5)
    content("dev_caps.txt", lambda data: data.replace(b"\n", b"\r\n"))(folder)
    content("dev_ids.txt", lambda data: data.removesuffix(b"\n"))(folder)
    after = open_split(folder, "dev", num_regions=5)
    assert (after.captions, after.image_ids) == (before.captions, before.image_ids)


def test_ids_that_only_count_rows_are_no_leak(folder: Path) -> None:
    for split, images in (("train", 6), ("dev", 2), ("test", 3)):
        (folder / f"{split}_ids.txt").write_text("".join(f"{i}\n" for i in range(images)), "utf-8")
    assert validate_folder(folder) == []


def test_a_pickle_leaves_no_trace(folder: Path, tmp_path: Path) -> None:
    class Payload:
        def __reduce__(self) -> tuple[object, ...]:
            return os.mkdir, (str(tmp_path / "trace"),)

    np.save(folder / "dev_ims.npy", np.array([Payload()], dtype=object), allow_pickle=True)
    assert [finding.kind for finding in validate_folder(folder)] == ["pickle"]
    assert not (tmp_path / "trace").exists()
    np.load(folder / "dev_ims.npy", allow_pickle=True)
    assert (tmp_path / "trace").exists()  # the payload would have worked


def test_training_images_are_the_first_ones(folder: Path) -> None:
    whole = open_split(folder, "train", num_regions=5)
    part = open_split(folder, "train", num_regions=5, num_images=2)
    assert (part.num_images, part.num_captions) == (2, 10)
    assert part.captions == whole.captions[:10]
    assert part.image_ids == whole.image_ids[:2]
    np.testing.assert_array_equal(part.regions.features, whole.regions.features[:2])
    assert part.regions.iou is not None
    assert part.regions.iou.shape == (2, 5, 5)


def test_the_fingerprint_changes_with_the_data_and_with_nothing_else(folder: Path) -> None:
    first = data_fingerprint(folder)
    (folder / "README.md").write_text("not data", "utf-8")
    assert data_fingerprint(folder) == first
    put("train_ims.npy", (5, 4, 7), 0.5)(folder)
    second = data_fingerprint(folder)
    line("test_caps.txt", 1, "another caption")(folder)
    assert len({first, second, data_fingerprint(folder)}) == 3


def test_the_fingerprint_of_a_large_file_sees_its_size_and_both_ends(folder: Path) -> None:
    large = np.zeros((600, 100, 80), dtype=np.float32)  # 19 MB
    seen = set()
    for place in (None, (0, 0, 0), (599, 99, 79)):
        changed = large.copy()
        if place is not None:
            changed[place] = 1
        np.save(folder / "train_ims.npy", changed)
        seen.add(data_fingerprint(folder))
    np.save(folder / "train_ims.npy", large[:-1])
    assert len(seen | {data_fingerprint(folder)}) == 4


@st.composite
def byte_edits(draw: st.DrawFn) -> tuple[int, list[tuple[str, float, bytes]]]:
    """A file, by number, and changes to its bytes: at a place from 0 to 1."""
    # Half of all places are in the first hundredth: npy headers are where it gets interesting.
    place = st.one_of(st.floats(0, 1), st.floats(0, 0.1))
    values = st.one_of(
        st.binary(min_size=1, max_size=4),
        st.sampled_from([b"9", b"-", b"(", b"O", b"'", b"\n", b"\xff\xff\xff\xff", b"\0" * 8]),
    )
    kinds = st.sampled_from(["replace", "replace", "insert", "cut", "repeat"])
    edits = st.lists(st.tuples(kinds, place, values), min_size=1, max_size=4)
    return draw(st.integers(0, 100)), draw(edits)


@settings(max_examples=150)
@given(edit=byte_edits())
def test_any_bytes_end_in_a_refusal_or_in_data_that_opens(
    edit: tuple[int, list[tuple[str, float, bytes]]],
    new_folder: Callable[[Path], Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    number, changes = edit
    folder = Path(tempfile.mkdtemp(dir=tmp_path_factory.getbasetemp())) / "data"
    new_folder(folder)
    if number % 2:
        regrouped(folder)
    files = native_files(folder)
    path = files[number % len(files)]
    data = bytearray(path.read_bytes())
    for kind, place, value in changes:
        at = int(place * len(data))
        if kind == "cut":
            del data[at:]
        elif kind == "repeat":
            data += data[at:]
        else:
            data[at : at + (len(value) if kind == "replace" else 0)] = value
    path.write_bytes(data)

    tracemalloc.start()
    findings = validate_folder(folder)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 32 * 2**20
    for split in SPLITS:
        try:
            opened = open_split(folder, split, num_regions=3)
        except DataError:
            assert findings  # what the loader refuses, the validator does not accept
        else:
            assert np.asarray(opened.regions.features).shape[1] == 3
    shutil.rmtree(folder.parent)


@pytest.mark.skipif(not REAL.is_dir(), reason="the real data set is not on this machine")
def test_the_real_data_set_is_sound() -> None:
    assert validate_folder(REAL, num_regions=36) == []
    split = open_split(REAL, "train", num_regions=24)
    assert (split.num_images, split.num_captions) == (3800, 19000)
    assert split.regions.features.shape == (3800, 24, 256)
    assert split.regions.features.dtype == np.float16
