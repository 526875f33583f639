"""From the fragments of an image or a caption to one vector, for the global part of the score.

Axes:  rows   images or captions     fragment   of each, padded     dim   width of their embeddings
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from cpfean.model.embeddings import masked_mean


class GeneralizedPooling(nn.Module):
    """VSE-inf's pooling: a learned weight for the largest, second largest, ... of each feature.

        pooled_d = sum_k theta_k max_k(x_d),   theta = softmax_k(u . GRU(positions)_k / 0.1)

    max_k(x_d) is the k-th largest value of feature d among the fragments. The weights depend on
    how many fragments there are, and on nothing else; equal ones are the mean, all on the first the
    maximum.

    Source: Chen et al. (arXiv:2011.04305): trigonometric positions of width 32, a bidirectional GRU
    of width 32 whose directions are averaged, temperature 0.1.
    """

    width = 32
    temperature = 0.1

    def __init__(self) -> None:
        super().__init__()
        self.gru = nn.GRU(self.width, self.width, batch_first=True, bidirectional=True)
        self.score = nn.Linear(self.width, 1, bias=False)

    def forward(
        self, fragments: Float[Tensor, "rows fragment dim"], mask: Bool[Tensor, "rows fragment"]
    ) -> Float[Tensor, "rows dim"]:
        """Pools the real fragments of each row; every row has one."""
        counts, row_of = mask.sum(dim=1).unique(return_inverse=True)
        weights = self.weights(counts)[row_of].to(fragments.dtype)
        hidden = fragments.masked_fill(~mask[..., None], -torch.inf)
        largest = hidden.sort(dim=1, descending=True).values[:, : weights.shape[1]]
        return torch.einsum("nk,nkd->nd", weights, largest.masked_fill(largest.isinf(), 0.0))

    def weights(self, counts: Int[Tensor, " length"]) -> Float[Tensor, "length fragment"]:
        """theta for sets of so many fragments; 0 beyond them."""
        longest = int(counts.max())
        places = self._positions(longest).expand(len(counts), -1, -1)
        packed = nn.utils.rnn.pack_padded_sequence(
            places, counts.cpu(), batch_first=True, enforce_sorted=False
        )
        hidden, _ = nn.utils.rnn.pad_packed_sequence(self.gru(packed)[0], batch_first=True)
        forward, backward = hidden.chunk(2, dim=-1)
        scores = self.score((forward + backward) / 2).squeeze(-1) / self.temperature
        inside = torch.arange(longest, device=counts.device) < counts[:, None]
        return scores.masked_fill(~inside, -torch.inf).softmax(dim=1)

    def _positions(self, length: int) -> Float[Tensor, "fragment width"]:
        like = self.score.weight
        place = torch.arange(length, dtype=like.dtype, device=like.device)[:, None]
        rates = torch.arange(0, self.width, 2, dtype=like.dtype, device=like.device)
        angles = place * torch.exp(rates * (-math.log(10000.0) / self.width))
        return torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(1)


# What builds the function or module that pools, by `model.alignment.pooling`.
POOLINGS: Mapping[str, Callable[[], Callable[[Tensor, Tensor], Tensor]]] = {
    "mean": lambda: masked_mean,
    "generalized": GeneralizedPooling,
}
