"""The type of numbers that a training step computes in, by the card, and the scale of its loss.

Autocast makes matrix products in 16 bits; weights, gradients and moments stay in float32. Which 16
bits a card is fast at depends on its compute capability. bfloat16 has the range of float32. float16
is finer and ends at 65,504 and, towards zero, at 6e-8, below most gradients: so the loss is
multiplied by a power of two before the way back, and the gradients are divided by it afterwards.

Source: the scaled loss is Micikevicius et al. (arXiv:1710.03740).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable
from contextlib import nullcontext
from copy import copy
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from cpfean.errors import DivergedError
from cpfean.processes import smallest

logger = logging.getLogger(__name__)

AskedPrecision = Literal["auto", "fp32", "bf16", "fp16"]
Precision = Literal["fp32", "bf16", "fp16"]
Capability = tuple[int, int]

# The first cards whose tensor cores know the type: A100 (8.0), after it A10G (8.6), L4 (8.9) and
# H100 (9.0); V100 (7.0) and T4 (7.5).
_BF16_SINCE: Capability = (8, 0)
_FP16_SINCE: Capability = (7, 0)

_TYPES: dict[Precision, torch.dtype] = {"bf16": torch.bfloat16, "fp16": torch.float16}
_SIGNIFICAND_BITS: dict[Precision, int] = {"fp32": 24, "fp16": 11, "bf16": 8}

_DOUBLED_AFTER = 2000  # steps in a row whose gradients were finite
# The loss is a sum over the batch, so its gradients are larger than those of the usual mean.
_FIRST_SCALE, _LARGEST_SCALE = 2.0**12, 2.0**24


def precision_of(asked: AskedPrecision, capability: Capability | None) -> Precision:
    """What `optim.precision` means on a card.

    Args:
        asked: "auto" or a precision, which is taken as it is.
        capability: major and minor compute capability of the card; None: a processor.
    """
    if asked != "auto":
        return asked
    if capability is None or capability < _FP16_SINCE:
        return "fp32"
    return "bf16" if capability >= _BF16_SINCE else "fp16"


def chosen_precision(asked: AskedPrecision, device: torch.device) -> Precision:
    """What `optim.precision` means for all processes that share a batch: the same on each of them.

    Args:
        asked: "auto" or a precision.
        device: of this process.
    """
    if device.type != "cuda":
        return precision_of(asked, None)
    capability = least_capability(torch.cuda.get_device_capability(device), device)
    precision = precision_of(asked, capability)
    card = torch.cuda.get_device_name(device)
    logger.info("computes in %s: %s; least capability %d.%d", precision, card, *capability)
    return precision


def least_capability(own: Capability, device: torch.device) -> Capability:
    """That of the weakest card: processes exchange embeddings, which have to be of one type.

    Args:
        own: of this process's card.
        device: that processes communicate by.
    """
    # One number, in the order of the pairs.
    major, minor = divmod(int(smallest(torch.tensor(1000 * own[0] + own[1], device=device))), 1000)
    return major, minor


def autocast(precision: Precision, device: torch.device) -> torch.autocast | nullcontext[None]:
    """The types that a step computes in."""
    if precision == "fp32":
        return nullcontext()
    return torch.autocast(device.type, dtype=_TYPES[precision])


def significand_bits(precision: Precision) -> int:
    """How finely the products' factors are rounded, the leading bit included: for records."""
    return _SIGNIFICAND_BITS[precision]


@dataclass(kw_only=True)
class LossScale:
    """What the loss is multiplied by before the way back: 1 for good but in float16.

    It doubles after 2,000 steps in a row with finite gradients. A step whose gradients are not
    finite is left out, and halves it.

    Attributes:
        precision: of the steps.
        value: a power of two.
        steps: in a row whose gradients were finite, since it last changed.
    """

    precision: Precision = "fp32"
    value: float = 1.0
    steps: int = 0

    def __post_init__(self) -> None:
        counted = isinstance(self.steps, int) and 0 <= self.steps < _DOUBLED_AFTER
        if self.precision not in _SIGNIFICAND_BITS or not (
            counted and isinstance(self.value, float) and 1 <= self.value <= _LARGEST_SCALE
        ):
            raise ValueError(f"no scale of a loss: {self}")

    @classmethod
    def to_go_on(cls, precision: Precision, before: LossScale) -> LossScale:
        """The one of a training that computes in `precision` from here on.

        Args:
            precision: of its steps.
            before: the scale so far, perhaps of another card's steps.
        """
        if precision == before.precision:
            return copy(before)
        return cls(precision=precision, value=_FIRST_SCALE if precision == "fp16" else 1.0)

    def step(
        self, optimizer: torch.optim.Optimizer, parameters: Iterable[nn.Parameter], norm: Tensor
    ) -> Tensor:
        """Takes the optimizer's step with gradients of the scaled loss, unless they overflowed.

        Only in float16 anybody waits for the device.

        Args:
            optimizer: of the parameters.
            parameters: with gradients of `value` times the loss.
            norm: of all these gradients together, before clipping; the same on every process.

        Returns:
            The norm of the gradients of the loss itself.

        Raises:
            DivergedError: the gradients are not finite without any scale.
        """
        if self.precision != "fp16":
            optimizer.step()
            return norm
        scale = self.value
        if math.isfinite(float(norm)):
            for parameter in parameters:
                if parameter.grad is not None:
                    parameter.grad.div_(scale)
            optimizer.step()
            self._count_step()
        else:
            self._halve()
        return norm / scale

    def _count_step(self) -> None:
        self.steps += 1
        if self.steps == _DOUBLED_AFTER:
            self.value, self.steps = min(2 * self.value, _LARGEST_SCALE), 0

    def _halve(self) -> None:
        if self.value <= 1:
            raise DivergedError(
                "the gradients are not finite in float16, even those of the loss as it is. Try "
                'optim.precision = "fp32" or a lower optim.learning_rate.'
            )
        self.value, self.steps = self.value / 2, 0
