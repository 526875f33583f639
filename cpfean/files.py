"""Files as they are given to us: opened only if they are files, and read only up to a limit.

What stands in place of a file (a named pipe, a device, a socket, a folder, a link that leads
nowhere) would hang a reader, run for ever or be taken for absent. All that is refused here is an
OSError whose `strerror` says what was found, so that it reads like any other unreadable file.
"""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import BinaryIO

_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)
# How files begin that are mistaken for others.
_STARTS = (
    (b"\x93NUMPY", "an npy file"),
    (b"PK\x03\x04", "a zip archive (npz, pt and docx files are such)"),
    (b"\x1f\x8b", "a file compressed by gzip"),
    (b"BZh9", "a file compressed by bzip2"),
    (b"\xfd7zXZ\x00", "a file compressed by xz"),
    (b"\x28\xb5\x2f\xfd", "a file compressed by zstd"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive"),
    (b"\x89HDF", "an HDF5 file"),
    (b"PAR1\x15", "a Parquet file"),
    (b"ARROW1\0", "an Arrow file"),
    (b"SQLite format 3", "an SQLite database"),
    (b"version https://git-lfs", "a pointer of Git LFS (the file itself was not fetched)"),
    (b"<!DOCTYPE", "a web page"),
    (b"<!doctype", "a web page"),
    (b"<html", "a web page"),
    (b"\xff\xfe", "a text in UTF-16"),
    (b"\xfe\xff", "a text in UTF-16"),
    (b"\x80\x02", "a pickle"),
    (b"\x80\x03", "a pickle"),
    (b"\x80\x04", "a pickle"),
    (b"\x80\x05", "a pickle"),
)


class NotAFileError(OSError):
    """Something else than a regular file; `strerror` says what."""


def open_file(path: Path) -> BinaryIO:
    """Opens a regular file for reading; nothing else is opened, and nothing is waited for.

    Raises:
        NotAFileError: a folder, a named pipe, a device, a socket.
        FileNotFoundError: no such file, or a link that leads nowhere.
        OSError: what the system says of it.
    """
    _refuse_dangling(path)
    _refuse_others(os.stat(path).st_mode, path)
    # Whatever takes its place meanwhile is not waited for either.
    number = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        _refuse_others(os.fstat(number).st_mode, path)
        return os.fdopen(number, "rb")
    except BaseException:
        os.close(number)
        raise


def read_file(path: Path, *, limit: int) -> bytes:
    """The content of a regular file.

    Args:
        limit: the most bytes that such a file can sensibly have.

    Raises:
        OSError: as `open_file`, or a file beyond the limit.
    """
    with open_file(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > limit:
            raise OSError(
                errno.EFBIG, f"expected at most {limit:,} bytes, found {size:,}", str(path)
            )
        return file.read(limit)


def is_there(path: Path) -> bool:
    """Whether there is anything of that name, be it a link that leads nowhere."""
    return os.path.lexists(path)


def what_it_is(start: bytes) -> str | None:
    """What a file that begins so is, in words; None if it is nothing known."""
    return next((words for magic, words in _STARTS if start.startswith(magic)), None)


def _refuse_dangling(path: Path) -> None:
    if os.path.islink(path) and not os.path.exists(path):
        message = f"a link that leads nowhere, to {os.readlink(path)}"
        raise FileNotFoundError(errno.ENOENT, message, str(path))


def _refuse_others(mode: int, path: Path) -> None:
    if not stat.S_ISREG(mode):
        found = next((words for is_kind, words in _KINDS if is_kind(mode)), "something else")
        raise NotAFileError(errno.EINVAL, f"expected a file, found {found}", str(path))
