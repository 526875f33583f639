"""Every converter, on small files in the very formats of the releases, and what each refuses."""

import base64
import csv
import json
import os
import re
import subprocess
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cpfean.data.boxes import ORDERS, UNITS, Layout
from cpfean.data.convert import native, tables
from cpfean.data.convert.captions import (
    Captioned,
    clean_caption,
    image_key,
    read_coco_captions,
    read_karpathy,
)
from cpfean.data.convert.native import Regions
from cpfean.data.convert.number_types import Sample, feature_type
from cpfean.data.convert.objects import NOTHING, CocoObjects, read_vocabulary
from cpfean.data.convert.precomp import convert_precomp
from cpfean.data.convert.tables import BOTTOM_UP, LXMERT, convert_tables
from cpfean.data.split import open_split, validate_folder
from cpfean.errors import DataError
from tests.things import THINGS
from tests.things import put as put_thing

WIDTH, HEIGHT = 500, 333
REGIONS, DIM = 6, 8
NAMES = ["person", "dog", "wooden table", "sky"]
Entry = dict[str, Any]


def number(split: str, i: int) -> int:
    return {"train": 1000, "restval": 4000, "val": 2000, "test": 3000}[split] + i


def photos() -> list[tuple[str, int]]:
    """Split and number of every image, mixed as in the released files."""
    counts = {"train": 4, "val": 2, "test": 3, "restval": 2}
    found = [(split, number(split, i)) for split, n in counts.items() for i in range(n)]
    return found[::2] + found[1::2]


def karpathy(*, coco: bool = False) -> Entry:
    """An object as in dataset_coco.json or dataset_flickr30k.json."""
    images = []
    for position, (split, photo) in enumerate(photos()):
        raw = [f"Caption {j} of photo {photo}." for j in range(6 if photo == 1001 else 5)]
        sentences = [
            {
                "tokens": text.lower().rstrip(".").split(),
                "raw": text,
                "imgid": position,
                "sentid": j,
            }
            for j, text in enumerate(raw, start=5 * position)
        ]
        image: Entry = {
            "sentids": [sentence["sentid"] for sentence in sentences],
            "imgid": position,
            "sentences": sentences,
            "split": split,
            "filename": f"{photo}.jpg",
        }
        if coco:
            folder = "train2014" if split == "train" else "val2014"
            image |= {
                "filepath": folder,
                "filename": f"COCO_{folder}_{photo:012d}.jpg",
                "cocoid": photo,
            }
        images.append(image)
    return {"images": images, "dataset": "coco" if coco else "flickr30k"}


def save_json(path: Path, data: object) -> Path:
    path.write_text(json.dumps(data), encoding="utf-8")
    return path


def detections(photo: int, *, regions: int = REGIONS) -> Entry:
    """What a detector says of a photo; everything follows from its number."""
    rng = np.random.default_rng(photo)
    corners = np.sort(rng.random((regions, 2, 2)), axis=1)
    corners[0] = [[0, 0], [1, 1]]
    return {
        "width": WIDTH,
        "height": HEIGHT,
        "boxes": (corners * [WIDTH, HEIGHT]).reshape(regions, 4).astype("<f4"),
        "features": rng.random((regions, DIM)).astype("<f4"),
        "labels": rng.integers(0, len(NAMES), regions).astype("<i8"),
        "scores": rng.permutation(regions).astype("<f4") / regions,
    }


def coded(array: np.ndarray) -> str:
    return base64.b64encode(array.tobytes()).decode()


def line(name: str, found: Entry, columns: tuple[str, ...]) -> Entry:
    """A row of a table by column."""
    count = len(found["boxes"])
    both = {
        "num_boxes": count,
        "boxes": coded(found["boxes"]),
        "features": coded(found["features"]),
    }
    if columns == BOTTOM_UP:
        return both | {"image_id": name, "image_w": found["width"], "image_h": found["height"]}
    return both | {
        "img_id": name,
        "img_h": found["height"],
        "img_w": found["width"],
        "objects_id": coded(found["labels"]),
        "objects_conf": coded(found["scores"]),
        "attrs_id": coded(np.zeros(count, "<i8")),
        "attrs_conf": coded(np.zeros(count, "<f4")),
    }


def write_table(
    path: Path,
    columns: tuple[str, ...],
    *,
    name: Callable[[int], str] = str,
    change: Callable[[list[Entry]], object] | None = None,
    regions: Callable[[int], int] = lambda photo: REGIONS,
) -> Path:
    """All photos and one of another data set, by csv.DictWriter, as the detectors do."""
    shown = [photo for _, photo in photos()] + [77]
    rows = [line(name(p), detections(p, regions=regions(p)), columns) for p in sorted(shown)]
    if change:
        change(rows)
    with path.open("w", newline="") as file:
        csv.DictWriter(file, fieldnames=columns, delimiter="\t").writerows(rows)
    return path


def same(folder: Path, *, half: bool = False, names: list[str] | None = None) -> None:
    """The folder holds what the detector said, the best regions first."""
    for split in ("train", "dev", "test"):
        opened = open_split(folder, split, num_regions=REGIONS)
        boxes = np.load(folder / f"{split}_boxes.npy")
        for row, image in enumerate(opened.image_ids):
            found = detections(int(image_key(image)))
            order = np.arange(REGIONS) if names is None else np.argsort(-found["scores"])
            features = found["features"][order].astype("<f2" if half else "<f4")
            np.testing.assert_array_equal(opened.regions.features[row], features)
            np.testing.assert_array_equal(boxes[row], found["boxes"][order])
            captions = opened.captions[5 * row : 5 * row + 5]
            photo = image_key(image)
            assert captions == [f"Caption {j} of photo {photo}." for j in range(5)]
            if names is not None:
                assert opened.regions.labels is not None
                assert opened.regions.confidences is not None
                np.testing.assert_array_equal(opened.regions.labels[row], found["labels"][order])
                confidences = opened.regions.confidences[row]
                np.testing.assert_array_equal(confidences, found["scores"][order])
        assert opened.label_names == names
        sizes = np.load(folder / f"{split}_sizes.npy")
        assert (sizes == [WIDTH, HEIGHT]).all()


@pytest.fixture
def flickr(tmp_path: Path) -> Path:
    return save_json(tmp_path / "dataset_flickr30k.json", karpathy())


# Karpathy's file, COCO's, and captions


def test_karpathys_splits_keep_their_order_and_five_captions(flickr: Path) -> None:
    images = read_karpathy(flickr)
    assert list(images) == ["train", "dev", "test"]
    order = [photo for split, photo in photos() if split in ("train", "restval")]
    assert images["train"].names == [f"{photo}.jpg" for photo in order]
    assert all(len(five) == 5 for part in images.values() for five in part.captions)
    without = read_karpathy(flickr, restval=False)
    assert without["train"].names == [f"{photo}.jpg" for photo in order if photo < 4000]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda d: d["images"][3]["sentences"].pop(), ("images[3]", "expected 5", "found 4")),
        (
            lambda d: d["images"][2]["sentences"][1].update(raw=" \n\t"),
            ("images[2]", "caption 1", "expected a caption"),
        ),
        (
            lambda d: d["images"][2]["sentences"][1].update(raw="a\x00b"),
            ("images[2]", "control character"),
        ),
        (
            lambda d: d["images"][2].update(filename=d["images"][1]["filename"]),
            ("images[2]", "images[1]", "duplicate-id"),
        ),
        (lambda d: d["images"][5].update(split="valid"), ("images[5]", "'valid'", "restval")),
        (lambda d: d["images"][5].pop("sentences"), ("images[5]", "sentences")),
        (lambda d: d["images"].__setitem__(0, 7), ("images[0]",)),
        (lambda d: d.pop("images"), ('"images"',)),
        (lambda d: d["images"].clear(), ("found none",)),
    ],
)
def test_a_fault_in_karpathys_file_is_refused_with_the_image(
    change: Callable[[Entry], object], words: tuple[str, ...], tmp_path: Path
) -> None:
    data = karpathy()
    change(data)
    with pytest.raises(DataError) as refusal:
        read_karpathy(save_json(tmp_path / "splits.json", data))
    assert "splits.json" in str(refusal.value)
    assert [word for word in words if word not in str(refusal.value)] == []


@pytest.mark.parametrize("content", [b"", b"{", b"\xff", b"[" * 100_000])
def test_what_is_no_json_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "splits.json").write_bytes(content)
    with pytest.raises(DataError, match=r"splits\.json"):
        read_karpathy(tmp_path / "splits.json")
    with pytest.raises(DataError, match=r"nowhere\.json"):
        read_karpathy(tmp_path / "nowhere.json")


@pytest.mark.parametrize(
    ("names", "key"),
    [
        (("COCO_val2014_000000000042.jpg", "COCO_val2014_000000000042", "000000000042.jpg"), "42"),
        (("42", "42.jpg", " 042.PNG"), "42"),
        (("1000268201_693b08cb0e.jpg", "1000268201_693b08cb0e"), "1000268201_693b08cb0e"),
        (("0", "000.jpeg"), "0"),
    ],
)
def test_all_names_of_an_image_have_one_key(names: tuple[str, ...], key: str) -> None:
    assert {image_key(name) for name in names} == {key}


@given(text=st.text(max_size=30))
def test_a_caption_becomes_one_line_of_the_same_words_or_is_refused(text: str) -> None:
    try:
        cleaned = clean_caption(text)
    except ValueError:
        return
    assert cleaned.split() == text.split()
    assert "\n" not in cleaned
    assert clean_caption(cleaned) == cleaned


def coco_files(folder: Path) -> tuple[dict[str, Path], list[Path]]:
    """Caption and instance files as COCO's, with images of every split in each pair."""
    captions, instances = {}, []
    categories = [{"id": 18, "name": "dog"}, {"id": 1, "name": "person"}]
    for split, ours in (("train", "train"), ("val", "dev"), ("test", "test")):
        shown = [photo for s, photo in photos() if s == split]
        images = [
            {"id": p, "file_name": f"{p:012d}.jpg", "width": WIDTH, "height": HEIGHT} for p in shown
        ]
        notes = [
            {"id": 10 * p + j, "image_id": p, "caption": f"Caption {j} of photo {p}.\n"}
            for j in range(6)
            for p in shown
            if j < 5 or p == shown[-1]
        ]
        written = {"info": {}, "licenses": [], "images": images, "annotations": notes}
        captions[ours] = save_json(folder / f"captions_{split}2017.json", written)
        boxes = []
        for p in shown[1:]:  # the first one has no annotated object
            for j, (x1, y1, x2, y2) in enumerate(detections(p)["boxes"].tolist()[:3]):
                boxes.append(
                    {
                        "id": 10 * p + j,
                        "image_id": p,
                        "category_id": (1, 18, 1)[j],
                        "bbox": [x1, y1, x2 - x1, y2 - y1],
                        "iscrowd": int(j == 2),
                        "segmentation": [],
                    }
                )
        written = {"images": images, "annotations": boxes, "categories": categories}
        instances.append(save_json(folder / f"instances_{split}2017.json", written))
    return captions, instances


def test_cocos_captions_come_by_split_with_the_sixth_dropped(tmp_path: Path) -> None:
    captions, _ = coco_files(tmp_path)
    images = read_coco_captions(captions)
    assert list(images) == ["train", "dev", "test"]
    assert images["dev"].names == ["000000002000.jpg", "000000002001.jpg"]
    assert images["dev"].captions[1] == [f"Caption {j} of photo 2001." for j in range(5)]
    with pytest.raises(DataError, match="has it already"):
        read_coco_captions({"train": captions["train"], "dev": captions["train"]})


@pytest.mark.parametrize(
    "data",
    [
        [],
        {"images": 3, "annotations": []},
        {"images": [{}], "annotations": []},
        {"images": [{"id": 1}, {"id": 1}], "annotations": []},
        {"images": [{"id": 1}], "annotations": []},
    ],
)
def test_another_file_than_cocos_is_refused(data: object, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"notes\.json"):
        read_coco_captions({"train": save_json(tmp_path / "notes.json", data)})


# Tables


def test_a_table_of_bottom_up_attention_becomes_a_folder(flickr: Path, tmp_path: Path) -> None:
    table = write_table(tmp_path / "flickr30k.tsv", BOTTOM_UP)
    convert_tables([table], read_karpathy(flickr), tmp_path / "new" / "data")
    assert validate_folder(tmp_path / "new" / "data", num_regions=REGIONS) == []
    same(tmp_path / "new" / "data")
    assert not (tmp_path / "new" / "data" / "train_counts.npy").exists()
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["data"]


def test_tables_of_lxmert_have_the_height_first_and_bring_labels(tmp_path: Path) -> None:
    images = read_karpathy(save_json(tmp_path / "dataset_coco.json", karpathy(coco=True)))
    whole = write_table(
        tmp_path / "whole.tsv", LXMERT, name=lambda p: f"COCO_train2014_{p:012d}"
    ).read_bytes()
    lines = whole.splitlines(keepends=True)
    for part in (0, 1):
        (tmp_path / f"part{part}.tsv").write_bytes(b"".join(lines[part::2]))
    parts = [tmp_path / "part0.tsv", tmp_path / "part1.tsv"]
    convert_tables(parts, images, tmp_path / "data", vocabulary=NAMES, half=True)
    assert validate_folder(tmp_path / "data") == []
    same(tmp_path / "data", half=True, names=NAMES)
    assert np.load(tmp_path / "data" / "train_ims.npy").dtype == np.float16


def test_labels_can_be_left_out_and_are_not_left_out_silently(flickr: Path, tmp_path: Path) -> None:
    images = read_karpathy(flickr)
    table = write_table(tmp_path / "a.tsv", LXMERT)
    with pytest.raises(DataError, match="--no-labels"):
        convert_tables([table], images, tmp_path / "data")
    convert_tables([table], images, tmp_path / "data", keep_labels=False)
    assert not (tmp_path / "data" / "train_labels.npy").exists()
    bare = write_table(tmp_path / "b.tsv", BOTTOM_UP)
    with pytest.raises(DataError, match="leave it out"):
        convert_tables([bare], images, tmp_path / "other", vocabulary=NAMES)
    with pytest.raises(DataError, match="one kind"):
        convert_tables([bare, table], images, tmp_path / "other")


def test_images_with_fewer_regions_are_padded_and_those_with_more_are_cut(
    flickr: Path, tmp_path: Path
) -> None:
    count = {1000: 2, 3001: 9}
    table = write_table(tmp_path / "a.tsv", BOTTOM_UP, regions=lambda p: count.get(p, REGIONS))
    convert_tables([table], read_karpathy(flickr), tmp_path / "data", num_regions=7)
    train = open_split(tmp_path / "data", "train", num_regions=7)
    test = open_split(tmp_path / "data", "test", num_regions=7)
    assert train.regions.counts[train.image_ids.index("1000.jpg")] == 2
    assert not train.regions.features[train.image_ids.index("1000.jpg"), 2:].any()
    row = test.image_ids.index("3001.jpg")
    assert test.regions.counts[row] == 7
    expected = detections(3001, regions=9)["features"][:7]
    np.testing.assert_array_equal(test.regions.features[row], expected)
    convert_tables([table], read_karpathy(flickr), tmp_path / "most", num_regions=50)
    assert np.load(tmp_path / "most" / "dev_ims.npy").shape == (2, 9, DIM)


def test_header_lines_and_texts_of_python_2_writers_are_read(flickr: Path, tmp_path: Path) -> None:
    def as_written_by_str(rows: list[Entry]) -> None:
        for row in rows:
            row["features"] = f"b'{row['features']}'"
        rows.insert(0, dict(zip(BOTTOM_UP, BOTTOM_UP, strict=True)))

    table = write_table(tmp_path / "a.tsv", BOTTOM_UP, change=as_written_by_str)
    convert_tables([table], read_karpathy(flickr), tmp_path / "data")
    same(tmp_path / "data")


def put(row: int, **values: object) -> Callable[[list[Entry]], object]:
    return lambda rows: rows[row].update(values)


def with_feature(value: float) -> str:
    features = detections(1000)["features"]
    features[2, 3] = value
    return coded(features)


def with_box(*box: float) -> str:
    boxes = detections(1000)["boxes"]
    boxes[4] = box
    return coded(boxes)


ones = np.ones(REGIONS)
# Row 1, counted from 0, is image 1000: row 2 of the file.
REFUSALS: dict[str, tuple[Callable[[list[Entry]], object], tuple[str, ...]]] = {
    "nan in a feature": (
        put(1, features=with_feature(float("nan"))),
        ("row 2 (1000)", "not-finite", "region 2", "nan"),
    ),
    "infinity in a feature": (put(1, features=with_feature(np.inf)), ("not-finite", "inf")),
    "a cut line": (
        lambda rows: rows[1].update(features=rows[1]["features"][:-8]),
        ("row 2 (1000)", "192 bytes of features", "6 regions of 8 numbers", "found 186", "cut"),
    ),
    "features of another width": (
        put(3, features=coded(np.ones((REGIONS, DIM + 1), "<f4"))),
        ("row 4 (1002)", "192 bytes", "216"),
    ),
    "what is no base64": (
        lambda rows: rows[1].update(features="?" + rows[1]["features"][1:]),
        ("row 2 (1000)", "base64"),
    ),
    "boxes in double precision": (
        put(1, boxes=coded(np.ones((REGIONS, 4)))),
        ("row 2 (1000)", "96 bytes of boxes", "192"),
    ),
    "an image twice, with other numbers": (
        lambda rows: rows.append(rows[1] | {"features": rows[2]["features"]}),
        ("duplicate-id", "row 2 of a.tsv", "row 13 (1000)"),
    ),
    "images without features": (
        lambda rows: rows.__delitem__(slice(1, 3)),
        ("missing", "of train (1000.jpg)", "of train (1001.jpg)", "2 faults"),
    ),
    "a box outside of the image": (
        put(1, boxes=with_box(0, 0, 100, 400)),
        ("row 2 (1000)", "box-outside", "(0, 0, 100, 400)", "region 4", "500 x 333"),
    ),
    "a box upside down": (put(1, boxes=with_box(9, 80, 100, 40)), ("box-inverted", "region 4")),
    "a box that is none": (put(1, boxes=with_box(0, 0, 1, np.nan)), ("box-not-finite", "nan")),
    "width and height exchanged": (
        put(1, img_w=HEIGHT, img_h=WIDTH),
        ("row 2 (1000)", "box-outside", "order"),
    ),
    "an image without size": (put(1, img_w=0), ("row 2 (1000)", "no-size")),
    "a size that is no number": (put(1, img_h="?"), ("row 2 (1000)", "whole number", "img_h")),
    "no region": (
        put(1, num_boxes=0, boxes="", features="", objects_id="", objects_conf=""),
        ("no-regions",),
    ),
    "a number of regions beyond all measure": (put(1, num_boxes=10**8), ("no-regions",)),
    "a label beyond the vocabulary": (
        put(1, objects_id=coded(np.arange(REGIONS, dtype="<i8"))),
        ("row 2 (1000)", "label-range", "from 0 to 3", "found 4"),
    ),
    "a negative label": (put(1, objects_id=coded(-ones.astype("<i8"))), ("label-range", "-1")),
    "labels of four bytes": (
        put(1, objects_id=coded(np.zeros(REGIONS, "<i4"))),
        ("row 2 (1000)", "48 bytes of objects_id", "24"),
    ),
    "a confidence in percent": (put(1, objects_conf=coded(93 * ones.astype("<f4"))), ("score",)),
    "another data set": (
        lambda rows: [row.update(img_id=f"x{row['img_id']}") for row in rows],
        ("found none of them among 12",),
    ),
}


@pytest.mark.parametrize("fault", REFUSALS)
def test_a_fault_in_a_table_is_refused_by_row_and_leaves_nothing(
    fault: str, flickr: Path, tmp_path: Path
) -> None:
    change, words = REFUSALS[fault]
    table = write_table(tmp_path / "a.tsv", LXMERT, change=change)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(DataError) as refusal:
        convert_tables([table], read_karpathy(flickr), tmp_path / "data", vocabulary=NAMES)
    assert [word for word in words if word not in str(refusal.value)] == []
    assert sorted(tmp_path.iterdir()) == before


def test_all_faults_of_a_table_are_told_at_once(flickr: Path, tmp_path: Path) -> None:
    def change(rows: list[Entry]) -> None:
        rows[1].update(num_boxes="six")
        rows[2].update(boxes="")
        del rows[4]

    table = write_table(tmp_path / "a.tsv", BOTTOM_UP, change=change)
    with pytest.raises(DataError, match="3 faults"):
        convert_tables([table], read_karpathy(flickr), tmp_path / "data")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", ("row 1", "6 columns", "10")),
        (b"1000\t500\t333\n", ("row 1", "found 3")),
        (b"a\tb\tc\td\te\tf\n1\t2\t3\n", ("row 2", "expected 6 columns", "found 3")),
        (b"image_h\timage_w\timage_id\tnum_boxes\tboxes\tfeatures\n", ("in this order",)),
        (b"\0" * 10_000, ("row 1", "found 1")),
        (b"\xff\t\xfe\t\xff\t\t\t\n", ("none of them",)),
        (b"\xef\xbb\xbf1000\t500", ("byte order mark", "tail -c +4 ")),
        (b"\x1f\x8b\x08", ("gzip",)),
        (b"\x89HDF\r\n\x1a\n", ("HDF5",)),
        (b"PK\x03\x04", ("zip",)),
    ],
)
def test_what_is_no_table_is_refused(
    content: bytes, words: tuple[str, ...], flickr: Path, tmp_path: Path
) -> None:
    (tmp_path / "a.tsv").write_bytes(content)
    with pytest.raises(DataError) as refusal:
        convert_tables([tmp_path / "a.tsv"], read_karpathy(flickr), tmp_path / "data")
    assert [word for word in ("a.tsv", *words) if word not in str(refusal.value)] == []


def test_an_endless_line_or_a_missing_table_is_refused(
    flickr: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = write_table(tmp_path / "a.tsv", BOTTOM_UP)
    monkeypatch.setattr(tables, "_LONGEST_LINE", 100)
    with pytest.raises(DataError, match="at most 100 bytes"):
        convert_tables([table], read_karpathy(flickr), tmp_path / "data")
    with pytest.raises(DataError, match=r"b\.tsv: cannot be read"):
        convert_tables([tmp_path / "b.tsv"], read_karpathy(flickr), tmp_path / "data")


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(position=st.integers(0, 10**9), patch=st.binary(min_size=1, max_size=12))
def test_any_damage_to_a_table_ends_in_a_folder_or_a_refusal(
    position: int, patch: bytes, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("damaged")
    images = read_karpathy(save_json(folder / "splits.json", karpathy()))
    table = write_table(folder / "a.tsv", LXMERT)
    content = bytearray(table.read_bytes())
    at = position % len(content)
    content[at : at + len(patch)] = patch
    table.write_bytes(content)
    try:
        convert_tables([table], images, folder / "data", vocabulary=NAMES)
    except DataError:
        assert {path.name for path in folder.iterdir()} == {"a.tsv", "splits.json"}
    else:
        assert validate_folder(folder / "data") == []


# Numbers of other types, rows that are there twice, boxes and labels that are something else

TYPES = {
    "features": ("<f2", "<f4", "<f8", ">f2", ">f4", ">f8"),
    "boxes": ("<f4", "<f8", ">f4", ">f8", "<i2", "<i4", "<i8", ">i4"),
    "labels": ("<i8", "<i4", "<i2", "u1", ">i8", ">i4", "<f4", "<f8"),
    "scores": ("<f4", "<f2", "<f8", ">f4", ">f8"),
}


@pytest.mark.parametrize(
    ("column", "kind"), [(column, kind) for column, kinds in TYPES.items() for kind in kinds]
)
def test_numbers_of_another_type_are_read_as_what_they_are(
    column: str, kind: str, flickr: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="cpfean.data")
    wanted: dict[int, np.ndarray] = {}

    def found(photo: int) -> Entry:
        seen = detections(photo)
        exact = seen[column].astype(kind)
        wanted[photo] = exact.astype(np.float64)
        return seen | {column: exact}

    shown = [photo for _, photo in photos()]
    with (tmp_path / "a.tsv").open("w", newline="") as file:
        rows = csv.DictWriter(file, fieldnames=LXMERT, delimiter="\t")
        rows.writerows(line(str(photo), found(photo), LXMERT) for photo in shown)
    images = read_karpathy(flickr)
    if column == "boxes" and kind[1] == "i":  # no detector's box is flat
        for photo in wanted:
            wanted[photo][:, 2:] += 1
        write_whole_boxes(tmp_path / "a.tsv", wanted, kind)
    convert_tables([tmp_path / "a.tsv"], images, tmp_path / "data", vocabulary=NAMES)
    assert validate_folder(tmp_path / "data") == []
    name = {"features": "ims"}.get(column, column)
    for split in ("train", "dev", "test"):
        values = np.load(tmp_path / "data" / f"{split}_{name}.npy")
        ids = (tmp_path / "data" / f"{split}_ids.txt").read_text().split()
        for row, image in enumerate(ids):
            photo = int(image_key(image))
            scores = detections(photo)["scores"]
            if column == "scores":
                scores = scores.astype(kind)
            order = np.argsort(-scores, kind="stable")
            np.testing.assert_array_equal(values[row], wanted[photo][order].astype(values.dtype))
    said = [r.message for r in caplog.records if "read as such" in r.message]
    assert bool(said) == (kind != TYPES[column][{"features": 1}.get(column, 0)])


def write_whole_boxes(table: Path, boxes: dict[int, np.ndarray], kind: str) -> None:
    with table.open("w", newline="") as file:
        rows = csv.DictWriter(file, fieldnames=LXMERT, delimiter="\t")
        for photo, corners in boxes.items():
            corners[:, 0::2] = corners[:, 0::2].clip(0, WIDTH)
            corners[:, 1::2] = corners[:, 1::2].clip(0, HEIGHT)
            found = detections(photo) | {"boxes": corners.astype(kind)}
            rows.writerow(line(str(photo), found, LXMERT))


@settings(deadline=None, max_examples=80)
@given(
    seed=st.integers(0, 2**16),
    kind=st.sampled_from(TYPES["features"]),
    before=st.sampled_from(["<f2", "<f4", "<f8"]),
    make=st.sampled_from(["normal", "rectified", "sparse", "unit", "wide"]),
    width=st.sampled_from([64, 256, 2048]),
)
def test_the_type_of_features_is_found_whatever_they_were_rounded_to_before(
    seed: int, kind: str, before: str, make: str, width: int
) -> None:
    rng = np.random.default_rng(seed)
    values = rng.normal(size=(4, 6, width))
    if make == "rectified":
        values = np.maximum(values, 0)
    elif make == "sparse":
        values = np.where(rng.random(values.shape) < 0.2, rng.exponential(size=values.shape), 0)
    elif make == "unit":
        values /= np.linalg.norm(values, axis=-1, keepdims=True)
    elif make == "wide":
        values = np.exp(2 * values)
    values = values.astype(before).astype(kind)
    samples = [
        Sample(6, 500, width * values.itemsize, row.tobytes()[: 2**16], {}) for row in values
    ]
    assert feature_type(samples) == kind


def test_features_of_no_type_are_refused_and_can_be_declared(flickr: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)

    def change(rows: list[Entry]) -> None:
        for row in rows:  # quantized to bytes, as some releases are
            row["features"] = coded(rng.integers(0, 256, (REGIONS, DIM), dtype=np.uint8))

    table = write_table(tmp_path / "a.tsv", BOTTOM_UP, change=change)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(DataError, match="in none of them; the first row as float16 of width 4"):
        convert_tables([table], read_karpathy(flickr), tmp_path / "data")
    assert sorted(tmp_path.iterdir()) == before

    def odd(rows: list[Entry]) -> None:
        for row in rows:  # over so many orders of magnitude that it looks like garbage
            row["features"] = coded(np.exp(15 * rng.normal(size=(REGIONS, DIM))).astype("<f4"))

    table = write_table(tmp_path / "b.tsv", BOTTOM_UP, change=odd)
    with pytest.raises(DataError, match="--feature-type"):
        convert_tables([table], read_karpathy(flickr), tmp_path / "data")
    convert_tables([table], read_karpathy(flickr), tmp_path / "data", features_as="float32")
    assert np.load(tmp_path / "data" / "dev_ims.npy").shape == (2, REGIONS, DIM)


BROKEN: dict[str, Callable[[Entry], object]] = {
    "a cut text": lambda row: row.update(features=row["features"][:-9]),
    "what is no base64": lambda row: row.update(features="?" + row["features"][1:]),
    "nan": lambda row: row.update(features=with_feature(float("nan"))),
    "a box outside": lambda row: row.update(boxes=with_box(0, 0, 100, 400)),
    "no region": lambda row: row.update(num_boxes=0, boxes="", features=""),
}


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("fault", BROKEN)
def test_of_two_rows_the_sound_one_is_taken_and_this_is_said(
    fault: str, first: bool, flickr: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def change(rows: list[Entry]) -> None:
        rows.insert(1 if first else 2, dict(rows[1]))
        BROKEN[fault](rows[1 if first else 2])

    caplog.set_level("WARNING", logger="cpfean")
    table = write_table(tmp_path / "a.tsv", BOTTOM_UP, change=change)
    convert_tables([table], read_karpathy(flickr), tmp_path / "data")
    same(tmp_path / "data")
    place = f"a.tsv, row {2 if first else 3} (1000)"
    (said,) = [r.message for r in caplog.records if "passed over" in r.message]
    assert said.startswith("1 broken rows are passed over")
    assert place in said


def test_equal_rows_are_taken_once_and_if_all_are_broken_all_are_told(
    flickr: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    table = write_table(tmp_path / "a.tsv", BOTTOM_UP, change=lambda rows: rows.append(rows[1]))
    convert_tables([table], read_karpathy(flickr), tmp_path / "data")
    same(tmp_path / "data")
    assert [r.message for r in caplog.records if "word for word" in r.message] == [
        "1 rows are there twice, word for word; one of each is taken"
    ]

    def change(rows: list[Entry]) -> None:
        rows.append(dict(rows[1]))
        BROKEN["a cut text"](rows[1])
        BROKEN["a box outside"](rows[-1])

    table = write_table(tmp_path / "b.tsv", BOTTOM_UP, change=change)
    with pytest.raises(DataError, match=r"(?s)row 2 \(1000\).*row 13 \(1000\)"):
        convert_tables([table], read_karpathy(flickr), tmp_path / "other")
    with pytest.raises(DataError, match="given twice"):
        convert_tables([table, tmp_path / "." / "b.tsv"], read_karpathy(flickr), tmp_path / "other")


def test_the_command_for_rows_that_differ_leads_to_a_table_that_works(
    flickr: Path, tmp_path: Path
) -> None:
    def change(rows: list[Entry]) -> None:
        rows.insert(3, rows[1] | {"features": rows[2]["features"]})
        rows.append(rows[1] | {"boxes": rows[4]["boxes"]})
        rows.append(rows[6] | {"features": rows[2]["features"]})

    table = write_table(tmp_path / "my $table's.tsv", BOTTOM_UP, change=change)
    images = read_karpathy(flickr)
    with pytest.raises(DataError, match="3 faults") as refusal:
        convert_tables([table], images, tmp_path / "data")
    (command,) = set(re.findall(r"keep the first ones: (.*) \[", str(refusal.value)))
    subprocess.run(["/bin/bash", "-c", command], check=True)
    convert_tables([table], images, tmp_path / "data")
    same(tmp_path / "data")


LAYOUTS = [Layout(order, units) for order in ORDERS for units in UNITS]


def written_as(boxes: np.ndarray, layout: Layout) -> np.ndarray:
    """Corners in pixels as a detector of another kind writes them."""
    x1, y1, x2, y2 = boxes.astype(np.float64).T
    if layout.units == "shares":
        x1, x2, y1, y2 = x1 / WIDTH, x2 / WIDTH, y1 / HEIGHT, y2 / HEIGHT
    w, h = x2 - x1, y2 - y1
    columns = {
        "xyxy": (x1, y1, x2, y2),
        "yxyx": (y1, x1, y2, x2),
        "xywh": (x1, y1, w, h),
        "cxcywh": (x1 + w / 2, y1 + h / 2, w, h),
        "xxyy": (x1, x2, y1, y2),
    }[layout.order]
    return np.stack(columns, axis=1).astype("<f4")


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_boxes_in_another_layout_are_refused_with_it_and_read_if_it_is_declared(
    layout: Layout, flickr: Path, tmp_path: Path
) -> None:
    def change(rows: list[Entry]) -> None:
        for row in rows:
            boxes = detections(int(row["image_id"]))["boxes"]
            row["boxes"] = coded(written_as(boxes, layout))

    table = write_table(tmp_path / "a.tsv", BOTTOM_UP, change=change)
    images = read_karpathy(flickr)
    if layout != Layout():
        with pytest.raises(DataError, match="1 fault") as refusal:
            convert_tables([table], images, tmp_path / "data")
        # Of shares, x and y exchanged are shares too.
        open_order = layout.units == "shares" and layout.order == "yxyx"
        guess = Layout("xyxy", "shares") if open_order else layout
        assert f"fit as {guess}" in str(refusal.value)
        assert f"say so: {' '.join(guess.flags)} [" in str(refusal.value)
        assert ("comes first" in str(refusal.value)) == (guess == Layout("xyxy", "shares"))
    convert_tables([table], images, tmp_path / "data", layout=layout)
    for split in ("train", "dev", "test"):
        ids = (tmp_path / "data" / f"{split}_ids.txt").read_text().split()
        expected = [detections(int(image_key(image)))["boxes"] for image in ids]
        boxes = np.load(tmp_path / "data" / f"{split}_boxes.npy")
        np.testing.assert_allclose(boxes, expected, atol=1e-3)


def test_labels_that_count_from_one_are_refused_with_a_hint_and_read_if_that_is_declared(
    flickr: Path, tmp_path: Path
) -> None:
    def change(rows: list[Entry]) -> None:
        for row in rows:
            row["objects_id"] = coded(detections(int(row["img_id"]))["labels"] + 1)

    table = write_table(tmp_path / "a.tsv", LXMERT, change=change)
    images = read_karpathy(flickr)
    with pytest.raises(DataError, match="1 fault") as refusal:
        convert_tables([table], images, tmp_path / "data", vocabulary=NAMES)
    assert "all are from 1 to 4: if they count from 1, say so: --labels-from 1" in str(
        refusal.value
    )
    convert_tables([table], images, tmp_path / "data", vocabulary=NAMES, labels_from=1)
    same(tmp_path / "data", names=NAMES)
    plain = write_table(tmp_path / "b.tsv", LXMERT)
    with pytest.raises(DataError, match="expected labels from 1 to 4"):
        convert_tables([plain], images, tmp_path / "other", vocabulary=NAMES, labels_from=1)
    with pytest.raises(DataError, match="--labels-from"):
        convert_tables([plain], images, tmp_path / "other", keep_labels=False, labels_from=1)


def test_a_cut_of_regions_without_scores_is_told(
    flickr: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="cpfean.data")
    table = write_table(tmp_path / "a.tsv", BOTTOM_UP)
    convert_tables([table], read_karpathy(flickr), tmp_path / "data", num_regions=4)
    assert "the first 4 of up to 6 regions" in caplog.text
    caplog.clear()
    table = write_table(tmp_path / "b.tsv", LXMERT)
    images = read_karpathy(flickr)
    convert_tables([table], images, tmp_path / "best", num_regions=4, vocabulary=NAMES)
    assert "are kept" not in caplog.text


@pytest.mark.parametrize("number", [1, 2, 4, 10])
def test_other_than_five_captions_an_image_are_kept(number: int, tmp_path: Path) -> None:
    data = karpathy()
    for image in data["images"]:
        image["sentences"] = (image["sentences"] * 2)[:number]
    path = save_json(tmp_path / "splits.json", data)
    for part in read_karpathy(path).values():
        assert {len(own) for own in part.captions} == {number}
    captions, _ = coco_files(tmp_path)
    for each in captions.values():
        notes = json.loads(each.read_text())
        some = [n for n in notes["annotations"] if n["id"] % 10 < 5]
        again = [note | {"id": 10**6 + note["id"]} for note in some]
        kept = [n for n in some + again if n["id"] < 10**6 or number > 5]
        notes["annotations"] = [n for n in kept if n["id"] % 10 < number]
        save_json(each, notes)
    for part in read_coco_captions(captions).values():
        assert {len(own) for own in part.captions} == {number}


def uneven(folder: Path) -> tuple[Path, dict[str, list[int]]]:
    """A file of Karpathy's whose images have from four to seven captions; and how many."""
    data, sizes = karpathy(), {}
    for position, image in enumerate(data["images"]):
        count = 4 + position % 4
        image["sentences"] = (image["sentences"][:5] * 2)[:count]
        sizes[image["filename"]] = count
    return save_json(folder / "uneven.json", data), sizes


def test_captions_that_differ_in_number_are_kept_cut_or_refused_as_it_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path, sizes = uneven(tmp_path)

    def numbers(**how: Any) -> dict[str, int]:
        parts = read_karpathy(path, **how).values()
        return {
            name: len(own)
            for part in parts
            for name, own in zip(part.names, part.captions, strict=True)
        }

    with caplog.at_level("INFO"):
        assert numbers() == numbers(each="all") == sizes
    assert "of the images are 3 with 4, 3 with 5, 3 with 6, 2 with 7" in caplog.text
    with caplog.at_level("INFO"):
        assert set(numbers(each=4).values()) == {4}
    assert "15 captions beyond the first 4" in caplog.text
    assert "--captions-each all" in caplog.text
    with pytest.raises(DataError, match="3 faults") as refusal:
        numbers(each=5)
    assert "expected 5 captions, found 4; drop the image, or keep" in str(refusal.value)
    data = json.loads(path.read_text())
    data["images"][1]["sentences"] = []
    save_json(path, data)
    with pytest.raises(DataError, match="at least one caption, found none; drop the image"):
        numbers()


def test_a_caption_that_is_not_kept_may_be_empty(tmp_path: Path) -> None:
    data = karpathy()
    (sixth,) = (s for s in data["images"] if len(s["sentences"]) == 6)
    sixth["sentences"][5]["raw"] = " "
    path = save_json(tmp_path / "splits.json", data)
    assert read_karpathy(path)["train"].captions
    with pytest.raises(DataError, match="caption 5: expected a caption"):
        read_karpathy(path, each="all")


def test_a_folder_is_written_with_the_captions_that_images_have(tmp_path: Path) -> None:
    path, sizes = uneven(tmp_path)
    table = write_table(tmp_path / "a.tsv", BOTTOM_UP)
    convert_tables([table], read_karpathy(path), tmp_path / "data")
    convert_tables([table], read_karpathy(path, each=4), tmp_path / "four")
    usual = save_json(tmp_path / "usual.json", karpathy())
    convert_tables([table], read_karpathy(usual), tmp_path / "five")
    for name in ("train", "dev", "test"):
        split = open_split(tmp_path / "data", name, num_regions=REGIONS)
        found = dict(zip(split.image_ids, split.groups.sizes.tolist(), strict=True))
        assert found == {image: sizes[image] for image in split.image_ids}
        for image, photo in enumerate(split.image_ids):
            for caption in split.captions_of(image):
                assert photo.removesuffix(".jpg") in split.captions[caption]
        four = open_split(tmp_path / "four", name, num_regions=REGIONS)
        assert set(four.groups.sizes.tolist()) == {4}
    assert list((tmp_path / "five").glob("*image_of_caption*")) == []
    # Written anew, it has the same groups.
    convert_precomp(tmp_path / "data", tmp_path / "again")
    for name in ("train", "dev", "test"):
        first, second = (
            open_split(tmp_path / folder, name, num_regions=REGIONS) for folder in ("data", "again")
        )
        assert first.captions == second.captions
        assert first.groups.sizes.tolist() == second.groups.sizes.tolist()


INPUTS = ("table", "karpathy", "captions", "vocabulary", "instances", "boxes", "sizes", "scan")


@pytest.mark.timeout(30)
@pytest.mark.parametrize("thing", THINGS)
@pytest.mark.parametrize("given", INPUTS)
def test_no_converter_reads_what_is_no_file(
    given: str, thing: str, flickr: Path, tmp_path: Path
) -> None:
    captions, instances = coco_files(tmp_path)
    table = write_table(tmp_path / "a.tsv", LXMERT)
    vocabulary = tmp_path / "names.txt"
    vocabulary.write_text("\n".join(NAMES))
    scan = write_scan(tmp_path / "scan")
    path = {
        "table": table,
        "karpathy": flickr,
        "captions": captions["dev"],
        "vocabulary": vocabulary,
        "instances": instances[1],
        "boxes": scan / "dev_ims_bbx.npy",
        "sizes": scan / "dev_ims_size.json",
        "scan": scan / "dev_ims.npy",
    }[given]
    words = put_thing(thing, path)

    def convert() -> None:
        if given in ("boxes", "sizes", "scan"):
            convert_precomp(scan, tmp_path / "data", boxes=scan)
        else:
            read_coco_captions(captions)
            names = read_vocabulary(vocabulary)
            CocoObjects(instances)
            convert_tables([table], read_karpathy(flickr), tmp_path / "data", vocabulary=names)

    with pytest.raises(DataError, match=re.escape(path.name)) as refusal:
        convert()
    assert words in str(refusal.value)
    assert not (tmp_path / "data").exists()


def test_a_blank_last_line_of_a_table_is_told_with_a_command_that_works(
    flickr: Path, tmp_path: Path
) -> None:
    table = write_table(tmp_path / "a.tsv", BOTTOM_UP)
    table.write_bytes(table.read_bytes() + b"\n")
    with pytest.raises(DataError, match=r"row 13.*blank line") as refusal:
        convert_tables([table], read_karpathy(flickr), tmp_path / "data")
    subprocess.run(["/bin/bash", "-c", str(refusal.value).rsplit(": ", 1)[1]], check=True)
    convert_tables([table], read_karpathy(flickr), tmp_path / "data")
    same(tmp_path / "data")


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_json_is_read_in_every_encoding_that_it_may_have(encoding: str, tmp_path: Path) -> None:
    path = tmp_path / "splits.json"
    path.write_text(json.dumps(karpathy()), encoding=encoding)
    assert list(read_karpathy(path)) == ["train", "dev", "test"]


# COCO's human boxes as labels


def test_regions_take_the_class_of_the_human_box_they_overlap(tmp_path: Path) -> None:
    captions, instances = coco_files(tmp_path)
    table = write_table(tmp_path / "coco.tsv", BOTTOM_UP)
    objects = CocoObjects(instances)
    assert objects.names == ["person", "dog", NOTHING]
    convert_tables([table], read_coco_captions(captions), tmp_path / "data", objects=objects)
    split = open_split(tmp_path / "data", "train", num_regions=REGIONS)
    labels, scores = split.regions.labels, split.regions.confidences
    assert labels is not None
    assert scores is not None
    # The human boxes come first and are the detector's own; the third is a crowd.
    assert split.image_ids[0] == "000000001000.jpg"
    assert (labels[0] == 2).all()
    assert (scores[0] == 0).all()
    assert sorted(labels[1, scores[1] == 1].tolist()) == [0, 1]
    assert ((scores == 0) == (labels == 2)).all()
    assert (scores[scores > 0] >= 0.5).all()
    assert (np.diff(scores, axis=1) <= 0).all()
    best = np.argmax(split.regions.features[1] == detections(1001)["features"][0], axis=0)
    assert labels[1, best[0]] == 0  # "person": the first human box


def test_instance_files_of_other_images_or_sizes_are_refused(tmp_path: Path) -> None:
    captions, instances = coco_files(tmp_path)
    images = read_coco_captions(captions)
    table = write_table(tmp_path / "a.tsv", BOTTOM_UP)
    with pytest.raises(DataError, match="no such image"):
        convert_tables([table], images, tmp_path / "d", objects=CocoObjects(instances[:1]))
    data = json.loads(instances[0].read_text())
    data["images"][0]["width"] = 640
    save_json(instances[0], data)
    with pytest.raises(DataError, match="640 x 333"):
        convert_tables([table], images, tmp_path / "d", objects=CocoObjects(instances))
    data["categories"].pop()
    save_json(instances[0], data)
    with pytest.raises(DataError, match="one release"):
        CocoObjects(instances[::-1])
    del data["categories"]
    save_json(instances[0], data)
    with pytest.raises(DataError, match="instances_train2017"):
        CocoObjects(instances)


def test_a_vocabulary_has_the_first_name_of_each_line(tmp_path: Path) -> None:
    path = tmp_path / "objects_vocab.txt"
    path.write_text("yolk\nsneakers,tennis shoes\nlight pole \n")
    assert read_vocabulary(path) == ["yolk", "sneakers", "light pole"]
    path.write_text("yolk\n\nsky\n")
    with pytest.raises(DataError, match="line 2"):
        read_vocabulary(path)
    path.write_bytes(b"caf\xe9\n")
    with pytest.raises(DataError, match="byte 3"):
        read_vocabulary(path)


# SCAN's folders with GSMN's boxes


def write_scan(folder: Path, *, five: bool = False) -> Path:
    """As in the release: `f30k_precomp` has a row an image, other sets one for each caption."""
    folder.mkdir()
    for split, ours in (("train", "train"), ("val", "dev"), ("test", "test")):
        shown = [photo for s, photo in photos() if s == split]
        found = [detections(photo) for photo in shown]
        times = 5 if five else 1
        features = np.stack([f["features"] for f in found])
        np.save(folder / f"{ours}_ims.npy", np.repeat(features, times, axis=0))
        captions = [f"Caption {j} of photo {photo}.\n" for photo in shown for j in range(5)]
        (folder / f"{ours}_caps.txt").write_text("".join(captions))
        (folder / f"{ours}_ids.txt").write_text("".join(f"{p}\n" * times for p in shown))
        np.save(folder / f"{ours}_ims_bbx.npy", np.stack([f["boxes"] for f in found]))
        sizes = [{"image_w": WIDTH, "image_h": HEIGHT} for _ in shown]
        save_json(folder / f"{ours}_ims_size.json", sizes)
    return folder


@pytest.mark.parametrize("five", [False, True])
def test_a_folder_of_scan_and_gsmn_becomes_one_row_an_image(five: bool, tmp_path: Path) -> None:
    scan = write_scan(tmp_path / "f30k_precomp", five=five)
    convert_precomp(scan, tmp_path / "data", boxes=scan)
    assert validate_folder(tmp_path / "data") == []
    same(tmp_path / "data")
    convert_precomp(scan, tmp_path / "half", half=True, num_regions=3)
    features = np.load(tmp_path / "half" / "test_ims.npy")
    assert (features.dtype, features.shape) == (np.float16, (3, 3, DIM))
    assert not (tmp_path / "half" / "test_boxes.npy").exists()


def test_testall_is_the_test_split_where_it_is_there(tmp_path: Path) -> None:
    scan = write_scan(tmp_path / "coco_precomp")
    for part in ("ims.npy", "caps.txt", "ids.txt"):
        (scan / f"testall_{part}").write_bytes((scan / f"test_{part}").read_bytes())
        (scan / f"test_{part}").unlink()
    convert_precomp(scan, tmp_path / "data")
    assert open_split(tmp_path / "data", "test", num_regions=2).num_images == 3


@pytest.mark.parametrize("kind", ["<f8", ">f4", "<f2"])
def test_a_folder_in_our_own_format_is_written_anew_with_all_it_has(
    kind: str, new_folder: Callable[[Path], Path], tmp_path: Path
) -> None:
    old = new_folder(tmp_path / "old")
    new_folder(tmp_path / "same")
    for split in ("train", "dev", "test"):
        for part, change in (
            ("ims", lambda x: x.astype(kind)),
            ("boxes", lambda x: x[..., [1, 0, 3, 2]]),
            ("labels", lambda x: x + 1),
        ):
            path = old / f"{split}_{part}.npy"
            np.save(path, change(np.load(path)))
    np.save(old / "dev_counts.npy", np.array([5, 2]))
    layout = Layout("yxyx")
    convert_precomp(old, tmp_path / "new", layout=layout, labels_from=1)
    assert validate_folder(tmp_path / "new") == []
    for split in ("train", "dev", "test"):
        before = open_split(tmp_path / "same", split, num_regions=5)
        after = open_split(tmp_path / "new", split, num_regions=5)
        kept = np.arange(5) < after.regions.counts[:, None]
        assert after.regions.counts.tolist() == ([5, 2] if split == "dev" else [5] * len(kept))
        assert (after.captions, after.image_ids) == (before.captions, before.image_ids)
        for field in ("geometry", "labels", "confidences", "features"):
            ours, theirs = getattr(after.regions, field), getattr(before.regions, field)
            atol = 1e-2 if kind == "<f2" and field == "features" else 1e-6
            np.testing.assert_allclose(ours[kept], theirs[kept], atol=atol)
        assert after.label_names == before.label_names


def test_what_is_declared_of_what_is_not_there_is_refused(tmp_path: Path) -> None:
    scan = write_scan(tmp_path / "scan")
    with pytest.raises(DataError, match="--box-order"):
        convert_precomp(scan, tmp_path / "data", layout=Layout("yxyx"))
    with pytest.raises(DataError, match="--labels-from"):
        convert_precomp(scan, tmp_path / "data", labels_from=1)
    with pytest.raises(DataError, match="expected a folder, found something else"):
        convert_precomp(scan, tmp_path / "data", boxes=scan / "dev_ims.npy")


def pickled_sizes(folder: Path) -> None:
    (folder / "dev_ims_size.json").unlink()
    sizes = np.array([{"image_w": 1, "image_h": 2}] * 2, dtype=object)
    np.save(folder / "dev_ims_size.npy", sizes, allow_pickle=True)


def drop_line(name: str) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        text = (folder / name).read_text()
        (folder / name).write_text(text.split("\n", 1)[1])

    return change


def fill(name: str, place: Any, value: Any) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        array = np.load(folder / name)
        array[place] = value
        np.save(folder / name, array)

    return change


def pickled_features(folder: Path) -> None:
    np.save(folder / "dev_ims.npy", np.array([{}], dtype=object), allow_pickle=True)


SCAN_REFUSALS: dict[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {
    "sizes as a pickle": (pickled_sizes, ("dev_ims_size.npy", "pickle", " -c ", "trust")),
    "no sizes": (
        lambda folder: (folder / "dev_ims_size.json").unlink(),
        ("dev_ims_size.json", "no such file"),
    ),
    "sizes in another form": (
        lambda folder: save_json(folder / "dev_ims_size.json", [[1, 2], [3, 4]]),
        ("dev_ims_size.json", "image_w"),
    ),
    "a size of nothing": (
        lambda f: save_json(f / "dev_ims_size.json", [{"image_w": 0, "image_h": 2}] * 2),
        ("no-size", "image 0"),
    ),
    "a size too few": (
        lambda f: save_json(f / "dev_ims_size.json", [{"image_w": 3, "image_h": 2}]),
        ("expected 2 sizes", "found 1"),
    ),
    "no boxes": (lambda folder: (folder / "dev_ims_bbx.npy").unlink(), ("dev_ims_bbx.npy",)),
    "boxes of other regions": (
        lambda folder: np.save(folder / "dev_ims_bbx.npy", np.ones((2, 3, 4))),
        ("dev_ims_bbx.npy", "(2, 6, 4)", "(2, 3, 4)"),
    ),
    "a box outside of the image": (
        fill("dev_ims_bbx.npy", (1, 2), [0, 0, 20, 900]),
        ("box-outside", "2001", "region 2"),
    ),
    "a missing file": (lambda folder: (folder / "dev_ids.txt").unlink(), ("dev_ids.txt",)),
    "y before x": (
        lambda f: np.save(f / "dev_ims_bbx.npy", np.load(f / "dev_ims_bbx.npy")[..., [1, 0, 3, 2]]),
        ("dev_ims_bbx.npy, image 0 (2000)", "fit as y1, x1, y2, x2", "say so: --box-order yxyx"),
    ),
    "a blank last line": (
        lambda f: (f / "dev_caps.txt").write_text((f / "dev_caps.txt").read_text() + "\n"),
        ("dev_caps.txt, line 11", "blank-end", "head -n 10 "),
    ),
    "two captions an image": (
        lambda f: (f / "dev_caps.txt").write_text("a\n" * 4),
        ("4 captions for 2 images, 2 an image", "1 fault"),
    ),
    "half of testall": (
        lambda f: (f / "testall_ims.npy").write_bytes((f / "test_ims.npy").read_bytes()),
        ("testall_caps.txt", "testall_ids.txt", "2 faults"),
    ),
    "a caption too few": (drop_line("test_caps.txt"), ("test_caps.txt", "found 14")),
    "an id too few": (drop_line("test_ids.txt"), ("test_ids.txt", "found 2")),
    "an empty caption": (
        lambda folder: (folder / "dev_caps.txt").write_text("a\n" * 6 + "\n" + "a\n" * 3),
        ("dev_caps.txt", "line 7"),
    ),
    "an image twice": (
        lambda folder: (folder / "dev_ids.txt").write_text("2000\n2000\n"),
        ("duplicate-id", "image 1"),
    ),
    "nan in a feature": (
        fill("dev_ims.npy", (1, 2, 3), np.nan),
        ("not-finite", "image 1 (2001)", "region 2"),
    ),
    "pickled features": (pickled_features, ("dev_ims.npy", "pickle")),
    "whole numbers as features": (
        lambda folder: np.save(folder / "dev_ims.npy", np.ones((2, 6, 8), int)),
        ("dev_ims.npy", "floats"),
    ),
    "features of another width": (
        lambda folder: np.save(folder / "dev_ims.npy", np.ones((2, 6, 9), "f4")),
        ("the same in all splits",),
    ),
}


@pytest.mark.parametrize("fault", SCAN_REFUSALS)
def test_a_fault_in_a_folder_of_scan_is_refused_and_leaves_nothing(
    fault: str, tmp_path: Path
) -> None:
    scan = write_scan(tmp_path / "f30k_precomp")
    change, words = SCAN_REFUSALS[fault]
    change(scan)
    with pytest.raises(DataError) as refusal:
        convert_precomp(scan, tmp_path / "data", boxes=scan)
    assert [word for word in words if word not in str(refusal.value)] == []
    assert [path.name for path in tmp_path.iterdir()] == ["f30k_precomp"]


def test_five_unequal_rows_are_refused(tmp_path: Path) -> None:
    scan = write_scan(tmp_path / "scan", five=True)
    fill("dev_ims.npy", (7, 0, 0), 9)(scan)
    with pytest.raises(DataError, match=r"rows 5 to 9"):
        convert_precomp(scan, tmp_path / "data")


def test_the_pickle_of_sizes_is_never_loaded_and_the_told_command_makes_the_json(
    tmp_path: Path,
) -> None:
    class Payload:
        def __reduce__(self) -> tuple[object, ...]:
            return os.mkdir, (str(tmp_path / "trace"),)

    scan = write_scan(tmp_path / "scan")
    (scan / "dev_ims_size.json").unlink()
    np.save(scan / "dev_ims_size.npy", np.array([Payload()], dtype=object), allow_pickle=True)
    with pytest.raises(DataError) as refusal:
        convert_precomp(scan, tmp_path / "data", boxes=scan)
    assert not (tmp_path / "trace").exists()
    sizes = [{"image_w": WIDTH, "image_h": HEIGHT}] * 2
    np.save(scan / "dev_ims_size.npy", np.array(sizes, dtype=object), allow_pickle=True)
    (command,) = re.findall(r"where it comes from: (.*) \[missing\]", str(refusal.value))
    subprocess.run(["/bin/bash", "-c", command], check=True)
    convert_precomp(scan, tmp_path / "data", boxes=scan)
    same(tmp_path / "data")


# The folder that is written


def test_a_folder_that_is_there_or_in_the_making_is_left_alone(
    flickr: Path, tmp_path: Path
) -> None:
    table = write_table(tmp_path / "a.tsv", BOTTOM_UP)
    images = read_karpathy(flickr)
    (tmp_path / "data").mkdir()
    with pytest.raises(DataError, match="exists already"):
        convert_tables([table], images, tmp_path / "data")
    (tmp_path / "other.unfinished").mkdir()
    with pytest.raises(DataError, match="still runs or was killed"):
        convert_tables([table], images, tmp_path / "other")
    assert (tmp_path / "other.unfinished").is_dir()


def test_a_disk_too_small_is_refused_before_anything_is_written(
    flickr: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = write_table(tmp_path / "a.tsv", BOTTOM_UP)

    class Little:
        free = 100

    monkeypatch.setattr(native.shutil, "disk_usage", lambda path: Little)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(DataError, match="--half"):
        convert_tables([table], read_karpathy(flickr), tmp_path / "data")
    assert sorted(tmp_path.iterdir()) == before


def test_a_disk_that_fills_up_or_an_interruption_leaves_nothing(
    flickr: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = write_table(tmp_path / "a.tsv", BOTTOM_UP)
    images = read_karpathy(flickr)
    before = sorted(tmp_path.iterdir())
    for raised, seen in (
        (OSError(28, "No space left on device"), DataError),
        (KeyboardInterrupt(), KeyboardInterrupt),
    ):

        def fail(*arguments: object, raised: BaseException = raised, **options: object) -> None:
            raise raised

        monkeypatch.setattr(native.np, "save", fail)
        with pytest.raises(seen):
            convert_tables([table], images, tmp_path / "data")
        monkeypatch.undo()
        assert sorted(tmp_path.iterdir()) == before


def test_features_that_a_half_cannot_hold_are_refused(flickr: Path, tmp_path: Path) -> None:
    table = write_table(tmp_path / "a.tsv", BOTTOM_UP, change=put(1, features=with_feature(7e4)))
    with pytest.raises(DataError, match="without --half"):
        convert_tables([table], read_karpathy(flickr), tmp_path / "data", half=True)
    convert_tables([table], read_karpathy(flickr), tmp_path / "data")


def test_the_best_regions_come_first_and_ties_keep_their_order() -> None:
    scores = np.array([0.2, 0.9, 0.2, 0.9])
    regions = Regions(features=np.arange(4.0)[:, None], scores=scores, labels=np.arange(4))
    best = regions.best(3)
    assert best.features[:, 0].tolist() == [1, 3, 0]
    assert best.labels is not None
    assert best.labels.tolist() == [1, 3, 0]
    plain = Regions(features=np.arange(4.0)[:, None]).best(2)
    assert plain.features[:, 0].tolist() == [0, 1]


def test_memory_does_not_grow_with_the_number_of_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sixteen megabytes of features pass through less than three."""
    names = [str(1000 + i) for i in range(100)]
    images = {"train": Captioned(names, [["a b"] * 5] * len(names))}
    found = detections(1000, regions=20) | {"features": np.ones((20, 2048), "<f4")}
    with (tmp_path / "a.tsv").open("w", newline="") as file:
        rows = csv.DictWriter(file, fieldnames=BOTTOM_UP, delimiter="\t")
        rows.writerows(line(name, found, BOTTOM_UP) for name in names)
    # The checks of the finished folder read it in chunks of their own.
    monkeypatch.setattr(native, "check_folder", lambda folder, **options: None)
    tracemalloc.start()
    try:
        convert_tables([tmp_path / "a.tsv"], images, tmp_path / "data")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert (tmp_path / "data" / "train_ims.npy").stat().st_size > 16e6
    assert peak < 3e6
