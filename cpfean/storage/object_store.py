"""An object store that fails now and then: tries again, renews credentials, gives up in time."""

from __future__ import annotations

import errno
import logging
import random
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from cpfean.errors import ConfigError, ServiceError

logger = logging.getLogger("cpfean.storage")

_PATIENCE = 180.0  # seconds that one file is tried for
_LONGEST_PAUSE = 20.0
_ANSWER = 60.0  # seconds that one call may take, and for what it carries
_SLOWEST = 1e6  # bytes a second at least
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


class Storage:
    """A folder in an object store, by a URL that fsspec knows.

    Args:
        patience: seconds that one file is tried for; None for three minutes, 0 for a single try,
            of which nothing is logged.

    Raises:
        ServiceError: from any method, when the store has not done it for that long, or refuses our
            credentials after they were read anew.
    """

    def __init__(self, url: str, *, patience: float | None = None) -> None:
        self.url = url.rstrip("/")
        self._patience = patience
        self._connect()

    def folders(self) -> list[str]:
        """The names of folders in it; none if it is not there."""
        try:
            entries = self._tried("", "ls", detail=True)
        except FileNotFoundError:
            return []
        names = [entry["name"] for entry in entries if entry["type"] == "directory"]
        return sorted(name.rstrip("/").rsplit("/", 1)[-1] for name in names)

    def has(self, name: str) -> bool:
        return bool(self._tried(name, "exists"))

    def put(self, file: Path, name: str) -> None:
        try:
            self._tried(name, "put_file", source=file, size=file.stat().st_size)
        except FileNotFoundError:
            raise ServiceError(f"{self.url}: there is no such bucket.") from None

    def get(self, name: str, file: Path, *, size: int = 0) -> None:
        """Fetches a file of about that size.

        Raises:
            FileNotFoundError: it is not there.
        """
        file.parent.mkdir(parents=True, exist_ok=True)
        self._tried(name, "get_file", target=file, size=size)

    def remove(self, name: str) -> None:
        """Removes a file, or a folder with all that is in it, if it is there."""
        with suppress(FileNotFoundError):
            self._tried(name, "rm", recursive=True)

    def _connect(self) -> None:
        import fsspec

        # A cached file system would keep its credentials.
        try:
            self._filesystem, self._path = fsspec.core.url_to_fs(
                self.url,
                use_listings_cache=False,
                skip_instance_cache=True,
                **(_S3 if self.url.startswith("s3://") else {}),
            )
        except (ValueError, ImportError) as error:
            raise ConfigError(
                f"{self.url}: no storage of that kind here ({error}). CPFEAN_STORAGE is an s3:// "
                "URL or a folder."
            ) from None
        if self.url.startswith("s3://"):
            self._filesystem.retries = 1

    def _tried(
        self,
        name: str,
        method: str,
        *,
        source: Path | None = None,
        target: Path | None = None,
        size: int = 0,
        **options: Any,
    ) -> Any:
        """Calls a method of the file system until it comes to an end."""
        patience = _PATIENCE if self._patience is None else self._patience
        end = time.monotonic() + patience
        url = f"{self.url}/{name}".rstrip("/")
        path = f"{self._path}/{name}".rstrip("/")
        words = [*([str(source)] if source else []), path, *([str(target)] if target else [])]
        pause, told, renewed = 0.5, False, False
        while True:
            try:
                return self._call(method, *words, seconds=_ANSWER + size / _SLOWEST, **options)
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
                if patience and not told:
                    told = True
                    logger.warning("%s: delayed, the store says %s", url, _code(error))
                if time.monotonic() + pause > end:
                    long = f" for {patience:.0f} s" if patience else ""
                    raise ServiceError(
                        f"{url}: the store has not taken or given it{long} ({_code(error)})."
                    ) from None
            # Many workers come back at once otherwise.
            time.sleep(pause * random.uniform(0.5, 1.5))
            pause = min(2 * pause, _LONGEST_PAUSE)

    def _call(self, method: str, *words: str, seconds: float, **options: Any) -> Any:
        """Ends a call that takes too long: a store that hangs before it takes an upload is seen by
        none of its client's own limits.
        """
        from fsspec import asyn

        if not self._filesystem.async_impl:
            return getattr(self._filesystem, method)(*words, **options)
        bound = getattr(self._filesystem, f"_{method}")
        return asyn.sync(self._filesystem.loop, bound, *words, timeout=seconds, **options)


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
