"""What kind of failure an error is, as far as that can be told without Ray.

preempted and infra can go better another time: a host was taken away, or something was lost. oom,
diverged, data and config cannot, unless the user changes something. The rest is a bug.
"""

from __future__ import annotations

from collections.abc import Sequence

from cpfean.errors import (
    CpfeanError,
    DataError,
    DivergedError,
    LostPartnerError,
    NoMemoryError,
    ServiceError,
    StoppedError,
)

# The first that fits counts: CpfeanError is the base of most.
_CLASSES: tuple[tuple[type[BaseException], str], ...] = (
    (DivergedError, "diverged"),
    (DataError, "data"),
    (NoMemoryError, "oom"),
    (StoppedError, "preempted"),
    (LostPartnerError, "infra"),
    (ServiceError, "infra"),
    (CpfeanError, "config"),
    (MemoryError, "oom"),
)


def known_failure(causes: Sequence[BaseException]) -> tuple[str, str] | None:
    """The class of a failure and what it says; None if none of the errors tells.

    Args:
        causes: an error and what it wraps, outermost first.
    """
    for kind, failure in _CLASSES:
        for cause in causes:
            if isinstance(cause, kind):
                return failure, str(cause)
    for cause in causes:
        if "out of memory" in str(cause).lower() or "can't allocate memory" in str(cause):
            return "oom", str(cause)
    return None
