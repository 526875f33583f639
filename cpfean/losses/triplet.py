"""The two-way triplet loss, on one process or on a share of the global batch.

Axes:  pair      the global batch: image k and caption k match
       row       the pairs whose images this process scored: all of them, or a contiguous share
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from cpfean.processes import largest, place, smallest, summed


def triplet_loss(
    scores: Float[Tensor, "row pair"],
    image_ids: Int[Tensor, "pair"],
    *,
    margin: float,
    mining: Literal["hardest", "all"],
    first: int = 0,
) -> Float[Tensor, ""]:
    """Sums, over matching pairs, the hinge on the negatives in each direction.

        hardest:  sum_k [m + max_{c in N(k)} S_kc - S_kk]_+  +  [m + max_{i in N(k)} S_ik - S_kk]_+
        all:      sum_k sum_{c in N(k)} [m + S_kc - S_kk]_+  +  sum_{i in N(k)} [m + S_ik - S_kk]_+

    N(k) leaves out pairs that show the same image as k: two captions of one photo are both right
    answers. A sum, not a mean: it grows with the number of pairs.

    Where `torch.distributed` runs, each process holds some rows and the result is its share: the
    shares add up to the loss of the whole batch, and so do their gradients. Row maxima are local;
    a column's hardest image may be on another process, and then that process counts its score
    while this one counts its match. Only numbers travel, no gradient does.

    Args:
        scores: of this process's images against all captions, in cosine units.
        image_ids: which image each pair of the global batch shows.
        margin: m, in cosine units.
        mining: "hardest" or "all".
        first: index of row 0 in the global batch.

    Source: Faghri et al. (arXiv:1707.05612); N(k) and the shares are this project's.
    """
    rows = torch.arange(first, first + scores.shape[0], device=scores.device)
    negative = image_ids[rows][:, None] != image_ids[None, :]
    match = scores[rows - first, rows]
    every_match = _from_all_rows(match, rows, total=scores.shape[1])
    if mining == "all":
        return _all_negatives(scores, negative, match, every_match, rows, margin=margin)
    return _hardest_negatives(scores, negative, match, every_match, rows, margin=margin)


def _hardest_negatives(
    scores: Float[Tensor, "row pair"],
    negative: Bool[Tensor, "row pair"],
    match: Float[Tensor, "row"],
    every_match: Float[Tensor, "pair"],
    rows: Int[Tensor, "row"],
    *,
    margin: float,
) -> Float[Tensor, ""]:
    negatives = scores.masked_fill(~negative, -torch.inf)
    caption_cost = (margin + negatives.amax(dim=1) - match).clamp(min=0).sum()

    own_hardest = negatives.amax(dim=0)
    hardest = largest(own_hardest.detach().clone())
    active = margin + hardest - every_match > 0
    # One process counts a column's hardest image: of several that hold it, the lowest rank.
    rank, world_size = place()
    claim = torch.where(own_hardest.detach() == hardest, rank, world_size)
    holds = smallest(claim) == rank
    image_cost = own_hardest[active & holds].sum() + (margin - match)[active[rows]].sum()
    return caption_cost + image_cost


def _all_negatives(
    scores: Float[Tensor, "row pair"],
    negative: Bool[Tensor, "row pair"],
    match: Float[Tensor, "row"],
    every_match: Float[Tensor, "pair"],
    rows: Int[Tensor, "row"],
    *,
    margin: float,
) -> Float[Tensor, ""]:
    caption_cost = (margin + scores - match[:, None]).clamp(min=0)[negative].sum()
    active = negative & (margin + scores - every_match[None, :] > 0)
    count = summed(active.sum(dim=0))[rows]
    image_cost = scores[active].sum() + ((margin - match) * count).sum()
    return caption_cost + image_cost


def _from_all_rows(
    values: Float[Tensor, "row"], rows: Int[Tensor, "row"], *, total: int
) -> Float[Tensor, "pair"]:
    """The values of every process's rows, in the order of the global batch; no gradient."""
    everything = values.new_zeros(total)
    everything[rows] = values.detach()
    return summed(everything)
