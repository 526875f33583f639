"""Weights, gradients and moments spread over the processes: PyTorch's `fully_shard` (FSDP2).

Each process keeps its share of every parameter. A layer of the text encoder is put together just
before it is used, forwards and backwards, and taken apart again; everything else is one more such
group, put together for the whole step. The text encoder is what may not fit; the rest is sharded
with it, rather than kept whole, because gradients that are clipped by one norm and an optimizer
over one kind of parameter need no second way. Single learned numbers cannot be sharded: they stay
whole, and their gradients are summed here.

At its start each process still holds the whole model once, without gradients and moments.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from cpfean.processes import place, summed

_Module = TypeVar("_Module", bound=nn.Module)


def shard(step: _Module, *, layers_of: nn.Module, device: torch.device) -> _Module:
    """Shards a module over all processes, in place; gradients come out averaged.

    Args:
        step: with the same weights on every process.
        layers_of: the part of it whose layers are groups of their own.
        device: of this process.
    """
    mesh = init_device_mesh(device.type, (distributed.get_world_size(),))
    for layer in _layers(layers_of):
        fully_shard(layer, mesh=mesh)
    single = {parameter for parameter in step.parameters() if parameter.ndim == 0}
    fully_shard(step, mesh=mesh, ignored_params=single)
    return step


def _layers(module: nn.Module) -> Iterator[nn.Module]:
    """The members of the outermost lists of modules: the layers of a Transformer."""
    for child in module.children():
        if isinstance(child, nn.ModuleList):
            yield from child
        else:
            yield from _layers(child)


@contextmanager
def put_together(step: nn.Module) -> Iterator[None]:
    """For the time of an evaluation: all but the layers whole, so that parts can be called."""
    if not isinstance(step, FSDPModule):
        yield
        return
    step.unshard()
    try:
        yield
    finally:
        step.reshard()


def sum_unsharded_gradients(step: nn.Module) -> None:
    """Averages, over the processes of a sharded step, the gradients of what is not sharded."""
    if not isinstance(step, FSDPModule):
        return
    gradients = [
        parameter.grad
        for parameter in step.parameters()
        if parameter.grad is not None and not isinstance(parameter, DTensor)
    ]
    if gradients:
        means = summed(torch.stack(gradients)) / place()[1]
        for gradient, mean in zip(gradients, means, strict=True):
            gradient.copy_(mean)


def clip_gradients(parameters: Iterable[nn.Parameter], *, largest_norm: float) -> Tensor:
    """Scales the gradients down to a norm, that of sharded and whole ones together.

    Returns:
        The norm before.
    """
    trained = [parameter for parameter in parameters if parameter.grad is not None]
    if not any(isinstance(parameter, DTensor) for parameter in trained):
        return nn.utils.clip_grad_norm_(trained, largest_norm)
    kinds = [
        [parameter for parameter in trained if isinstance(parameter, DTensor) is is_sharded]
        for is_sharded in (True, False)
    ]
    norms = [
        whole(nn.utils.get_total_norm([p.grad for p in kind if p.grad is not None]))
        for kind in kinds
        if kind
    ]
    norm = torch.linalg.vector_norm(torch.stack(norms))
    for kind in kinds:
        nn.utils.clip_grads_with_norm_(kind, largest_norm, norm)
    return norm


def whole(tensor: Tensor) -> Tensor:
    """All of a sharded tensor, which every process asks for at once; others as they are."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def whole_on_first(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Sharded tensors put together one by one, in the first process's memory; empty elsewhere.

    Tensors that are whole stay where they are.
    """
    kept = {}
    for name, tensor in tensors.items():
        full = whole(tensor)
        if place()[0] == 0:
            kept[name] = full.cpu() if isinstance(tensor, DTensor) else full
    return kept


def like(tensor: Tensor, pattern: Tensor) -> Tensor:
    """A whole tensor, sharded if the pattern is; nothing is sent: every process has all of it."""
    if not isinstance(pattern, DTensor):
        return tensor
    return distribute_tensor(
        tensor.to(pattern.device), pattern.device_mesh, pattern.placements, src_data_rank=None
    )
