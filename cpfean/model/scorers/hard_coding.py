"""CHAN's hard assignment.

Axes:  as in `cpfean.model.scorers.pairs`.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from cpfean.config import AlignmentConfig
from cpfean.model.scorers.pairs import Pairs
from cpfean.model.scorers.scorer import Scorer


class HardCoding(Scorer):
    """CHAN's hard assignment: a word is as good as its best region.

        score = t log sum_k exp(max_r S_rk / t)

    In cosine units, up to t log(number of words) above them: a sum, not a mean, as published.

    The published code leaves out the factor t, which changes no rank: its margin of 0.05 is 0.005
    here.

    Source: Pan, Wu and Zhang, CVPR 2023 (CHAN), visual hard assignment with log-sum-exp pooling,
    t = 0.1, over the words of a recurrent encoder.
    """

    def __init__(self, *, temperature: float) -> None:
        super().__init__()
        self.temperature = temperature  # t above

    @classmethod
    def from_config(cls, config: AlignmentConfig, *, dim: int) -> HardCoding:
        """Takes `word_temperature`, 1 / t."""
        return cls(temperature=1 / config.word_temperature)

    def forward(self, pairs: Pairs) -> Float[Tensor, "image caption"]:
        """The scores."""
        best = pairs.cosines.masked_fill(~pairs.region_mask, -torch.inf).amax(dim=-1)
        logits = (best / self.temperature).masked_fill(~pairs.word_mask.squeeze(-1), -torch.inf)
        return self.temperature * logits.logsumexp(dim=-1)
