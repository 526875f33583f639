"""One step of a GRU as CUDA computes it, which no processor's kernel stands for.

With (r, z, n) the three thirds of the products of input and hidden state, biases included:

    r = sigmoid(r_x + r_h),  z = sigmoid(z_x + z_h),  n = tanh(n_x + r n_h),  h' = n + z (h - n)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor


def _step(
    of_input: Tensor,
    of_hidden: Tensor,
    hidden: Tensor,
    input_bias: Tensor | None = None,
    hidden_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The next hidden state, and what the way back needs: r, z, n, h and n_h."""
    r_x, z_x, n_x = (of_input if input_bias is None else of_input + input_bias).chunk(3, dim=1)
    r_h, z_h, n_h = (of_hidden if hidden_bias is None else of_hidden + hidden_bias).chunk(3, dim=1)
    r, z = (r_x + r_h).sigmoid(), (z_x + z_h).sigmoid()
    n = (n_x + r * n_h).tanh()
    return n + z * (hidden - n), torch.cat([r, z, n, hidden, n_h], dim=1)


def _back(
    upstream: Tensor, kept: Tensor, has_bias: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    r, z, n, hidden, n_h = kept.chunk(5, dim=1)
    d_n = upstream * (1 - z) * (1 - n * n)
    d_z = upstream * (hidden - n) * z * (1 - z)
    d_r = d_n * n_h * r * (1 - r)
    of_input, of_hidden = torch.cat([d_r, d_z, d_n], 1), torch.cat([d_r, d_z, d_n * r], 1)
    biases = (of_input.sum(0), of_hidden.sum(0)) if has_bias else (None, None)
    return of_input, of_hidden, upstream * z, *biases


_aten = torch.ops.aten
KERNELS: Mapping[Any, Callable[..., Any]] = {
    _aten._thnn_fused_gru_cell.default: _step,
    _aten._thnn_fused_gru_cell_backward.default: _back,
}
