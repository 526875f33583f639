"""The textual prior: an object's label brought into its region.

Axes:  image, region   of a batch, padded    dim   width of the joint embedding space
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

# A detector's confidence of exactly 0 or 1 would be an infinite log-odds.
_EXTREME = 1e-3


class TextPrior(nn.Module):
    """Adds the embedding of a region's label, as far as the label is trusted.

        gamma_r = sigmoid(U_q [v0_r ; p_r] + log-odds(q_r)),   v1_r = v0_r + a gamma_r p_r

    p_r is the label's text embedding in the joint space, q_r the detector's confidence, a > 0 is
    learned and starts at 2. Without a confidence only what the region looks like counts.

    Source: arXiv:2311.02183 (labels through a language model); gamma is this project's,
    docs/model.md section 1.
    """

    def __init__(self, *, dim: int, use_confidence: bool) -> None:
        super().__init__()
        self.use_confidence = use_confidence
        self.trust = nn.Linear(2 * dim, 1)
        nn.init.zeros_(self.trust.weight)
        nn.init.zeros_(self.trust.bias)
        self.log_scale = nn.Parameter(torch.tensor(2.0).log())

    def forward(
        self,
        regions: Float[Tensor, "image region dim"],
        labels: Float[Tensor, "image region dim"],
        confidences: Float[Tensor, "image region"] | None,
    ) -> Float[Tensor, "image region dim"]:
        """v1.

        Args:
            regions: v0.
            labels: p, the embedded label of each region.
            confidences: q in [0, 1]; taken to be 1/2 if None.
        """
        logits = self.trust(torch.cat((regions, labels), dim=-1))
        if self.use_confidence and confidences is not None:
            # In single precision at least: bfloat16 rounds confidences near 1 to 256ths.
            exact = torch.promote_types(logits.dtype, torch.float32)
            logits = logits + confidences.to(exact).logit(eps=_EXTREME)[..., None]
        trust = logits.sigmoid().to(labels.dtype)
        return regions + self.log_scale.exp() * trust * labels
