"""Parameter groups, learning-rate schedule and clipping."""

from __future__ import annotations

import torch
from torch import nn

from cpfean.config import OptimConfig
from cpfean.model.cpfean import Cpfean


def build_optimizer(model: Cpfean, config: OptimConfig) -> torch.optim.AdamW:
    """AdamW with one learning rate for a pretrained text encoder and another for the rest.

    Biases, norms and single learned numbers are not decayed.
    """
    pretrained = model.config.text.encoder != "scratch"
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        of_text = pretrained and name.startswith("backbone.")
        rate = config.text_learning_rate if of_text else config.learning_rate
        decay = config.weight_decay if parameter.ndim > 1 else 0.0
        groups.setdefault((rate, decay), []).append(parameter)
    return torch.optim.AdamW(
        [
            {"params": parameters, "lr": rate, "initial_lr": rate, "weight_decay": decay}
            for (rate, decay), parameters in groups.items()
        ],
        fused=True,  # one pass over the weights instead of several, on processors too
    )


def set_epoch(optimizer: torch.optim.Optimizer, config: OptimConfig, *, epoch: int) -> None:
    """Sets the learning rates of an epoch, counted from 1: a step down after `decay_epoch`."""
    factor = config.decay_factor if epoch > config.decay_epoch else 1.0
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * factor
