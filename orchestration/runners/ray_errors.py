"""What kind of failure an error of Ray is, and whom it was lost with."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TypeVar

from ray.exceptions import OutOfMemoryError, RayActorError
from ray.train import WorkerGroupError

from cpfean.errors import LostPartnerError
from orchestration.study.failures import known_failure

_Error = TypeVar("_Error", bound=BaseException)


def classify(error: BaseException) -> tuple[str, str]:
    """The class of a failure and its last lines.

    Classes: preempted, infra (something was lost), oom, diverged, data, config, bug.
    """
    causes = list(causes_of(error))
    if known := known_failure(causes):
        failure, message = known
        return failure, last_lines(message)
    if out := cause_of(error, OutOfMemoryError):  # Ray has ended a process before the system would
        return "oom", last_lines(str(out))
    if any(map(_is_preemption, causes)):
        return "preempted", last_lines(str(error))
    # A worker with an error of its own takes the others' connections along: then it is to blame.
    roots = [cause for cause in causes if not _inner(cause)]
    if any(map(_is_loss, causes)) and all(map(_is_loss, roots)):
        return "infra", last_lines(str(error))
    blamed = [cause for cause in roots if not _is_loss(cause)]
    return "bug", last_lines(str((blamed or [error])[0]))


def lost_ranks(error: BaseException) -> tuple[list[int], list[int], list[int]]:
    """Ranks that do not answer any more, that are gone, and that waited for another one in vain.

    Under NCCL those that waited are gone, too: `cpfean.last_words` knows which.
    """
    silent, gone, waiting = list[int](), list[int](), list[int]()
    group = cause_of(error, WorkerGroupError)
    for rank, failure in sorted(group.worker_failures.items()) if group else ():
        if _is_called(failure, "WorkerHealthCheckTimeout"):
            silent.append(rank)
        elif _is_loss(failure):
            gone.append(rank)
        if cause_of(failure, LostPartnerError):
            waiting.append(rank)
    return silent, gone, waiting


def has_waited(error: BaseException) -> bool:
    """Whether workers were waited for in vain: there is no room for them, and no failure."""
    return any(_is_called(cause, "WorkerGroupStartupTimeout") for cause in causes_of(error))


def _is_preemption(error: BaseException) -> bool:
    """Whether Ray knows that the host was taken away."""
    return _is_called(error, "PreemptionError") or bool(getattr(error, "preempted", False))


def _is_loss(error: BaseException) -> bool:
    """Whether a process, node or connection was lost; names and texts differ with who noticed.

    Often it is the other workers of a lost host: their next exchange with it fails at once, long
    before Ray takes the host for dead.
    """
    lost = ("WorkerHealthCheck", "WorkerGroupStartup", "InsufficientClusterResources", "NodeDied")
    names = {kind.__name__ for kind in type(error).__mro__}
    return (
        isinstance(error, RayActorError | ConnectionError | TimeoutError)
        or _is_called(error, *lost)
        or "DistError" in names  # torch's, of NCCL and of the rendezvous
        or (isinstance(error, RuntimeError) and "gloo/transport" in str(error))
    )


def _is_called(error: BaseException, *names: str) -> bool:
    """Whether the name of its class begins so; some of Ray's classes can be imported nowhere."""
    return type(error).__name__.startswith(names)


def cause_of(error: BaseException, kind: type[_Error]) -> _Error | None:
    """The first of that kind among an error and all that is wrapped in it."""
    return next((cause for cause in causes_of(error) if isinstance(cause, kind)), None)


def causes_of(error: BaseException) -> Iterable[BaseException]:
    """The error and all that is wrapped in it, outermost first."""
    todo: list[BaseException] = [error]
    seen: set[int] = set()
    while todo:
        current = todo.pop(0)
        if id(current) in seen:
            continue
        seen.add(id(current))
        yield current
        todo += _inner(current)


def _inner(error: BaseException) -> list[BaseException]:
    """What an error wraps."""
    wrapped: list[Any] = []
    if isinstance(error, WorkerGroupError):
        failures = [failure for _, failure in sorted(error.worker_failures.items())]
        # Those that only waited for it in vain do not know the cause.
        wrapped += [one for one in failures if not isinstance(one, LostPartnerError)] or failures
    names = ("cause", "_base_exc", "controller_failure", "health_check_failure", "__cause__")
    wrapped += [getattr(error, name, None) for name in names]
    return [one for one in wrapped if isinstance(one, BaseException)]


def last_lines(text: str) -> str:
    """What a record keeps of an error."""
    return "\n".join(text.strip().splitlines()[-30:])
