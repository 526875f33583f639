"""CHAN's hard assignment, averaged.

Axes:  as in `cpfean.model.scorers.pairs`.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from cpfean.config import AlignmentConfig
from cpfean.model.scorers.pairs import Pairs
from cpfean.model.scorers.scorer import Scorer


class HardCodingMean(Scorer):
    """CHAN's score where words come from BERT: a word is as good as its best region, on average.

        score = mean_k max_r S_rk

    It has no setting and no weight. Published with the margin 0.05.

    Source: Pan, Wu and Zhang, CVPR 2023 (CHAN), visual hard assignment; their published code
    averages over the words of a BERT encoder, and takes the log-sum-exp of `hard_coding` over those
    of a recurrent one.
    """

    @classmethod
    def from_config(cls, config: AlignmentConfig, *, dim: int) -> HardCodingMean:
        """Has no settings."""
        return cls()

    def forward(self, pairs: Pairs) -> Float[Tensor, "image caption"]:
        """Cosines in [-1, 1]."""
        best = pairs.cosines.masked_fill(~pairs.region_mask, -torch.inf).amax(dim=-1)
        words = pairs.word_mask.squeeze(-1).to(best.dtype)
        return (words * best).sum(dim=-1) / words.sum(dim=-1)
