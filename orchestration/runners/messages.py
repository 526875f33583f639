"""What is told of a trial, and what its workers are told to do.

Messages travel from the first worker to the driver, through whatever a runner has in between; the
last three come from the runner itself.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

History = tuple[dict[str, float], ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Order:
    """What workers are to train.

    Attributes:
        config: the experiment as plain data.
        folder: of the trial's checkpoints: a path or a URL.
        attempt: at the trial; checkpoints of an earlier one are fenced; 0: there never is another.
        test: whether its best epoch is to be tested on the test split.
    """

    config: dict[str, Any]
    folder: str
    attempt: int
    test: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Begun:
    """The workers are there.

    Attributes:
        workers: how many.
        placement_group: that they are in, in hexadecimal digits; empty for none.
        pool: name of the pool that they are of.
    """

    workers: int = 1
    placement_group: str = ""
    pool: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Resumed:
    """The training goes on from a checkpoint.

    Attributes:
        epoch: the last one that had been finished.
        checkpoint: its address.
    """

    epoch: int
    checkpoint: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Epoch:
    """An epoch is finished and saved.

    Attributes:
        history: the metrics of all epochs so far, so that a driver that was away misses nothing.
        checkpoint: address of the newest one.
        ended: nothing more is to come of the trial.
        test: metrics of the best epoch on the test split; empty if it was not tested.
    """

    history: History
    checkpoint: str
    ended: bool
    test: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class Note:
    """A line that the user is to read."""

    line: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Failed:
    """The trial has failed.

    Attributes:
        failure: class of the failure, see `orchestration.study.failures`.
        message: last lines of the error.
    """

    failure: str
    message: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Lost:
    """The process that looked after the trial is gone, which says nothing about the trial."""

    message: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Ended:
    """The runner has no more to do with the trial.

    Attributes:
        pruned: it was stopped for being behind the others.
    """

    pruned: bool


Message = Begun | Resumed | Epoch | Note | Failed | Lost | Ended
