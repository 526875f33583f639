"""What the machine can do at most: copies, and matrix products in each type."""

from __future__ import annotations

import torch
from measure import in_turns

from gpu_checks.report import TYPES, Check, Given


def ceilings(given: Given) -> list[Check]:
    """Bytes a second of a copy, read and written; operations a second of products."""
    side = given.sizes.product
    source = torch.randn(side, side, device=given.device)
    calls = {"copy": lambda: source.clone()}
    for name, kind in TYPES.items():
        matrix = source.to(kind)
        calls[name] = lambda matrix=matrix: matrix @ matrix
    timings = in_turns(calls, runs=given.runs, device=given.device.type)
    moved = 2 * source.numel() * source.element_size()
    return [
        Check(
            section="ceilings",
            what=f"copy of {source.nbytes / 1e6:.0f} MB",
            found=moved / timings["copy"].fastest / 1e9,
            unit="GB/s",
        ),
        *(
            Check(
                section="ceilings",
                what=f"product in {name}, {side} x {side}",
                found=2 * side**3 / timings[name].fastest / 1e12,
                unit="TFLOP/s",
            )
            for name in TYPES
        ),
    ]
