"""Errors as Ray Train raises them."""

from ray.exceptions import RayActorError
from ray.train import WorkerGroupError


def failure(*errors: Exception) -> WorkerGroupError:
    return WorkerGroupError("workers failed", dict(enumerate(errors)))


def taken_away() -> RayActorError:
    error = RayActorError()
    error._preempted = True
    return error
