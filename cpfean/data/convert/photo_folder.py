"""The files of a folder of photographs, on this machine or in an object store."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import os
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from cpfean.errors import ConfigError, DataError, ServiceError, message_of
from cpfean.files import is_there, open_file, read_file
from cpfean.folders import expanded
from cpfean.progress import Progress

# HEIC and JPEG XL are not read, but are photographs: to be refused by name, not overlooked.
_SUFFIXES = frozenset(
    (
        *(".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".apng", ".webp", ".gif", ".tif"),
        *(".tiff", ".bmp", ".ppm", ".pgm", ".pbm", ".jp2", ".avif", ".heic", ".heif", ".jxl"),
    )
)
_LARGEST_TEXT = 2**30  # bytes of a file of captions


@dataclass(frozen=True, kw_only=True)
class PhotoFolder:
    """A folder with all that is below it; what is hidden (.name, __MACOSX) is left out.

    Attributes:
        root: as it was given, without a slash at its end.
        files: size and, in an object store, version of each file, by its path from the root.
        filesystem: fsspec's of the object store; None on this machine.
    """

    root: str
    files: dict[str, tuple[int, str]]
    filesystem: Any = field(default=None, repr=False)

    def photographs(self) -> list[str]:
        """Paths of what is a photograph by its name, sorted."""
        return sorted(name for name in self.files if is_photograph(name))

    def path(self, name: str) -> str:
        """Where a file is, as `read_photograph` takes it."""
        return f"{self.root}/{name}"

    def named(self, name: str) -> str | None:
        """The file that is meant by a name; None if there is none.

        An umlaut may be one character or two, and what wrote the folder may have chosen otherwise
        than what wrote the name.
        """
        if name in self.files:
            return name
        return self._by_form.get(unicodedata.normalize("NFC", name))

    def with_name(self, name: str) -> list[str]:
        """The photographs in whatever folder below that have a name, sorted."""
        return self._by_last.get(unicodedata.normalize("NFC", name.rsplit("/", 1)[-1]), [])

    def read(self, name: str) -> bytes:
        """The content of a text.

        Raises:
            OSError: it cannot be read, or is beyond a gigabyte.
        """
        if self.filesystem is None:
            return read_file(Path(self.path(name)), limit=_LARGEST_TEXT)
        if self.files[name][0] > _LARGEST_TEXT:
            raise OSError(0, f"expected at most {_LARGEST_TEXT:,} bytes")
        with _answered(self.path(name)):
            content: bytes = self.filesystem.cat_file(self.path(name))
        return content

    def doubles(self, names: list[str]) -> list[list[str]]:
        """The given files in groups of equal content; most are alone.

        Only files of one size are read. In an object store their versions (ETags) are compared
        instead: equal ones mean equal content, but not all equal contents have equal ones.
        """
        by_size: dict[int, list[str]] = {}
        for name in names:
            by_size.setdefault(self.files[name][0], []).append(name)
        alike = [name for some in by_size.values() if len(some) > 1 for name in some]
        progress = Progress("looking for photographs that are there twice", total=len(alike))
        digests = {}
        for done, name in enumerate(alike, start=1):
            digests[name] = self._digest(name)
            progress.step(done)
        groups: dict[tuple[Any, ...], list[str]] = {}
        for name in names:
            # What cannot be read is told by whoever decodes it.
            digest = digests.get(name)
            groups.setdefault((name,) if digest is None else ("", digest), []).append(name)
        return list(groups.values())

    def _digest(self, name: str) -> str | None:
        if self.filesystem is not None:
            return self.files[name][1] or None
        try:
            with open_file(Path(self.path(name))) as file:
                return hashlib.file_digest(cast(io.BufferedReader, file), "sha256").hexdigest()
        except OSError:
            return None

    @functools.cached_property
    def _by_form(self) -> dict[str, str]:
        return {unicodedata.normalize("NFC", name): name for name in sorted(self.files)}

    @functools.cached_property
    def _by_last(self) -> dict[str, list[str]]:
        by_last: dict[str, list[str]] = {}
        for name in self.photographs():
            last = unicodedata.normalize("NFC", name.rsplit("/", 1)[-1])
            by_last.setdefault(last, []).append(name)
        return by_last


def is_photograph(name: str) -> bool:
    """Whether a file is taken for a photograph by its name."""
    return os.path.splitext(name)[1].lower() in _SUFFIXES


def open_folder(root: str) -> PhotoFolder:
    """Lists a folder.

    Args:
        root: a folder, or an s3:// URL of one.

    Raises:
        ConfigError: a URL of another kind.
        DataError: no such folder, or a part of it that cannot be read.
        ServiceError: an object store that does not answer.
    """
    if root.startswith("s3://"):
        return _listed_store(root.rstrip("/"))
    if "://" in root:
        raise ConfigError(
            f"{root}: expected a folder or an s3:// URL; fetch the photographs to one of them."
        )
    folder = expanded(root, what="the folder of photographs")
    if not folder.is_dir():
        found = "a file" if is_there(folder) else "none"
        raise DataError(f"{root}: expected a folder of photographs, found {found}.")
    return PhotoFolder(root=str(folder).rstrip("/") or "/", files=dict(_walked(folder)))


def _walked(folder: Path) -> Iterator[tuple[str, tuple[int, str]]]:
    """Files below a folder, links followed, but into no folder twice."""

    def refuse(error: OSError) -> None:
        raise DataError(f"{error.filename}: cannot be read: {error.strerror}; check the rights.")

    seen = set()
    for top, folders, files in os.walk(folder, followlinks=True, onerror=refuse):
        real = os.path.realpath(top)
        folders[:] = sorted(f for f in folders if not _is_hidden(f)) if real not in seen else []
        if real in seen:
            continue
        seen.add(real)
        for name in files:
            path = os.path.join(top, name)
            if not _is_hidden(name):
                # A link to nowhere and a pipe are listed too: whoever reads them tells.
                size = os.stat(path).st_size if os.path.exists(path) else 0
                yield os.path.relpath(path, folder).replace(os.sep, "/"), (size, "")


def _listed_store(url: str) -> PhotoFolder:
    import fsspec  # only those who need it pay for the import

    with _answered(url):
        filesystem, path = fsspec.core.url_to_fs(url)
        filesystem.invalidate_cache()
        entries = filesystem.find(path, detail=True)
    prefix = f"{path.strip('/')}/"
    files = {}
    for place, entry in entries.items():
        name = place.strip("/").removeprefix(prefix)
        if entry["type"] == "file" and not any(map(_is_hidden, name.split("/"))):
            files[name] = (int(entry["size"] or 0), str(entry.get("ETag") or "").strip('"'))
    if not files:
        raise DataError(f"{url}: expected photographs, found nothing; check bucket and prefix.")
    return PhotoFolder(root=url, files=files, filesystem=filesystem)


@contextlib.contextmanager
def _answered(url: str) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise DataError(f"{url}: not found; check bucket and prefix.") from None
    except PermissionError as error:
        raise ServiceError(
            f"{url}: not allowed ({message_of(error)}); check credentials and policy."
        ) from None
    except Exception as error:  # botocore's own errors have no ancestor but Exception
        raise ServiceError(f"{url}: cannot be read: {message_of(error)}") from None


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name == "__MACOSX"
