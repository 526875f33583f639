"""What a user is told when a disk takes no more."""

from __future__ import annotations

import errno
import os
import re
import shutil
from pathlib import Path

from orchestration.settings import ServiceError

_SQLITE = {
    "database or disk is full": errno.ENOSPC,
    "attempt to write a readonly database": errno.EROFS,
    "database is locked": errno.EBUSY,
}


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
