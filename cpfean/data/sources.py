"""Where a data folder comes from: generated, already there, or fetched from object storage.

What is made or fetched goes to a cache folder. Several processes may ask for the same data at the
same time: one works, the others wait for it. A file is in the cache whole or not at all.
"""

from __future__ import annotations

import difflib
import hashlib
import inspect
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fsspec.callbacks import Callback

from cpfean.config import DataConfig, SyntheticConfig
from cpfean.data import concepts, scenes, synthetic, wording
from cpfean.data.split import native_names, used_names
from cpfean.errors import DataError
from cpfean.files import is_there, read_file
from cpfean.folders import cannot_write, expanded, made
from cpfean.progress import Progress

logger = logging.getLogger(__name__)

_RECORD = "fetched.json"  # in a cached folder: which version of each file it holds
_LARGEST_RECORD = 1_000_000  # bytes
_UNFINISHED = ".unfinished-"
_WAIT = 3600.0  # seconds to wait for another process that fetches the same data


def resolve_data(config: DataConfig, *, cache_dir: Path) -> Path:
    """The folder that holds the configured data, made or fetched if need be.

    Args:
        config: `path` is "synthetic", an s3:// URL, or a folder.
        cache_dir: where generated and fetched data are kept; made if absent.

    Raises:
        DataError: no such folder, or storage that cannot be read.
    """
    path = config.path.strip()
    if path == "synthetic":
        return _generated(config.synthetic, cache_dir)
    if path.startswith("s3://"):
        import s3fs  # only those who need it pay for the import

        return fetch_folder(s3fs.S3FileSystem(), path, cache_dir=cache_dir)
    if "://" in path:
        raise DataError(
            f'data.path {path!r}: expected "synthetic", a folder or an s3:// URL; copy the data to '
            "one of them."
        )
    folder = expanded(path, what="data.path")
    if os.path.isdir(folder):
        return folder
    if not is_there(folder):
        raise DataError(f"data.path {path!r}: expected a folder, found none{_nearby(folder)}")
    link = os.path.islink(folder) and not os.path.exists(folder)
    found = f"a link that leads nowhere, to {os.readlink(folder)}" if link else "a file"
    raise DataError(f"data.path {path!r}: expected a folder, found {found}{_nearby(folder)}")


def fetch_folder(filesystem: Any, url: str, *, cache_dir: Path) -> Path:
    """Brings a folder of object storage up to date in the cache.

    Only files of the native format that are read are fetched, and of those only what changed since
    the last time, by size and by version (ETag, or time of change). Local files that are gone in
    the storage, or are read no longer, are removed.

    Args:
        filesystem: an fsspec file system.
        url: of the folder, as the file system takes it.

    Raises:
        DataError: the folder is absent or empty, or the storage fails after its own retries.
    """
    url = url.rstrip("/")
    name = hashlib.sha256(url.encode()).hexdigest()[:16]
    folder = cache_dir / f"remote-{name}"
    with _alone(made(cache_dir) / f"remote-{name}.lock"):
        listed = _listed(filesystem, url)
        folder.mkdir(exist_ok=True)
        for leftover in folder.glob(f"{_UNFINISHED}*"):
            leftover.unlink()
        record = _read_record(folder / _RECORD)
        if record or not is_there(folder / _RECORD):  # of a damaged one nobody knows
            _refuse_strange(folder, record, url=url)
        changed = [
            name
            for name, (_, size, version) in listed.items()
            if record.get(name) != [size, version] or not _has(folder / name, size)
        ]
        total = sum(listed[name][1] for name in changed)
        if changed:
            logger.info("fetching %d files (%.0f MB) from %s", len(changed), total / 1e6, url)
        progress = Fetching(Progress(f"fetching {url}", total=total, unit="%"))
        for name in changed:
            source, size, version = listed[name]
            record[name] = []  # on its way: what is there of it is ours
            _write_record(folder / _RECORD, record)
            _fetch(filesystem, source, folder / name, size=size, progress=progress)
            record[name] = [size, version]
            _write_record(folder / _RECORD, record)
        for name in record.keys() - listed.keys():
            (folder / name).unlink(missing_ok=True)
            del record[name]
            _write_record(folder / _RECORD, record)
    return folder


def _refuse_strange(folder: Path, record: dict[str, list[Any]], *, url: str) -> None:
    """Refuses data in a cached folder that was not fetched: it would be replaced or removed.

    Raises:
        DataError: names the first such file.
    """
    for name in native_names():
        if is_there(folder / name) and name not in record:
            raise DataError(
                f"{folder / name}: expected nothing but what was fetched from {url}, found a file "
                "that was not; move it elsewhere."
            )


class Fetching(Callback):
    """Says how much of all files has come, to what fsspec calls back."""

    def __init__(self, progress: Progress) -> None:
        super().__init__()
        self._progress = progress
        self._done = 0

    def relative_update(self, inc: int = 1) -> None:
        self._done += inc
        self._progress.step(self._done)


def _generated(config: SyntheticConfig, cache_dir: Path) -> Path:
    digest = hashlib.sha256(json.dumps(asdict(config), sort_keys=True).encode())
    for module in (concepts, scenes, wording, synthetic):  # another generator, another set
        digest.update(inspect.getsource(module).encode())
    folder = cache_dir / f"synthetic-{digest.hexdigest()[:12]}"
    if os.path.isdir(folder):
        return folder
    with _alone(made(cache_dir) / f"{folder.name}.lock"):
        if not folder.is_dir():
            # Under a name that nobody gives to a folder, such as a copy of ours.
            prefix = f"{_UNFINISHED}{folder.name}-"
            for leftover in cache_dir.glob(f"{prefix}*"):
                shutil.rmtree(leftover)
            unfinished = Path(tempfile.mkdtemp(prefix=prefix, dir=cache_dir))
            try:
                synthetic.write_synthetic(unfinished, config)
                unfinished.rename(folder)
            finally:
                shutil.rmtree(unfinished, ignore_errors=True)
    return folder


def _listed(filesystem: Any, url: str) -> dict[str, tuple[str, int, str]]:
    """Files of the native format by name: where, how large, which version."""
    with _readable(url):
        filesystem.invalidate_cache()
        entries = filesystem.ls(url, detail=True)
    named = [(entry["name"].rsplit("/", 1)[-1], entry) for entry in entries]
    wanted = set(used_names(name for name, entry in named if entry["type"] == "file"))
    files = {}
    for name, entry in named:
        if entry["type"] == "file" and name in wanted:
            versions = (entry.get(key) for key in ("ETag", "LastModified", "mtime", "created"))
            version = next((str(v) for v in versions if v is not None), "")
            files[name] = (entry["name"], int(entry["size"]), version)
    if not files:
        others = [name for name, _ in named]
        raise DataError(
            f"{url}: expected files like train_ims.npy, found "
            f"{', '.join(sorted(others)[:5]) or 'nothing'}; check the prefix."
        )
    return files


def _fetch(filesystem: Any, source: str, target: Path, *, size: int, progress: Callback) -> None:
    handle, unfinished = tempfile.mkstemp(prefix=_UNFINISHED, dir=target.parent)
    os.close(handle)
    try:
        with _readable(source):
            filesystem.get_file(source, unfinished, callback=progress)
        found = os.path.getsize(unfinished)
        if found != size:
            raise DataError(
                f"{source}: expected {size:,} bytes, got {found:,}; was it being written? "
                "Try again."
            )
        os.replace(unfinished, target)
    finally:
        Path(unfinished).unlink(missing_ok=True)


@contextmanager
def _readable(url: str) -> Iterator[None]:
    """Turns what storage clients raise into a DataError; they have retried already."""
    try:
        yield
    except FileNotFoundError:
        raise DataError(
            f"{url}: no such folder or file; check the bucket and the prefix."
        ) from None
    except PermissionError as error:
        raise DataError(f"{url}: not allowed ({error}); check the credentials.") from None
    except OSError as error:
        raise DataError(f"{url}: cannot be read: {error}; check the connection.") from None
    except Exception as error:
        # botocore's own errors (no credentials, no endpoint) have no ancestor but Exception.
        if type(error).__module__.split(".")[0] not in ("botocore", "aiobotocore", "aiohttp"):
            raise
        raise DataError(f"{url}: {error}; check credentials and AWS_ENDPOINT_URL.") from None


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    import filelock

    lock = filelock.FileLock(path, timeout=_WAIT)
    try:
        with lock:
            yield
    except filelock.Timeout:
        raise DataError(
            f"{path}: another process has been preparing the same data for {_WAIT / 60:.0f} "
            "minutes; see whether it hangs, then try again."
        ) from None
    except PermissionError as error:  # the lock of another user, in a cache of both
        if error.filename != str(path):
            raise
        raise cannot_write(path, error) from None


def _has(path: Path, size: int) -> bool:
    return path.is_file() and path.stat().st_size == size


def _read_record(path: Path) -> dict[str, list[Any]]:
    try:
        record = json.loads(read_file(path, limit=_LARGEST_RECORD))
    except (OSError, ValueError):
        return {}  # nothing was fetched yet, or a damaged record: fetch everything
    known = record if isinstance(record, dict) else {}
    return {name: of for name, of in known.items() if name in native_names()}


def _write_record(path: Path, record: dict[str, list[Any]]) -> None:
    unfinished = path.with_name(f"{_UNFINISHED}{path.name}")
    unfinished.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    os.replace(unfinished, path)


def _nearby(folder: Path) -> str:
    """What exists instead: folders of a like name, or data folders in the same place."""
    parent = folder.parent
    while not parent.is_dir() and parent != parent.parent:
        parent = parent.parent
    try:
        siblings = sorted(path.name for path in parent.iterdir() if path.is_dir())
    except OSError:
        siblings = []
    near = difflib.get_close_matches(folder.name, siblings, n=3, cutoff=0.5)
    near += [
        name for name in siblings if any((parent / name).glob("*_ims.npy")) and name not in near
    ]
    shown = ", ".join(str(parent / name) for name in near[:5])
    return f"; nearest: {shown}." if shown else f"; {parent} has no data folder either."


__all__ = ["fetch_folder", "resolve_data"]
