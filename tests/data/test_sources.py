"""Reaching data: generated once, fetched only where it changed, whole or not at all."""

import json
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
import pytest

from cpfean.config import DataConfig, SyntheticConfig
from cpfean.data import synthetic
from cpfean.data.sources import Fetching, fetch_folder, resolve_data
from cpfean.data.split import data_fingerprint, validate_folder
from cpfean.errors import DataError
from cpfean.progress import Progress

TINY = SyntheticConfig(train_images=3, dev_images=2, test_images=2, num_regions=6, feature_dim=8)
URL = "memory://bucket/set"


class Storage:
    """A file system in memory that remembers what was fetched, and can fail."""

    def __init__(self) -> None:
        self.inner = fsspec.filesystem("memory")
        self.fetched: list[str] = []
        self.fails: dict[str, Exception] = {}
        self.cuts = False  # the last byte of every file off

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def put(self, folder: Path, *extra: str) -> None:
        for path in folder.iterdir():
            self.inner.pipe_file(f"{URL}/{path.name}", path.read_bytes())
        for name in extra:
            self.inner.pipe_file(f"{URL}/{name}", b"not data")

    def get_file(self, source: str, target: str, **options: Any) -> None:
        name = source.rsplit("/", 1)[-1]
        self.fetched.append(name)
        if name in self.fails:
            Path(target).write_bytes(b"half of")
            raise self.fails[name]
        self.inner.get_file(source, target, **options)
        if self.cuts:
            Path(target).write_bytes(Path(target).read_bytes()[:-1])

    def news(self) -> set[str]:
        """What was fetched since the last call."""
        result, self.fetched = set(self.fetched), []
        return result


@pytest.fixture
def storage(folder: Path) -> Iterator[Storage]:
    storage = Storage()
    storage.put(folder, "README.md", "train_truth.json", "other/train_ims.npy")
    yield storage
    storage.inner.rm("memory://bucket", recursive=True)


def test_a_folder_is_taken_as_it_is(folder: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    assert resolve_data(DataConfig(path=f" {folder} "), cache_dir=cache) == folder
    assert not cache.exists()


def test_an_absent_folder_is_refused_with_what_is_near(folder: Path, tmp_path: Path) -> None:
    for absent in (folder.parent / "date", folder.parent / "far" / "away"):
        with pytest.raises(DataError, match="expected a folder, found none") as refusal:
            resolve_data(DataConfig(path=str(absent)), cache_dir=tmp_path / "cache")
        assert f"nearest: {folder}." in str(refusal.value)
    with pytest.raises(DataError, match="an s3:// URL"):
        resolve_data(DataConfig(path="ftp://host/set"), cache_dir=tmp_path / "cache")


def test_the_synthetic_set_is_made_once_and_is_sound(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = DataConfig(synthetic=TINY)
    made = resolve_data(config, cache_dir=tmp_path / "cache")
    assert validate_folder(made, num_regions=6) == []
    other = replace(TINY, seed=1)
    assert resolve_data(DataConfig(synthetic=other), cache_dir=tmp_path / "cache") != made

    def again(*_: object) -> None:
        raise AssertionError("made again")

    monkeypatch.setattr(synthetic, "write_synthetic", again)
    assert resolve_data(config, cache_dir=tmp_path / "cache") == made
    # Everything under one name, locks and leftovers aside.
    folders = [path for path in (tmp_path / "cache").iterdir() if path.is_dir()]
    assert len(folders) == 2


def test_a_generator_that_dies_leaves_nothing_that_looks_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = DataConfig(synthetic=TINY)
    write = synthetic.write_synthetic

    def dies(folder: Path, config: SyntheticConfig) -> None:
        write(folder, config)
        (folder / "train_ims.npy").unlink()
        raise OSError("no space left on device")

    monkeypatch.setattr(synthetic, "write_synthetic", dies)
    with pytest.raises(OSError, match="no space left"):
        resolve_data(config, cache_dir=tmp_path)
    assert [path for path in tmp_path.iterdir() if path.is_dir()] == []

    monkeypatch.setattr(synthetic, "write_synthetic", write)
    made = resolve_data(config, cache_dir=tmp_path)
    killed = tmp_path / f".unfinished-{made.name}-killed"  # as SIGKILL would leave it
    made.rename(killed)
    assert validate_folder(resolve_data(config, cache_dir=tmp_path)) == []
    assert not killed.exists()


def test_a_remote_folder_is_fetched_whole_without_what_is_no_data(
    storage: Storage, folder: Path, tmp_path: Path
) -> None:
    fetched = fetch_folder(storage, URL, cache_dir=tmp_path / "cache")
    assert validate_folder(fetched) == []
    assert data_fingerprint(fetched) == data_fingerprint(folder)
    assert storage.news() == {path.name for path in folder.iterdir()}
    assert fetch_folder(storage, URL + "/", cache_dir=tmp_path / "cache") == fetched
    assert storage.news() == set()


def test_only_what_changed_is_fetched_again(storage: Storage, tmp_path: Path) -> None:
    fetched = fetch_folder(storage, URL, cache_dir=tmp_path)
    storage.news()
    captions = storage.inner.cat_file(f"{URL}/dev_caps.txt")
    changed = captions.replace(b"caption", b"capsize", 1)  # of the same length
    storage.inner.pipe_file(f"{URL}/dev_caps.txt", changed)
    storage.inner.rm(f"{URL}/test_scores.npy")
    (fetched / "train_ids.txt").unlink()
    with (fetched / "train_ims.npy").open("ab") as file:
        file.write(b"\0")
    fetch_folder(storage, URL, cache_dir=tmp_path)
    assert storage.news() == {"dev_caps.txt", "train_ids.txt", "train_ims.npy"}
    assert (fetched / "dev_caps.txt").read_bytes() == changed
    assert not (fetched / "test_scores.npy").exists()

    (fetched / "fetched.json").write_text("[1, 2", "utf-8")
    fetch_folder(storage, URL, cache_dir=tmp_path)
    assert len(storage.news()) == 21  # seven of each split, one gone; the vocabulary


def test_a_fetch_that_fails_keeps_the_old_file_and_is_taken_up_again(
    storage: Storage, tmp_path: Path
) -> None:
    fetched = fetch_folder(storage, URL, cache_dir=tmp_path)
    before = (fetched / "dev_caps.txt").read_bytes()
    storage.inner.pipe_file(f"{URL}/dev_caps.txt", before.upper())
    storage.fails["dev_caps.txt"] = ConnectionResetError("reset by peer")
    with pytest.raises(DataError, match=r"dev_caps\.txt: cannot be read: reset by peer"):
        fetch_folder(storage, URL, cache_dir=tmp_path)
    assert (fetched / "dev_caps.txt").read_bytes() == before
    assert json.loads((fetched / "fetched.json").read_text("utf-8"))["dev_caps.txt"] == []
    assert list(fetched.glob(".unfinished-*")) == []

    (fetched / ".unfinished-killed").write_bytes(b"half")  # as SIGKILL would leave it
    storage.fails.clear()
    storage.news()
    fetch_folder(storage, URL, cache_dir=tmp_path)
    assert storage.news() == {"dev_caps.txt"}
    assert (fetched / "dev_caps.txt").read_bytes() == before.upper()
    assert list(fetched.glob(".unfinished-*")) == []


def test_a_file_that_changes_while_it_is_fetched_is_refused(
    storage: Storage, tmp_path: Path
) -> None:
    storage.cuts = True
    with pytest.raises(DataError, match="was it being written"):
        fetch_folder(storage, URL, cache_dir=tmp_path)


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (FileNotFoundError("x"), "no such folder"),
        (PermissionError("Forbidden"), "not allowed.*credentials"),
        (TimeoutError("timed out"), "cannot be read: timed out"),
        (type("NoCredentialsError", (Exception,), {"__module__": "botocore.exceptions"})("none"),
         "credentials"),
    ],
)  # fmt: skip
def test_storage_that_fails_is_a_data_error(
    storage: Storage, tmp_path: Path, error: Exception, words: str
) -> None:
    storage.fails["dev_caps.txt"] = error
    with pytest.raises(DataError, match=words):
        fetch_folder(storage, URL, cache_dir=tmp_path)
    storage.fails["dev_caps.txt"] = ZeroDivisionError()  # a defect stays one
    with pytest.raises(ZeroDivisionError):
        fetch_folder(storage, URL, cache_dir=tmp_path)


def test_of_two_test_splits_only_the_one_that_is_read_is_fetched(
    storage: Storage, folder: Path, tmp_path: Path
) -> None:
    fetch_folder(storage, URL, cache_dir=tmp_path)
    storage.news()
    for path in sorted(folder.glob("test_*")):
        whole = path.name.replace("test_", "testall_")
        storage.inner.pipe_file(f"{URL}/{whole}", path.read_bytes())
        path.rename(folder / whole)
    fetched = fetch_folder(storage, URL, cache_dir=tmp_path)
    assert storage.news() == {path.name for path in folder.glob("testall_*")}
    assert not list(fetched.glob("test_*"))
    assert validate_folder(fetched) == []
    assert data_fingerprint(fetched) == data_fingerprint(folder)
    storage.inner.rm([f"{URL}/{path.name}" for path in folder.glob("testall_*")])
    assert list(fetch_folder(storage, URL, cache_dir=tmp_path).glob("testall_*")) == []


def test_a_folder_that_is_none_is_named_as_what_it_is(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "link").symlink_to("gone")
    for name, found in (("file", "a file"), ("link", "a link that leads nowhere, to gone")):
        with pytest.raises(DataError, match=f"expected a folder, found {found}"):
            resolve_data(DataConfig(path=str(tmp_path / name)), cache_dir=tmp_path / "cache")


def test_a_prefix_without_data_is_refused(storage: Storage, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such folder"):
        fetch_folder(storage, "memory://bucket/none", cache_dir=tmp_path / "cache")
    with pytest.raises(DataError, match=r"expected files like train_ims\.npy, found set"):
        fetch_folder(storage, "memory://bucket", cache_dir=tmp_path / "cache")
    assert [path for path in (tmp_path / "cache").iterdir() if path.is_dir()] == []


def test_those_who_ask_at_the_same_time_fetch_once(storage: Storage, tmp_path: Path) -> None:
    folders: list[Path] = []
    threads = [
        threading.Thread(
            target=lambda: folders.append(fetch_folder(storage, URL, cache_dir=tmp_path))
        )
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(folders)) == 1
    assert len(folders) == 4
    assert len(storage.fetched) == len(storage.news())  # none twice


def test_an_s3_url_goes_through_s3fs(
    storage: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("s3fs.S3FileSystem", lambda: storage)
    asked = []
    list_files = storage.inner.ls

    def ls(url: str, detail: bool) -> Any:
        asked.append(url)
        return list_files(url.replace("s3://", "memory://"), detail=detail)

    storage.ls = ls  # type: ignore[attr-defined]
    fetched = resolve_data(DataConfig(path="s3://bucket/set/"), cache_dir=tmp_path)
    assert asked == ["s3://bucket/set"]
    assert validate_folder(fetched) == []


def test_a_long_fetch_says_how_long_it_still_takes(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="cpfean")
    now = iter(range(0, 100_000, 11))
    told = Progress(f"fetching {URL}", total=200, unit="%", clock=lambda: float(next(now)))
    fetching = Fetching(told)
    fetching.relative_update(50)
    fetching.relative_update(100)
    assert [record.message for record in caplog.records] == [
        f"fetching {URL}: 25 %, 33 s left",
        f"fetching {URL}: 75 %, 7 s left",
    ]


def test_what_was_not_fetched_is_neither_replaced_nor_removed(
    storage: Storage, tmp_path: Path
) -> None:
    storage.inner.rm(f"{URL}/test_scores.npy")
    cached = fetch_folder(storage, URL, cache_dir=tmp_path)
    for name in ("notes.txt", "test_scores.npy"):
        (cached / name).write_text("theirs", encoding="utf-8")
    with pytest.raises(DataError, match=r"test_scores\.npy: expected nothing but what was fetched"):
        fetch_folder(storage, URL, cache_dir=tmp_path)
    assert (cached / "test_scores.npy").read_text(encoding="utf-8") == "theirs"
    (cached / "test_scores.npy").unlink()
    fetch_folder(storage, URL, cache_dir=tmp_path)
    assert (cached / "notes.txt").read_text(encoding="utf-8") == "theirs"


def test_a_copy_of_the_synthetic_set_beside_it_is_left_alone(tmp_path: Path) -> None:
    config = DataConfig(synthetic=TINY)
    made = resolve_data(config, cache_dir=tmp_path)
    backup = tmp_path / f"{made.name}-backup"
    made.rename(backup)
    assert resolve_data(config, cache_dir=tmp_path) == made
    assert backup.is_dir()
