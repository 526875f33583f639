"""Files that are written as a whole or not at all, and what is told when a disk takes no more."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from cpfean.errors import ServiceError

_SQLITE = {
    "database or disk is full": errno.ENOSPC,
    "attempt to write a readonly database": errno.EROFS,
    "database is locked": errno.EBUSY,
}
_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EINVAL)


def write_json(file: Path, data: Any, *, mode: int = 0o666) -> None:
    """Writes a file that is there whole or not at all; raises as `write_text` does."""
    write_text(file, as_json(data), mode=mode)


def write_text(file: Path, text: str, *, mode: int = 0o666) -> None:
    """Writes a file that is there whole or not at all.

    Args:
        mode: its rights, of which the process's mask takes some away.

    Raises:
        ServiceError: the disk is full, or it cannot be written; what was there still is.
    """
    try:
        with _written(file, text, mode) as temporary:
            temporary.replace(file)
    except OSError as error:
        raise cannot_write(file, error, needed=len(text.encode())) from error


@contextmanager
def _written(file: Path, text: str, mode: int = 0o666) -> Iterator[Path]:
    """A text on disk, under a name beside the one that it is for; gone at the end."""
    temporary = file.with_name(f".{file.name}.{os.getpid()}-{uuid.uuid4().hex[:8]}")
    try:
        number = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
        with os.fdopen(number, "w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        yield temporary
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_first(file: Path, text: str) -> None:
    """Writes a file that nobody has written yet: whole, and by one process alone.

    Raises:
        FileExistsError: somebody has, or does.
        OSError: it cannot be written.
    """
    with _written(file, text) as temporary:
        link_first(temporary, file)


def link_first(made: Path, file: Path) -> None:
    """Gives a file that is whole a name that nobody has taken yet; raises as `write_first` does."""
    try:
        os.link(made, file)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        # A file system without hard links: the name is taken first, and filled then.
        with made.open("rb") as source, file.open("xb") as copy:
            shutil.copyfileobj(source, copy)


def as_json(data: Any) -> str:
    return json.dumps(data, indent=1, ensure_ascii=False) + "\n"


def cannot_write(path: Path, error: BaseException, *, needed: int | None = None) -> ServiceError:
    """What is wrong with the disk, with its numbers, as an error to raise.

    Args:
        path: what was to be written.
        error: what the writing raised; libraries hide the system's error in errors of their own.
        needed: bytes that were to be written, if that is known.
    """
    number, reason = _system_error(error)
    if number in (errno.ENOSPC, errno.EDQUOT):
        what = "disk full" if number == errno.ENOSPC else "the quota of this user is used up"
        wants = "" if needed is None else f", {_size(needed)} needed"
        return ServiceError(
            f"{path}: {what}: {_size(_free(path))} free{wants}. Free some, or move: --output, "
            "CPFEAN_STORAGE; --resume goes on with what is written."
        )
    return ServiceError(f"{path}: cannot be written: {reason}.")


def is_disk_error(error: BaseException) -> bool:
    """Whether a disk is full, read-only or broken, or a database locked, and not the program."""
    known = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EFBIG, errno.EBUSY)
    return _system_error(error)[0] in known


def _system_error(error: BaseException) -> tuple[int | None, str]:
    current: BaseException | None = error
    while current is not None:
        if isinstance(current, OSError) and current.errno:
            return current.errno, current.strerror or str(current)
        # safetensors and tokenizers say it in their own words.
        if found := re.search(r"\(os error (\d+)\)", str(current)):
            return int(found[1]), os.strerror(int(found[1]))
        for text, number in _SQLITE.items():
            if text in str(current):
                return number, text
        current = current.__cause__ or current.__context__
    return None, str(error).rstrip(".")


def _free(path: Path) -> int:
    return shutil.disk_usage(next(p for p in (path, *path.parents) if p.exists())).free


def _size(number: int) -> str:
    for unit in ("B", "kB", "MB"):
        if number < 1000:
            return f"{number:.0f} {unit}"
        number //= 1000
    return f"{number:.0f} GB" if number >= 10 else f"{number} GB"
