"""Objects of s3:// addresses that are in memory, each with an ETag."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import fsspec
from fsspec.implementations.memory import MemoryFileSystem


@contextmanager
def s3_in_memory() -> Iterator[MemoryFileSystem]:
    """While it is entered, s3:// leads to an empty store, for everybody in this process."""

    class Store(MemoryFileSystem):
        protocol = "s3"
        store: dict = {}  # noqa: RUF012
        pseudo_dirs: list = [""]  # noqa: RUF012

        @classmethod
        def _strip_protocol(cls, path: str) -> str:
            return "/" + path.removeprefix("s3://").strip("/")

        def find(self, path: str, **options: object) -> dict:
            entries = super().find(path, **options)
            for name, entry in entries.items():
                entry["ETag"] = f'"{hash(self.cat_file(name))}"'
            return entries

    # Found now, were it the first time: else nothing would take the place of `Store` at the end.
    known = fsspec.get_filesystem_class("s3")
    fsspec.register_implementation("s3", Store, clobber=True)
    try:
        yield Store()
    finally:
        fsspec.register_implementation("s3", known, clobber=True)
