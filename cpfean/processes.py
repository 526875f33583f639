"""The processes that share one batch: a thin layer over `torch.distributed`.

Without an initialised process group there is one process, and nothing here communicates.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, distributed

from cpfean.errors import LostPartnerError


def place() -> tuple[int, int]:
    """This process's rank and the number of processes."""
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1


@contextmanager
def partners_watched(*, where: str) -> Iterator[None]:
    """Tells a process that others are lost from one that has failed itself.

    Args:
        where: this process's host.

    Raises:
        LostPartnerError: another process ended, or did not answer within the time-out of the
            group.
    """
    try:
        yield
    except RuntimeError as error:
        # gloo has no exception of its own.
        if not isinstance(error, distributed.DistError) and "gloo" not in str(error):
            raise
        rank, world_size = place()
        raise LostPartnerError(
            f"rank {rank} of {world_size} on {where}: another process ended or did not answer in "
            f"time: {str(error).strip().splitlines()[0]}"
        ) from error


def share(total: int, *, rank: int, world_size: int) -> tuple[int, int]:
    """Start and stop of a rank's rows when `total` rows are split as evenly as possible."""
    size, extra = divmod(total, world_size)
    start = rank * size + min(rank, extra)
    return start, start + size + (rank < extra)


def summed(tensor: Tensor) -> Tensor:
    """The sum over all processes, in place."""
    return _reduced(tensor, "SUM")


def largest(tensor: Tensor) -> Tensor:
    """The elementwise maximum over all processes, in place."""
    return _reduced(tensor, "MAX")


def smallest(tensor: Tensor) -> Tensor:
    """The elementwise minimum over all processes, in place."""
    return _reduced(tensor, "MIN")


def sent_from(tensor: Tensor, *, owner: int) -> Tensor:
    """The owner's tensor, written into everybody's, in place."""
    if place()[1] > 1:
        distributed.broadcast(tensor, src=owner)
    return tensor


def gathered(tensor: Tensor, *, total: int) -> Tensor:
    """The rows of all processes, in the order of the ranks; gradients go back to their rows.

    Args:
        tensor: this process's rows, as many as `share` gives it.
        total: rows of all processes together.
    """
    rank, world_size = place()
    if world_size == 1:
        return tensor
    result: Tensor = _Gather.apply(tensor, total, rank, world_size)
    return result


class _Gather(torch.autograd.Function):
    """Concatenates the rows of all processes; the gradient of a row is the sum of everybody's.

    As an all-reduce over a zero-padded whole: shares may differ by a row, which gather operations
    do not allow, and gloo offers no reduce-scatter for the way back.
    """

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, total: int, rank: int, world_size: int) -> Tensor:
        ctx.rows = share(total, rank=rank, world_size=world_size)
        start, stop = ctx.rows
        everything = tensor.new_zeros((total, *tensor.shape[1:]))
        everything[start:stop] = tensor
        distributed.all_reduce(everything)
        return everything

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        everything = gradients[0].contiguous().clone()
        distributed.all_reduce(everything)
        start, stop = ctx.rows
        return everything[start:stop], None, None, None


def _reduced(tensor: Tensor, operation: str) -> Tensor:
    if place()[1] > 1:
        distributed.all_reduce(tensor, op=getattr(distributed.ReduceOp, operation))
    return tensor
