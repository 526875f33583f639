"""What a scorer is, and where the one that a configuration names is found.

Axes:  as in `cpfean.model.scorers.pairs`.
"""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod

import torch
from jaxtyping import Float
from torch import Tensor, nn

from cpfean.config import AlignmentConfig
from cpfean.model.embeddings import CaptionEmbeddings, ImageEmbeddings
from cpfean.model.scorers.pairs import Pairs
from cpfean.model.scorers.registry import SCORERS


class Scorer(nn.Module, ABC):
    """The local part of the score, from the fragments of images and captions.

    A scorer has `from_config` and `forward`; the rest is for those who need it. `forward` gives a
    pair's score in cosine units and is a function of that pair alone: padded fragments and the
    order of fragments have no say, nothing is drawn or kept. So it can be called on blocks of
    pairs, or on a list of them, and again on the way back; torch differentiates it, with respect
    to the fragments, the thresholds and the parameters. The tests hold every entry of the registry
    to that.
    """

    @classmethod
    @abstractmethod
    def from_config(cls, config: AlignmentConfig, *, dim: int) -> Scorer:
        """Builds it.

        Args:
            config: the settings of `model.alignment`, of which a scorer takes what it uses.
            dim: width of the joint embedding space.
        """

    @abstractmethod
    def forward(self, pairs: Pairs) -> Float[Tensor, "image caption"]:
        """The scores of the pairs, in cosine units."""

    def thresholds(
        self, regions: Float[Tensor, "image region dim"]
    ) -> Float[Tensor, "image region"]:
        """A number for each region, from its embedding before reasoning: `pairs.thresholds`."""
        return regions.new_zeros(regions.shape[:2])

    def compiled_scores(
        self, images: ImageEmbeddings, captions: CaptionEmbeddings, *, product_type: torch.dtype
    ) -> Float[Tensor, "image caption"] | None:
        """Every image with every caption by a kernel that does the same as `forward`, and faster.

        Args:
            images, captions: fragments, on any device; captions in the order of their lengths, on
                a GPU in any order.
            product_type: S comes from matrix products in this type.

        Returns:
            None where there is no kernel for these settings or this device: `forward` is called.
        """
        return None


def scorer_class(kind: str) -> type[Scorer]:
    """The class that the registry has under this name."""
    module = importlib.import_module(f"cpfean.model.scorers.{kind}")
    found: type[Scorer] = getattr(module, SCORERS[kind].scorer)
    return found
