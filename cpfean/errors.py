"""What the user can do something about: raised with a message that says what, where and how.

The command lines show the message alone, without a traceback, and exit with `exit_code`. Anything
else that is raised is a defect of this project.
"""

from __future__ import annotations

import re

_LONGEST = 1200  # letters of a message that is passed on


def message_of(error: BaseException) -> str:
    """What an error of a library says, on one line: all of it, remedies come last.

    A message that goes on for pages is cut, but only behind a sentence. What databases add for
    programmers, the statement and its values, is left out.
    """
    lines = []
    for line in str(error).splitlines():
        if line.startswith(("[SQL:", "[parameters:", "(Background on this error at:")):
            break
        lines.append(line.strip())
    text = " ".join(" ".join(lines).split())
    if len(text) > _LONGEST:
        ends = [found.end() for found in re.finditer(r"[.!?;](?=\s)", text[: _LONGEST + 1])]
        text = text[: ends[-1] if ends else _LONGEST].rstrip() + " ..."
    return text or type(error).__name__


class CpfeanError(Exception):
    """A mistake in what was asked for or given; the message is complete as it stands."""

    exit_code = 1


class ConfigError(CpfeanError):
    """A configuration or command line that cannot be run."""

    exit_code = 2


class DataError(CpfeanError):
    """Files that are missing, damaged, or do not belong together."""

    exit_code = 3


class ServiceError(CpfeanError):
    """A cluster, tracker or storage that cannot be reached or does not answer."""

    exit_code = 5


class CheckpointError(CpfeanError):
    """A checkpoint that is incomplete, damaged, or of another experiment."""

    exit_code = 5


class DivergedError(CpfeanError):
    """A loss or a score that is not a finite number."""

    exit_code = 4


class StoppedError(CpfeanError):
    """A training that was asked to stop, and has saved how far it is."""

    exit_code = 5


class NoMemoryError(CpfeanError):
    """A training that needs more memory than there is."""

    exit_code = 4


class LostPartnerError(CpfeanError):
    """A process that waited for another one in vain."""

    exit_code = 5
