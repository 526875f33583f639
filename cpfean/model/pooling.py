"""From the fragments of an image or a caption to one vector, for the global part of the score.

Axes:  rows   images or captions     fragment   of each, padded     dim   width of their embeddings
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from jaxtyping import Bool, Float
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
        """Pools the real fragments of each row; every row has one.

        In the type of the weights, under autocast too: 0.1 divides the logits of theta, and a GRU
        hands its rounding on from place to place.
        """
        with torch.autocast(fragments.device.type, enabled=False):
            weights = self.weights(mask.shape[1])[mask.sum(dim=1) - 1]
            real = fragments.to(weights.dtype).masked_fill(~mask[..., None], -torch.inf)
            largest = real.sort(dim=1, descending=True).values
            return torch.einsum("nk,nkd->nd", weights, largest.masked_fill(largest.isinf(), 0.0))

    def weights(self, most: int) -> Float[Tensor, "length fragment"]:
        """theta for sets of 1, 2, ..., `most` fragments, in this order; 0 beyond them.

        For every length, whichever occur: on a GPU the host would wait to know these.
        """
        lengths = torch.arange(most, 0, -1, device="cpu")  # packed sequences become shorter
        places = self._positions(most).expand(most, -1, -1)
        packed = nn.utils.rnn.pack_padded_sequence(places, lengths, batch_first=True)
        hidden, _ = nn.utils.rnn.pad_packed_sequence(self.gru(packed)[0], batch_first=True)
        forward, backward = hidden.flip(0).chunk(2, dim=-1)
        scores = self.score((forward + backward) / 2).squeeze(-1) / self.temperature
        inside = torch.ones(most, most, dtype=torch.bool, device=scores.device).tril()
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
