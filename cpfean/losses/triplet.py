"""The two-way triplet loss, on one process or on a share of the global batch.

Axes:  pair      the global batch: image k and caption k match
       row       the pairs whose images this process scored: all of them, or a contiguous share
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import pad

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
    num_rows, num_pairs = scores.shape
    rows = slice(first, first + num_rows)
    negative = image_ids[rows][:, None] != image_ids[None, :]
    match = scores.diagonal(offset=first)
    every_match = summed(pad(match.detach(), (first, num_pairs - first - num_rows)))
    if mining == "all":
        return _all_negatives(scores, negative, match, every_match, rows, margin=margin)
    return _hardest_negatives(scores, negative, match, every_match, rows, margin=margin)


def _hardest_negatives(
    scores: Float[Tensor, "row pair"],
    negative: Bool[Tensor, "row pair"],
    match: Float[Tensor, "row"],
    every_match: Float[Tensor, "pair"],
    rows: slice,
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
    counted = active & (smallest(claim) == rank)
    image_cost = _sum_where(counted, own_hardest) + _sum_where(active[rows], margin - match)
    return caption_cost + image_cost


def _all_negatives(
    scores: Float[Tensor, "row pair"],
    negative: Bool[Tensor, "row pair"],
    match: Float[Tensor, "row"],
    every_match: Float[Tensor, "pair"],
    rows: slice,
    *,
    margin: float,
) -> Float[Tensor, ""]:
    hinges = (margin + scores - match[:, None]).clamp(min=0)
    active = negative & (margin + scores - every_match[None, :] > 0)
    count = summed(active.sum(dim=0))[rows]
    image_cost = _sum_where(active, scores) + ((margin - match) * count).sum()
    return _sum_where(negative, hinges) + image_cost


def _sum_where(counts: Bool[Tensor, "*some"], values: Float[Tensor, "*some"]) -> Float[Tensor, ""]:
    """The sum of what counts; no gradient, and no infinity, comes from the rest."""
    return values.masked_fill(~counts, 0.0).sum()
