"""SCAN's cross-attention.

Axes:  as in `cpfean.model.scorers.pairs`.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from cpfean.config import AlignmentConfig
from cpfean.model.scorers.pairs import Pairs, cosine_from, quadratic_form
from cpfean.model.scorers.scorer import Scorer


class CrossAttention(Scorer):
    """SCAN's text-to-image attention: each word attends to regions, words count alike.

        s_rk = leaky_relu(S_rk) over its l2 norm along the words,   alpha_k = softmax_r(lambda s_rk)
        score = mean_k cos(w_k, sum_r alpha_rk v_r)

    Like the alignment of CPFEAN it needs the regions' Gram matrix and no "pair dim" tensor.

    Source: Lee et al. (arXiv:1803.08024), text-to-image, averaged, negative slope 0.1.
    """

    def __init__(self, *, inverse_temperature: float) -> None:
        super().__init__()
        self.inverse_temperature = inverse_temperature

    @classmethod
    def from_config(cls, config: AlignmentConfig, *, dim: int) -> CrossAttention:
        """Takes `region_temperature`, lambda above."""
        return cls(inverse_temperature=config.region_temperature)

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
