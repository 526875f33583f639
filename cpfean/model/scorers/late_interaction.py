"""FILIP's late interaction.

Axes:  as in `cpfean.model.scorers.pairs`.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from cpfean.config import AlignmentConfig
from cpfean.model.scorers.pairs import Pairs
from cpfean.model.scorers.scorer import Scorer


class LateInteraction(Scorer):
    """Each word is as good as its best region, each region as its best word; all count alike.

        score = 1/2 mean_k max_r S_rk + 1/2 mean_r max_k S_rk

    It has no setting and no weight, and needs nothing but S.

    Source: Yao et al. (arXiv:2111.07783), token-wise maximum similarity. There each direction of
    retrieval has a score of its own, the mean over its queries' fragments; here one score is the
    mean of both.
    """

    @classmethod
    def from_config(cls, config: AlignmentConfig, *, dim: int) -> LateInteraction:
        """Has no settings."""
        return cls()

    def forward(self, pairs: Pairs) -> Float[Tensor, "image caption"]:
        """Cosines in [-1, 1]."""
        best_region = pairs.cosines.masked_fill(~pairs.region_mask, -torch.inf).amax(dim=3)
        best_word = pairs.cosines.masked_fill(~pairs.word_mask, -torch.inf).amax(dim=2)
        words = pairs.word_mask[..., 0].to(best_region.dtype)
        regions = pairs.region_mask[:, :, 0].to(best_word.dtype)
        of_words = (words * best_region).sum(dim=-1) / words.sum(dim=-1)
        of_regions = (regions * best_word).sum(dim=-1) / regions.sum(dim=-1)
        return 0.5 * of_words + 0.5 * of_regions
