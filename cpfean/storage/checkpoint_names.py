"""Names of checkpoints: the moment of a training, and which attempt at it has saved.

epoch-0004             after four epochs
epoch-0004-000120      120 steps later, where a training was told to stop
epoch-0005.2           by the trial's second attempt

Workers that were given up may still be there: on a host that does not answer, say, and comes back.
Each attempt has names of its own, and none writes or removes any more once there is a newer one.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from cpfean.errors import CheckpointError

MARKER = "attempt"  # a file beside the checkpoints, with the number of the last attempt
_NAME = re.compile(r"epoch-(\d+)(?:-(\d+))?(?:\.(\d+))?")


class FencedError(CheckpointError):
    """Workers that were given up, and have come back."""


def name_of(progress: tuple[int, int], *, attempt: int) -> str:
    """The name of a checkpoint.

    Args:
        progress: finished epochs, and steps of the next one.
        attempt: at the trial; 0 where there never is another.
    """
    epoch, steps = progress
    name = f"epoch-{epoch:04d}"
    if steps:
        name += f"-{steps:06d}"
    return f"{name}.{attempt}" if attempt > 1 else name


def epoch_of(name: str) -> int:
    """How many epochs a checkpoint of that name has finished."""
    match = _NAME.fullmatch(name)
    assert match is not None
    return int(match[1])


def in_order(names: Iterable[str]) -> list[str]:
    """The names of checkpoints among these, oldest moment first; of one moment the last attempt."""
    moments = {}
    for name in names:
        if match := _NAME.fullmatch(name):
            moments[name] = tuple(int(number or 0) for number in match.groups())
    return sorted(moments, key=moments.__getitem__)


def check_current(attempt: int, last: int, *, uri: str) -> None:
    """Raises FencedError if the last attempt is a newer one."""
    if attempt < last:
        raise FencedError(
            f"{uri}: fenced. Attempt {attempt} was given up, and attempt {last} has taken over: "
            "nothing more is written here."
        )
