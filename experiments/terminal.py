"""What commands print: it arrives as far as it can be shown, and never ends a command.

A terminal may be of any code page, a pipe may be closed by its reader (`| head -1`), and a service
may start a command without any output at all. Results, findings and exit codes are the same.
"""

from __future__ import annotations

import errno
import io
import os
import sys
from typing import Any, TextIO

_GONE = (errno.EPIPE, errno.EIO)  # the reader of a pipe, and the terminal of a session


def make_forgiving() -> None:
    """Makes standard output and error of this process take whatever they are given.

    What the encoding has no sign for is written as in Python's texts (`\\u03b1`), bytes of a file's
    name that are no text too (`\\udcff`). Once nobody reads any more the rest goes nowhere.
    """
    for descriptor in (0, 1, 2):
        _open_if_closed(descriptor)
    sys.stdout = _forgiving(sys.stdout, sys.__stdout__, 1)
    sys.stderr = _forgiving(sys.stderr, sys.__stderr__, 2)


def _open_if_closed(descriptor: int) -> None:
    """Files that are opened later would get the number, and what libraries print would be in them.

    The lowest free number is what a file gets: this one, if those below are open.
    """
    try:
        os.fstat(descriptor)
    except OSError:
        os.open(os.devnull, os.O_RDWR)


def _forgiving(stream: Any, original: Any, descriptor: int) -> TextIO:
    if stream is None:  # closed when Python started
        return open(os.devnull, "w", encoding="utf-8")
    if stream is not original or not _is_file(stream, descriptor):
        # Somebody else's, as in tests: only what it can show is ours to say.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
        return stream
    stream.flush()
    return io.TextIOWrapper(
        io.BufferedWriter(_Pipe(descriptor, "wb", closefd=False)),
        encoding=stream.encoding,
        errors="backslashreplace",
        newline="\n",
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )


def _is_file(stream: Any, descriptor: int) -> bool:
    try:
        return stream.fileno() == descriptor
    except (AttributeError, OSError, ValueError):
        return False


class _Pipe(io.FileIO):
    """A descriptor that nobody may be reading."""

    def write(self, data: Any, /) -> int:
        try:
            return super().write(data) or 0
        except OSError as error:
            if error.errno not in _GONE:
                raise
        # For programs that this one starts, too.
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self.fileno())
        os.close(nowhere)
        return super().write(data) or 0
