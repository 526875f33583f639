"""Folders that depend on who runs this: a home, and the cache of what can be made again.

Containers and batch systems run programs as users that are in no password file and have no home, or
one that they may not write. Nothing but the cache needs a home, and the cache may be anywhere.
"""

from __future__ import annotations

import errno
import functools
import logging
import os
import stat
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

from cpfean.errors import ConfigError

logger = logging.getLogger(__name__)

_FULL = (errno.ENOSPC, errno.EDQUOT)  # of a disk, not of a right: told as that elsewhere


def expanded(path: str | Path, *, what: str) -> Path:
    """The path with a leading ~ or ~USER replaced by that home.

    Args:
        what: the flag or variable that the path is of.

    Raises:
        ConfigError: no such user, or one without a home.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise ConfigError(
            f"{what}: nobody knows the home that ~ stands for in {str(path)!r}; give the folder "
            "itself, or set HOME."
        ) from None


def cache_folder(environment: Mapping[str, str] | None = None) -> Path:
    """Where data, features and compiled code are kept that can be made again; not made here.

    CPFEAN_CACHE, else ~/.cache/cpfean; where that cannot be, a folder of this user alone among the
    temporary files, which is said once.

    Raises:
        ConfigError: CPFEAN_CACHE begins with the ~ of a user whom nobody knows.
    """
    environment = os.environ if environment is None else environment
    if given := environment.get("CPFEAN_CACHE"):
        return expanded(given, what="CPFEAN_CACHE").absolute()
    try:
        usual = Path("~/.cache/cpfean").expanduser().absolute()
    except RuntimeError:
        usual = None
    if usual is not None and (os.path.isdir(usual) or can_be_written(usual)):
        return usual
    private = private_folder()
    if private is None:
        return usual or Path("/.cache/cpfean")  # which whoever wants to write there is told
    say_once(
        f"{usual or 'no home, and ~/.cache/cpfean'} cannot be written: the cache is {private}; "
        "CPFEAN_CACHE names another."
    )
    return private


def private_folder() -> Path | None:
    """A folder among the temporary files that is this user's alone; None if there can be none."""
    try:
        folder = Path(tempfile.gettempdir()) / f"cpfean-{os.getuid()}"
        folder.mkdir(mode=0o700, exist_ok=True)
    except OSError:
        return None
    return folder if _is_mine_alone(folder) else None


def code_folder() -> Path | None:
    """A folder of the cache for compiled code, which nobody else may have put there.

    None if there can be none. The cache may be shared, and what is loaded from this folder is run.
    """
    folder = cache_folder() / f"compiled-{os.getuid()}"
    try:
        folder.mkdir(parents=True, mode=0o700, exist_ok=True)
    except OSError:
        return None
    return folder if _is_mine_alone(folder) and can_be_written(folder) else None


def made(folder: Path) -> Path:
    """The cache, there and open to be written.

    Raises:
        ConfigError: it cannot be, and which variable names another.
        OSError: the disk is full.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        if error.errno in _FULL:
            raise
        raise cannot_write(folder, error) from None
    return folder


def cannot_write(path: Path, error: OSError) -> ConfigError:
    """What to tell of a cache that takes nothing, as an error to raise.

    Args:
        path: the cache, or what was to be in it.
    """
    return ConfigError(
        f"the cache cannot be written: {path}: {error.strerror or error}. Set CPFEAN_CACHE to a "
        "folder where this user may write."
    )


def note(file: Path, text: str) -> None:
    """Keeps a few words in the cache, or says that they cannot be kept; nothing needs them."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        say_once(
            f"{file.parent}: cannot be written ({error.strerror or error}): what was found about "
            "the data is not kept, and is found again next time; CPFEAN_CACHE names another cache."
        )


def can_be_written(folder: Path) -> bool:
    """Whether a folder is there and may be written, or may be made."""
    nearest = next(path for path in (folder, *folder.parents) if os.path.lexists(path))
    return os.path.isdir(nearest) and os.access(nearest, os.W_OK | os.X_OK)


@functools.cache
def say_once(line: str) -> None:
    """Tells the user something that would be true at every place where it is found."""
    logger.warning("%s", line)


def _is_mine_alone(folder: Path) -> bool:
    found = folder.lstat()
    mine = stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid()
    return mine and not found.st_mode & 0o022


def check_text(path: Path, *, what: str) -> None:
    """Refuses a path that cannot be written down.

    Args:
        what: the flag or variable that it is of.

    Raises:
        ConfigError: bytes that are no text in the encoding of this terminal.
    """
    try:
        str(path).encode("utf-8")
    except UnicodeEncodeError:
        raise ConfigError(
            f"{what}: {str(path)!a} has bytes that are no text in "
            f"{sys.getfilesystemencoding()}, and records, the tracker and Ray cannot hold it; "
            "rename the folder, or set PYTHONUTF8=1 if its name looks right elsewhere."
        ) from None
