"""Scorers of the field behind the interface of `cpfean.model.alignment`, and VSE-inf's pooling.

Axes:  as in `cpfean.model.alignment`.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional

from cpfean.model.alignment import Pairs, cosine_from, quadratic_form


class CrossAttention(nn.Module):
    """SCAN's text-to-image attention: each word attends to regions, words count alike.

        s_rk = leaky_relu(S_rk) over its l2 norm along the words,   alpha_k = softmax_r(lambda s_rk)
        score = mean_k cos(w_k, sum_r alpha_rk v_r)

    Like the alignment of CPFEAN it needs the regions' Gram matrix and no "pair dim" tensor.

    Source: Lee et al. (arXiv:1803.08024), text-to-image, averaged, negative slope 0.1.
    """

    def __init__(self, *, inverse_temperature: float) -> None:
        super().__init__()
        self.inverse_temperature = inverse_temperature  # lambda above

    def forward(self, pairs: Pairs) -> Float[Tensor, "image caption"]:
        """Cosines in [-1, 1]."""
        rectified = functional.leaky_relu(pairs.cosines, 0.1)
        rectified = rectified.masked_fill(~pairs.word_mask, 0.0)
        # As functional.normalize over the words, whose norm is slow along a middle axis.
        squared = (rectified * rectified).sum(dim=2, keepdim=True)
        logits = self.inverse_temperature * rectified * squared.clamp(min=1e-24).rsqrt()
        attention = logits.masked_fill(~pairs.region_mask, -torch.inf).softmax(dim=-1)
        length = quadratic_form(attention, pairs.region_gram)
        of_words = cosine_from((attention * pairs.cosines).sum(dim=-1), length)
        weights = pairs.word_mask.squeeze(-1).to(of_words.dtype)
        return (weights * of_words).sum(dim=-1) / weights.sum(dim=-1)


class HardCoding(nn.Module):
    """CHAN's hard assignment: a word is as good as its best region.

        score = t log sum_k exp(max_r S_rk / t)

    In cosine units, up to t log(number of words) above them: a sum, not a mean, as published.

    Source: Pan, Wu and Zhang, CVPR 2023 (CHAN), visual hard assignment with log-sum-exp pooling,
    t = 0.1.
    """

    def __init__(self, *, temperature: float) -> None:
        super().__init__()
        self.temperature = temperature  # t above

    def forward(self, pairs: Pairs) -> Float[Tensor, "image caption"]:
        """The scores."""
        best = pairs.cosines.masked_fill(~pairs.region_mask, -torch.inf).amax(dim=-1)
        logits = (best / self.temperature).masked_fill(~pairs.word_mask.squeeze(-1), -torch.inf)
        return self.temperature * logits.logsumexp(dim=-1)


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
