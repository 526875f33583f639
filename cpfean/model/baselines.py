"""Scorers of the field behind the interface of `cpfean.model.alignment`.

Axes:  as in `cpfean.model.alignment`.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
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
        logits = self.inverse_temperature * functional.normalize(rectified, dim=2)
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
