"""The mean of a feature map inside boxes.

Axes:  region   boxes of one image     row, column   cells of the map     feature   of a cell
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Float64
from torch import Tensor


def pooled_regions(
    features: Float[Tensor, "row column feature"], boxes: Float[Tensor, "region 4"]
) -> Float[Tensor, "region feature"]:
    """The mean of the bilinear surface through a map's cells over each box, exactly.

    Cell (i, j) of an H x W map stands for the rectangle [j, j + 1] / W x [i, i + 1] / H of the
    image, and its value is at the middle of that (the half-pixel convention: no shift by a rounded
    coordinate). In between the surface f is bilinear, and beyond the outermost middles it stays
    as it is there. With b = [x1, x2] x [y1, y2],

        F_b = 1 / |b| integral_b f  =  sum_ij a_i(y1, y2) b_j(x1, x2) F_ij,

    because f is a sum of products of hat functions, whose integrals are known. So nothing is
    sampled: with n x n samples a box one would have to choose n, and every n is too few for a box
    of the whole of a fine map and too many for one within a cell. The weights a, b are computed in
    float64, where the difference of two integrals keeps its digits down to boxes of a millionth of
    a cell; narrower ones take the value at their middle.

    Cost: H W D multiplications a region, and memory for "region column feature".

    Source: precise RoI pooling, Jiang et al. (arXiv:1807.11590), with one bin a box.

    Args:
        boxes: x1, y1, x2, y2 as shares of the image, x1 <= x2 and y1 <= y2, within [0, 1].
    """
    exact = boxes.to(torch.float64)
    by_row = _weights(exact[:, 1], exact[:, 3], features.shape[0]).to(features.dtype)
    by_column = _weights(exact[:, 0], exact[:, 2], features.shape[1]).to(features.dtype)
    bands = torch.einsum("rh,hwd->rwd", by_row, features)
    return torch.einsum("rw,rwd->rd", by_column, bands)


def _weights(
    first: Float64[Tensor, " region"], last: Float64[Tensor, " region"], cells: int
) -> Float64[Tensor, "region cell"]:
    """How much each cell of a line counts in the mean over an interval; they sum to 1."""
    # In units of cells, 0 at the middle of the first one.
    start, end = first * cells - 0.5, last * cells - 0.5
    middle = (start + end) / 2
    narrow = (end - start < 1e-6)[:, None]
    position = torch.arange(cells, dtype=first.dtype, device=first.device)
    mean = _integral(end, position) - _integral(start, position)
    mean = mean / (end - start).clamp(min=1e-6)[:, None]
    point = (1 - (middle.clamp(0, cells - 1)[:, None] - position).abs()).clamp(min=0)
    return torch.where(narrow, point, mean)


def _integral(
    upto: Float64[Tensor, " region"], position: Float64[Tensor, " cell"]
) -> Float64[Tensor, "region cell"]:
    """Integrals of each cell's hat function up to a point, but for a constant.

    The first and the last hat go on as 1 beyond the middle of their cells.
    """
    last = len(position) - 1
    offset = (upto.clamp(0, last)[:, None] - position).clamp(-1, 1)
    result = torch.where(offset < 0, (offset + 1) ** 2 / 2, 1 - (1 - offset) ** 2 / 2)
    result[:, 0] += upto.clamp(max=0)
    result[:, last] += (upto - last).clamp(min=0)
    return result
