"""Folders of photographs with their captions, as people have them."""

from __future__ import annotations

import csv
import json
import logging
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import pytest
from fsspec.implementations.memory import MemoryFileSystem
from hypothesis import given
from hypothesis import strategies as st

from cpfean.data.convert.photographs import Photograph, find_photographs
from cpfean.errors import ConfigError, DataError
from tests.memory_store import s3_in_memory

Rows = Sequence[tuple[str, str]]
SHARED = Path(__file__).resolve().parents[2].parent / "shared/data/photographs"


def photo(path: Path, content: str | None = None) -> None:
    """A file that is a photograph by its name; nothing here decodes it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes((content or path.as_posix()).encode())


def table(path: Path, rows: Rows) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".jsonl":
        lines = [json.dumps({"file_name": name, "text": text}) for name, text in rows]
        path.write_text("\n".join(lines), encoding="utf-8")
        return
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("file_name", "text"), *rows])


def splits(root: Path, names: Mapping[str, Sequence[str]], kind: str = "csv") -> None:
    for folder, own in names.items():
        for name in own:
            photo(root / folder / name)
        rows = [(name, f"caption {n} of {name}") for name in own for n in range(2)]
        table(root / folder / f"metadata.{kind}", rows)


def faults(root: Path, **options: object) -> list[str]:
    with pytest.raises(DataError) as caught:
        find_photographs(str(root), **options)  # type: ignore[arg-type]
    return [line.strip() for line in str(caught.value).splitlines()[1:]]


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
@pytest.mark.parametrize("dev", ["dev", "val", "validation"])
def test_folders_of_splits_are_the_splits(kind: str, dev: str, tmp_path: Path) -> None:
    splits(tmp_path, {"train": ["b.jpg", "a.png"], dev: ["c.jpg"], "test": ["sub/d.jpg"]}, kind)
    found = find_photographs(str(tmp_path))
    assert list(found) == ["train", "dev", "test"]
    assert found["train"] == [
        Photograph(
            name=f"train/{name}",
            path=f"{tmp_path}/train/{name}",
            captions=(f"caption 0 of {name}", f"caption 1 of {name}"),
        )
        for name in ("a.png", "b.jpg")
    ]
    assert [each.name for each in found["dev"]] == [f"{dev}/c.jpg"]
    assert [each.path for each in found["test"]] == [f"{tmp_path}/test/sub/d.jpg"]


def test_one_name_in_two_splits_is_two_photographs(tmp_path: Path) -> None:
    splits(tmp_path, {"train": ["0.jpg"], "test": ["0.jpg"]})
    found = find_photographs(str(tmp_path))
    assert [each.name for own in found.values() for each in own] == ["train/0.jpg", "test/0.jpg"]


def test_rows_of_a_photograph_need_not_lie_together_and_keep_their_order(tmp_path: Path) -> None:
    photo(tmp_path / "a.jpg")
    photo(tmp_path / "b.jpg")
    rows = [("a.jpg", "one"), ("b.jpg", "two"), ("./a.jpg", " three\n lines ")]
    table(tmp_path / "metadata.csv", rows)
    found = find_photographs(str(tmp_path), shares=(1, 0, 0))
    assert [each.captions for each in found["train"]] == [("one", "three lines"), ("two",)]


def test_a_json_line_may_have_several_texts(tmp_path: Path) -> None:
    photo(tmp_path / "a.jpg")
    row = json.dumps({"text": ["one", "two"], "file_name": "a.jpg", "id": 7})
    (tmp_path / "metadata.jsonl").write_text(f"{row}\n\n", encoding="utf-8")
    found = find_photographs(str(tmp_path), shares=(0, 0, 1))
    assert found["test"][0].captions == ("one", "two")


def test_without_captions_it_is_a_gallery(tmp_path: Path) -> None:
    for name in ("b.JPG", "sub dir/ä.png", "train/c.webp", "no.heic", "a.gif"):
        photo(tmp_path / name)
    for name in ("notes.txt", ".hidden.jpg", ".git/x.jpg", "__MACOSX/a.gif", "metadata.txt"):
        photo(tmp_path / name)
    found = find_photographs(str(tmp_path))
    assert list(found) == ["gallery"]
    names = [each.name for each in found["gallery"]]
    assert names == ["a.gif", "b.JPG", "no.heic", "sub dir/ä.png", "train/c.webp"]
    assert {each.captions for each in found["gallery"]} == {()}


def many(root: Path, count: int, contents: Callable[[int], str] = str) -> None:
    for n in range(count):
        photo(root / f"{n:03}.jpg", f"content {contents(n)}")
    table(root / "metadata.csv", [(f"{n:03}.jpg", f"caption {n}") for n in range(count)])


def names_of(found: Mapping[str, Sequence[Photograph]]) -> dict[str, list[str]]:
    return {split: [each.name for each in own] for split, own in found.items()}


def test_drawn_splits_have_their_shares_and_are_those_of_the_seed(tmp_path: Path) -> None:
    many(tmp_path, 50)
    found = names_of(find_photographs(str(tmp_path), shares=(0.7, 0.1, 0.2), seed=3))
    assert {split: len(own) for split, own in found.items()} == {"train": 35, "dev": 5, "test": 10}
    assert sorted(name for own in found.values() for name in own) == [
        f"{n:03}.jpg" for n in range(50)
    ]
    assert all(own == sorted(own) for own in found.values())
    assert found == names_of(find_photographs(str(tmp_path), shares=(0.7, 0.1, 0.2), seed=3))
    assert found != names_of(find_photographs(str(tmp_path), shares=(0.7, 0.1, 0.2), seed=4))


@given(seed=st.integers(0, 1000))
def test_doubles_are_drawn_together(seed: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    root = tmp_path_factory.getbasetemp() / "doubles"
    if not root.is_dir():
        many(root, 40, lambda n: str(n % 13).zfill(2))
    found = names_of(find_photographs(str(root), shares=(0.6, 0.2, 0.2), seed=seed))
    contents = {split: {int(name[:3]) % 13 for name in own} for split, own in found.items()}
    assert sum(len(own) for own in found.values()) == 40
    assert sum(len(own) for own in contents.values()) == 13


def test_doubles_in_one_split_are_told_and_kept(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    many(tmp_path, 4, lambda n: "same")
    with caplog.at_level(logging.INFO):
        assert len(find_photographs(str(tmp_path), shares=(1, 0, 0))["train"]) == 4
    assert "1 photographs are there more than once, 000.jpg and 001.jpg" in caplog.text


def test_doubles_in_two_given_splits_are_refused(tmp_path: Path) -> None:
    splits(tmp_path, {"train": ["a.jpg", "b.jpg"], "test": ["c.jpg", "d.jpg"]})
    photo(tmp_path / "train/b.jpg", "the same")
    photo(tmp_path / "test/c.jpg", "the same")
    (line,) = faults(tmp_path)
    assert line.startswith("train/b.jpg: expected photographs of train that are in no other split")
    assert "the same bytes as test/c.jpg of test; remove one [leak]" in line


def test_too_few_photographs_for_the_shares_are_refused(tmp_path: Path) -> None:
    many(tmp_path, 3, lambda n: "same")
    with pytest.raises(DataError, match=r"3 photographs, 1 of them different.*none for"):
        find_photographs(str(tmp_path), shares=(0.5, 0.25, 0.25))


@pytest.mark.parametrize("shares", [(0.5, 0.1, 0.1), (1.2, -0.1, -0.1), (float("nan"), 0, 1)])
def test_shares_that_are_none_are_refused(
    shares: tuple[float, float, float], tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="sum to 1"):
        find_photographs(str(tmp_path), shares=shares)


def test_everything_that_is_wrong_is_listed_at_once(tmp_path: Path) -> None:
    splits(tmp_path, {"train": ["a.jpg", "lonely.jpg"], "test": ["t.jpg"]})
    (tmp_path / "train/notes.txt").write_text("", encoding="utf-8")
    (tmp_path / "train/metadata.csv").write_text(
        "file_name,text\n"
        "a.jpg,fine\n"
        "gone.jpg,not there\n"
        'a.jpg," "\n'
        "../secret.jpg,climbs\n"
        "/etc/passwd.jpg,absolute\n"
        ",nameless\n"
        "a.jpg,too,many\n"
        "notes.txt,no photograph\n",
        encoding="utf-8",
    )
    photo(tmp_path / "val/v.jpg")
    (tmp_path / "test/metadata.csv").write_bytes(b"file_name,text\nt.jpg,caf\xe9\n")
    expected = [
        "train/metadata.csv, line 4 (a.jpg): expected a caption",
        "train/metadata.csv, line 5: expected a path within the folder of the table, found '../sec",
        "train/metadata.csv, line 6: expected a path within",
        "train/metadata.csv, line 7: expected a file_name, found none",
        "train/metadata.csv, line 8: expected 2 fields, found 3; put a text with commas",
        "train/metadata.csv, gone.jpg: expected the photograph gone.jpg, found no file; add it",
        "train/metadata.csv, notes.txt: expected the photograph notes.txt, found a file that is",
        "train/metadata.csv, train/lonely.jpg: expected a row for each photograph, found none",
        "test/metadata.csv, line 2: expected UTF-8, found the byte 0xe9",
        "val/: expected metadata.csv or metadata.jsonl as in train, test, found none",
    ]
    found = faults(tmp_path)
    assert len(found) == len(expected)
    for start in expected:
        assert any(line.startswith(start) for line in found), (start, found)


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (b"", "found an empty file"),
        (b"name,caption\na.jpg,x\n", "line 1: expected the columns file_name and text"),
        (b"file_name;text\na.jpg;x\n", "line 1: expected the columns"),
        (b'file_name,text\na.jpg,"x\n', "expected CSV"),
        (b'file_name,text\na.jpg,"x"y"\n', "line 2: expected CSV"),
        (b"\xff\xfef\x00i\x00", "found a text in UTF-16"),
        (b"PK\x03\x04....", "found a zip archive"),
        (b"file_name,text\na.jpg,\x07bell\n", "control character"),
    ],
)
def test_a_table_that_is_none_is_refused(content: bytes, part: str, tmp_path: Path) -> None:
    photo(tmp_path / "a.jpg")
    (tmp_path / "metadata.csv").write_bytes(content)
    (line,) = faults(tmp_path)
    assert part in line


def test_a_json_line_that_is_none_is_refused_with_its_line(tmp_path: Path) -> None:
    photo(tmp_path / "a.jpg")
    lines = ['{"file_name": "a.jpg", "text": "x"}', "{", '["a.jpg", "x"]', '{"file_name": 3}']
    lines += ['{"file_name": "a.jpg", "text": null}', "[" * 100_000]
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines), encoding="utf-8")
    found = faults(tmp_path)
    assert len(found) == 5
    for number, line in enumerate(found, start=2):
        assert line.startswith(f"metadata.jsonl, line {number}: expected a JSON object")


def test_umlauts_are_found_however_they_are_written(tmp_path: Path) -> None:
    composed = "Größe (2).jpg"
    decomposed = unicodedata.normalize("NFD", composed)
    photo(tmp_path / decomposed)
    table(tmp_path / "metadata.csv", [(composed, "a caption")])
    found = find_photographs(str(tmp_path), shares=(1, 0, 0))["train"]
    assert Path(found[0].path).is_file()
    table(tmp_path / "metadata.csv", [(composed, "a caption"), (decomposed, "another")])
    assert "expected one spelling of a name" in faults(tmp_path)[0]


def test_a_name_that_is_no_line_of_text_is_refused(tmp_path: Path) -> None:
    photo(tmp_path / "a\nb.jpg")
    (tmp_path / "c\udcff.jpg").write_bytes(b"x")
    found = faults(tmp_path)
    assert len(found) == 2
    assert all("rename the file" in line for line in found)


def coco(path: Path, images: Mapping[str, Sequence[str]]) -> None:
    numbers = {name: n for n, name in enumerate(images)}
    notes = [
        {"id": 10 * numbers[name] + n, "image_id": numbers[name], "caption": text}
        for name, texts in images.items()
        for n, text in enumerate(texts)
    ]
    listed = [{"id": n, "file_name": name} for name, n in numbers.items()]
    path.write_text(json.dumps({"images": listed, "annotations": notes}), encoding="utf-8")


def test_coco_captions_find_their_photographs_below_the_root(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("val/1.jpg", "val/2.jpg", "other/3.jpg"):
        photo(tmp_path / "photos" / name)
    captions = tmp_path / "captions.json"
    coco(captions, {"1.jpg": ["a", "b"], "2.jpg": ["c"]})
    with caplog.at_level(logging.INFO):
        found = find_photographs(str(tmp_path / "photos"), captions=captions, shares=(1, 0, 0))
    assert [(each.name, each.captions) for each in found["train"]] == [
        ("val/1.jpg", ("a", "b")),
        ("val/2.jpg", ("c",)),
    ]
    assert "1 other photographs have no captions in captions.json" in caplog.text


def test_coco_photographs_that_are_missing_or_there_twice_are_listed(tmp_path: Path) -> None:
    for name in ("a/1.jpg", "b/1.jpg", "a/2.jpg"):
        photo(tmp_path / "photos" / name)
    captions = tmp_path / "captions.json"
    coco(captions, {"1.jpg": ["a"], "2.jpg": ["b"], "3.jpg": ["c"]})
    found = faults(tmp_path / "photos", captions=captions)
    assert len(found) == 2
    assert "1.jpg: expected one photograph of that name, found 2: a/1.jpg, b/1.jpg" in found[0]
    assert "3.jpg: expected one photograph of that name, found none; add it" in found[1]


def test_karpathys_splits_are_taken(tmp_path: Path) -> None:
    images = []
    for n, split in enumerate(["train", "restval", "val", "test", "train"]):
        photo(tmp_path / f"photos/{n}.jpg")
        sentences = [{"raw": f"caption {k} of {n}", "tokens": []} for k in range(n + 1)]
        images.append({"filename": f"{n}.jpg", "split": split, "sentences": sentences})
    captions = tmp_path / "dataset.json"
    captions.write_text(json.dumps({"images": images}), encoding="utf-8")
    found = find_photographs(str(tmp_path / "photos"), captions=captions)
    assert names_of(found) == {
        "train": ["0.jpg", "1.jpg", "4.jpg"],
        "dev": ["2.jpg"],
        "test": ["3.jpg"],
    }
    assert [len(each.captions) for each in found["train"]] == [1, 2, 5]


def test_a_table_elsewhere_names_paths_from_the_root(tmp_path: Path) -> None:
    photo(tmp_path / "photos/sub/a.jpg")
    table(tmp_path / "captions.csv", [("sub/a.jpg", "a caption")])
    options = {"captions": tmp_path / "captions.csv", "shares": (1.0, 0.0, 0.0)}
    found = find_photographs(str(tmp_path / "photos"), **options)  # type: ignore[arg-type]
    assert found["train"][0].name == "sub/a.jpg"
    photo(tmp_path / "photos/b.jpg")
    assert "captions.csv, b.jpg: expected a row" in faults(tmp_path / "photos", **options)[0]


def test_captions_given_twice_are_refused(tmp_path: Path) -> None:
    splits(tmp_path, {"train": ["a.jpg"]})
    with pytest.raises(ConfigError, match=r"has captions in train/metadata.csv, and .*given too"):
        find_photographs(str(tmp_path), captions=tmp_path / "train/metadata.csv")


def test_two_tables_of_one_folder_and_two_dev_splits_are_refused(tmp_path: Path) -> None:
    splits(tmp_path, {"train": ["a.jpg"], "val": ["b.jpg"], "dev": ["c.jpg"]})
    with pytest.raises(DataError, match="one folder of the dev split, found dev and val"):
        find_photographs(str(tmp_path))
    table(tmp_path / "train/metadata.jsonl", [])
    with pytest.raises(DataError, match=r"one table of captions, found metadata.csv and meta"):
        find_photographs(str(tmp_path))


def test_what_is_no_folder_of_photographs_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="found none"):
        find_photographs(str(tmp_path / "gone"))
    (tmp_path / "a.jpg").write_bytes(b"x")
    with pytest.raises(DataError, match="found a file"):
        find_photographs(str(tmp_path / "a.jpg"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="expected photographs, found 0 other files"):
        find_photographs(str(tmp_path / "empty"))
    with pytest.raises(ConfigError, match="s3:// URL"):
        find_photographs("https://example.org/photos")
    for name, error in (("gone.csv", DataError), ("a.jpg", ConfigError)):
        with pytest.raises(error):
            find_photographs(str(tmp_path), captions=tmp_path / name)


def test_links_are_followed_and_circles_end(tmp_path: Path) -> None:
    photo(tmp_path / "real/a.jpg")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/linked").symlink_to(tmp_path / "real")
    (tmp_path / "real/back").symlink_to(tmp_path / "photos")
    found = find_photographs(str(tmp_path / "photos"))["gallery"]
    assert [each.name for each in found] == ["linked/a.jpg"]


@pytest.fixture
def store() -> Iterator[MemoryFileSystem]:
    with s3_in_memory() as store:
        yield store


def test_a_bucket_is_read_as_a_folder_is(store: MemoryFileSystem, tmp_path: Path) -> None:
    splits(tmp_path, {"train": ["a b.jpg", "ü.jpg"], "test": ["c.jpg"]})
    for path in tmp_path.rglob("*.*"):
        store.pipe_file(f"/bucket/set/{path.relative_to(tmp_path)}", path.read_bytes())
    there, here = find_photographs("s3://bucket/set/"), find_photographs(str(tmp_path))
    assert names_of(there) == names_of(here)
    for one, other in zip(there["train"], here["train"], strict=True):
        assert one.captions == other.captions
        assert one.path == f"s3://bucket/set/{one.name}"
    store.pipe_file("/bucket/set/test/c.jpg", store.cat_file("/bucket/set/train/ü.jpg"))
    with pytest.raises(DataError, match="the same bytes as"):
        find_photographs("s3://bucket/set")
    with pytest.raises(DataError, match=r"found nothing|not found"):
        find_photographs("s3://bucket/other")


@pytest.mark.skipif(not SHARED.is_dir(), reason="the real photographs are not beside the project")
def test_real_photographs_are_found_with_their_captions() -> None:
    found = find_photographs(str(SHARED / "flickr8k"))
    assert {split: len(own) for split, own in found.items()} == {
        "train": 400,
        "dev": 100,
        "test": 100,
    }
    assert {len(each.captions) for own in found.values() for each in own} == {5}
    coco_mini = SHARED / "coco-mini"
    captions = coco_mini / "annotations/captions_val2017.json"
    drawn = find_photographs(str(coco_mini), captions=captions)
    assert sum(map(len, drawn.values())) == 79
