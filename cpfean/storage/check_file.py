"""Whether a storage takes what is written, and who else sees it: by a small file with a token."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from cpfean.errors import ServiceError, message_of


@contextmanager
def check_file(storage: str) -> Iterator[str]:
    """A new file in a storage that holds a token, which is given; the file is gone at the end.

    Args:
        storage: a folder or a URL.

    Raises:
        ServiceError: it cannot be written; what may be the matter is on the second line.
    """
    token = uuid.uuid4().hex
    filesystem, path = _filesystem(storage)
    try:
        filesystem.makedirs(path, exist_ok=True)
        filesystem.pipe_file(f"{path}/.doctor-{token}", token.encode())
    except Exception as error:  # fsspec's stores raise their own
        raise ServiceError(
            f"{storage} cannot be written: {message_of(error)}\nrights, credentials, space"
        ) from None
    try:
        yield token
    finally:
        filesystem.rm_file(f"{path}/.doctor-{token}")


def read_check_file(storage: str, token: str) -> str:
    """What the file of that token holds, seen from here; empty if it is not there to be read."""
    filesystem, path = _filesystem(storage)
    try:
        return filesystem.cat_file(f"{path}/.doctor-{token}").decode()
    except Exception:  # not there, or not to be read: the same to whoever asks
        return ""


def _filesystem(storage: str) -> tuple[Any, str]:
    import fsspec

    filesystem, path = fsspec.core.url_to_fs(storage, use_listings_cache=False)
    return filesystem, path.rstrip("/")
