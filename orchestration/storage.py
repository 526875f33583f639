"""An object store that fails now and then: tries again, renews credentials, gives up in time."""

from __future__ import annotations

import errno
import logging
import random
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from orchestration.settings import ServiceError

logger = logging.getLogger("cpfean.storage")

_PATIENCE = 180.0  # seconds that one file is tried for
_LONGEST_PAUSE = 20.0
# botocore retries what is worth it, with jitter; s3fs would do the whole of that five times.
_S3 = {
    "config_kwargs": {
        "connect_timeout": 5,
        "read_timeout": 20,
        "retries": {"mode": "standard", "max_attempts": 3},
    }
}
_LOCAL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)  # it is this machine's disk that fails
_FOR_GOOD = (errno.EINVAL, errno.EPERM, errno.ENAMETOOLONG, errno.ENOSYS)  # as s3fs translates
_Result = TypeVar("_Result")


class Storage:
    """A folder in an object store, by a URL that fsspec knows.

    Raises:
        ServiceError: from any method, when the store has not done it for three minutes, or refuses
            our credentials after they were read anew.
    """

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        self._connect()

    def folders(self) -> list[str]:
        """The names of folders in it; none if it is not there."""

        def ls(filesystem: Any, path: str) -> list[str]:
            try:
                entries = filesystem.ls(path, detail=True)
            except FileNotFoundError:
                return []
            return [entry["name"] for entry in entries if entry["type"] == "directory"]

        return sorted(name.rstrip("/").rsplit("/", 1)[-1] for name in self._tried("", ls))

    def has(self, name: str) -> bool:
        return self._tried(name, lambda filesystem, path: filesystem.exists(path))

    def put(self, file: Path, name: str) -> None:
        try:
            self._tried(name, lambda filesystem, path: filesystem.put_file(str(file), path))
        except FileNotFoundError:
            raise ServiceError(f"{self.url}: there is no such bucket.") from None

    def get(self, name: str, file: Path) -> None:
        """Raises FileNotFoundError if it is not there."""
        file.parent.mkdir(parents=True, exist_ok=True)
        self._tried(name, lambda filesystem, path: filesystem.get_file(path, str(file)))

    def remove(self, name: str) -> None:
        """Removes a file, or a folder with all that is in it, if it is there."""

        def rm(filesystem: Any, path: str) -> None:
            with suppress(FileNotFoundError):
                filesystem.rm(path, recursive=True)

        self._tried(name, rm)

    def _connect(self) -> None:
        import fsspec

        # A cached file system would keep its credentials.
        self._filesystem, self._path = fsspec.core.url_to_fs(
            self.url,
            use_listings_cache=False,
            skip_instance_cache=True,
            **(_S3 if self.url.startswith("s3://") else {}),
        )
        if self.url.startswith("s3://"):
            self._filesystem.retries = 1

    def _tried(self, name: str, do: Callable[[Any, str], _Result]) -> _Result:
        end = time.monotonic() + _PATIENCE
        url = f"{self.url}/{name}".rstrip("/")
        pause, told, renewed = 0.5, False, False
        while True:
            try:
                return do(self._filesystem, f"{self._path}/{name}".rstrip("/"))
            except FileNotFoundError:
                raise
            except Exception as error:
                if not _is_of_store(error):
                    raise
                if _is_for_good(error):
                    raise ServiceError(f"{url}: the store refuses it ({_code(error)}).") from None
                if _is_denied(error):
                    if renewed:
                        raise ServiceError(
                            f"{url}: the store refuses our credentials ({_code(error)}), also after"
                            " they were read anew: they have expired, or lack the right."
                        ) from None
                    renewed = True
                    self._connect()
                    continue
                if time.monotonic() + pause > end:
                    raise ServiceError(
                        f"{url}: the store has not taken or given it for {_PATIENCE:.0f} s "
                        f"({_code(error)})."
                    ) from None
                if not told:
                    told = True
                    logger.warning("%s: delayed, the store says %s", url, _code(error))
            # Many workers come back at once otherwise.
            time.sleep(pause * random.uniform(0.5, 1.5))
            pause = min(2 * pause, _LONGEST_PAUSE)


def _is_of_store(error: Exception) -> bool:
    # botocore's own errors have no ancestor but Exception.
    package = type(error).__module__.split(".")[0]
    of_client = package in ("botocore", "aiobotocore", "aiohttp")
    return of_client or (isinstance(error, OSError) and error.errno not in _LOCAL)


def _is_for_good(error: Exception) -> bool:
    return getattr(error, "errno", None) in _FOR_GOOD and not _is_denied(error)


def _is_denied(error: Exception) -> bool:
    codes = ("ExpiredToken", "TokenRefreshRequired", "InvalidToken", "NoCredentialsError")
    return isinstance(error, PermissionError) or _code(error) in codes


def _code(error: Exception) -> str:
    """What went wrong in a word; the store's text may repeat what it was sent."""
    cause = error.__cause__ or error
    response = getattr(cause, "response", None)
    code = response.get("Error", {}).get("Code") if isinstance(response, dict) else None
    return str(code or type(cause).__name__)
