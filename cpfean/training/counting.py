"""How long a card would take for what a processor is asked to do here, from counts.

Every operation is computed and, beside that, counted: the multiplications and additions of its
products, and the bytes that it reads and writes. A card takes at least as long as the slower of the
two. That is an estimate for a card that nobody has at hand, and no measurement of anything: what
launching an operation takes, and waiting for the processor, is not in it.

All is computed in float32 here, for in 16 bits most processors are ten times as slow. So the bytes
are those of float32; with the casts of autocast they come to about as many.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

# What real products and real passes over memory reach of the maker's figures, by rule of thumb.
OF_PRODUCTS = 0.4
OF_MEMORY = 0.8

_aten = torch.ops.aten
# Of the table that is looked into they read only what they give.
_GATHERING = {_aten.embedding, _aten.gather, _aten.index, _aten.index_select}
_ATTENTION = {
    # By products of queries and keys; the way back makes five where there were two.
    _aten._scaled_dot_product_flash_attention_for_cpu: (0, 4),
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: (1, 10),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Rates:
    """What a card can do, as its maker says.

    Attributes:
        products: floating-point operations a second in matrix products of the type in question.
        memory: bytes a second.
    """

    products: float
    memory: float


class Counter(TorchDispatchMode):
    """Counts the operations of the code inside, forwards and backwards.

    Attributes:
        flops: of matrix products and attention.
        bytes: read and written.
        seconds: that a card of these rates would take.
    """

    def __init__(self, rates: Rates) -> None:
        super().__init__()
        self.rates = rates
        self.flops = self.bytes = self.seconds = 0.0

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        packet = func._overloadpacket
        if packet not in flop_registry:
            # Without gradients, operations made of others arrive here as one.
            with self:
                parts = func.decompose(*args, **kwargs)
            if parts is not NotImplemented:
                return parts
        result = func(*args, **kwargs)
        if not is_view(func):
            self._count(func, args, kwargs, result)
        return result

    def _count(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        given, found = _tensors((args, kwargs)), _tensors(result)
        flops = float(_flops(func, args, kwargs, result))
        moved = float(sum(map(_bytes, found)) + sum(map(_bytes, _read(func, given, found))))
        self.flops += flops
        self.bytes += moved
        self.seconds += max(
            flops / (self.rates.products * OF_PRODUCTS), moved / (self.rates.memory * OF_MEMORY)
        )


def is_view(func: Any) -> bool:
    """Whether an operation only looks at its argument in another way."""
    aliases = [found.alias_info for found in func._schema.returns]
    return any(alias is not None and not alias.is_write for alias in aliases)


def _flops(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> float:
    packet = func._overloadpacket
    if packet in flop_registry:
        return float(flop_registry[packet](*args, **kwargs, out_val=result))
    if packet in _ATTENTION:
        first, each = _ATTENTION[packet]
        queries, keys = args[first], args[first + 1]
        return float(each * queries.numel() * keys.shape[-2])
    return 0.0


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _read(func: Any, given: list[Tensor], found: list[Tensor]) -> list[Tensor]:
    """What an operation reads of what it is given."""
    if func._overloadpacket in _GATHERING:
        return found + given[1:]
    return given


def _bytes(tensor: Tensor) -> int:
    """Of its numbers, those that a broadcast repeats counted once."""
    sizes = zip(tensor.shape, tensor.stride(), strict=True)
    return math.prod(size for size, stride in sizes if stride) * tensor.element_size()
