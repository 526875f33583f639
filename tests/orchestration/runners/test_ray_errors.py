"""What kind of failure an error of Ray is."""

import pytest
import torch
from ray.exceptions import OutOfMemoryError, RayActorError
from ray.train.v2._internal.exceptions import (
    WorkerHealthCheckFailedError,
    WorkerHealthCheckTimeoutError,
)
from torch.distributed import DistBackendError

from cpfean.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    DivergedError,
    LostPartnerError,
    NoMemoryError,
    ServiceError,
    StoppedError,
)
from orchestration.runners.ray_errors import classify, lost_ranks
from tests.orchestration.runners.failures import failure, taken_away


def chained(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (DivergedError("the loss is nan"), "diverged"),
        (DataError("row 3"), "data"),
        (ConfigError("margin"), "config"),
        (CheckpointError("damaged"), "config"),
        (ServiceError("disk full"), "infra"),
        (OutOfMemoryError("node"), "oom"),
        (MemoryError(), "oom"),
        (NoMemoryError("out of memory in epoch 1"), "oom"),
        (torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), "oom"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "oom"),
        (StoppedError("told to stop, saved at step 3 of epoch 2."), "preempted"),
        (taken_away(), "preempted"),
        (WorkerHealthCheckFailedError("gone", taken_away()), "preempted"),
        (WorkerHealthCheckFailedError("gone", RayActorError()), "infra"),
        (WorkerHealthCheckTimeoutError("silent"), "infra"),
        (LostPartnerError("rank 0 of 2 on 10.0.0.1"), "infra"),
        (RuntimeError("CUDA error: out of memory"), "oom"),
        (RayActorError(), "infra"),
        (ConnectionResetError("peer"), "infra"),
        (RuntimeError("[gloo/transport/tcp/pair.cc:537] Read error: reset by peer"), "infra"),
        (DistBackendError("NCCL communicator was aborted"), "infra"),
        (ZeroDivisionError("division by zero"), "bug"),
        (chained(RuntimeError("in worker"), DataError("row 3")), "data"),
    ],
)
def test_a_failure_is_classified_by_its_cause(error: Exception, expected: str) -> None:
    assert classify(failure(error))[0] == expected
    # Of several workers one has the cause; the others lose their partner.
    if expected in ("diverged", "data", "oom", "bug"):
        assert classify(failure(RayActorError(), error))[0] == expected
        assert str(error.__cause__ or error) in classify(failure(RayActorError(), error))[1]
    # Who waited in vain for the one that failed says nothing of why.
    waited = LostPartnerError("rank 0 of 2 on 10.0.0.1: connection closed by peer")
    found, message = classify(failure(waited, error))
    assert found == expected
    assert isinstance(error, LostPartnerError) or "closed by peer" not in message


def test_ranks_that_are_silent_are_told_from_those_that_are_gone() -> None:
    silent = WorkerHealthCheckTimeoutError("silent")
    gone = WorkerHealthCheckFailedError("gone", RayActorError())
    assert lost_ranks(failure(LostPartnerError("waited"), silent, gone)) == ([1], [2], [0])
    assert lost_ranks(RayActorError()) == ([], [], [])
