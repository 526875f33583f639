"""The types that training and evaluation compute in."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Literal

import torch

Precision = Literal["auto", "fp32", "bf16"]


def autocast(precision: Precision, device: torch.device) -> torch.autocast | nullcontext[None]:
    """The types that encoders compute in, in training and in evaluation alike.

    Single precision is IEEE's: TF32, which has the range of it and the digits of half precision,
    stays off, as PyTorch has it by default.

    Args:
        precision: "fp32", "bf16" for autocast, or "auto": bf16 on a GPU, fp32 elsewhere.
        device: where they compute.
    """
    if precision == "bf16" or (precision == "auto" and device.type == "cuda"):
        return torch.autocast(device.type, dtype=torch.bfloat16)
    return nullcontext()
