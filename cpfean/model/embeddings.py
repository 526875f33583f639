"""What the encoders hand to the alignment.

Axes:  image, caption   of a batch or a whole split     region, word   fragments of each, padded
       dim              width of the joint embedding space
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor


class ImageEmbeddings(NamedTuple):
    """Images, encoded.

    Attributes:
        regions: unit-norm embeddings; arbitrary where masked.
        mask: True where a region is real.
        pooled: unit-norm pool of the regions before they reasoned over each other.
        thresholds: theta, the relevance at which a region's gate is half open; zeros where no gate
            is learned.
    """

    regions: Float[Tensor, "image region dim"]
    mask: Bool[Tensor, "image region"]
    pooled: Float[Tensor, "image dim"]
    thresholds: Float[Tensor, "image region"]

    def rows(self, index: Tensor | slice) -> ImageEmbeddings:
        """The embeddings of some images."""
        return ImageEmbeddings(*(field[index] for field in self))

    @classmethod
    def joined(cls, parts: Sequence[ImageEmbeddings]) -> ImageEmbeddings:
        """Those of several batches, all with as many regions, one after the other."""
        return parts[0] if len(parts) == 1 else cls(*map(torch.cat, zip(*parts, strict=True)))


class CaptionEmbeddings(NamedTuple):
    """Captions, encoded.

    Attributes:
        words: unit-norm embeddings; arbitrary where masked.
        mask: True where a word is real; the real ones come first.
        pooled: unit-norm pool of the words.
        salience: s, how much a word tells of the picture, in (0, 1], the most of a caption 1; ones
            where that is not known.
    """

    words: Float[Tensor, "caption word dim"]
    mask: Bool[Tensor, "caption word"]
    pooled: Float[Tensor, "caption dim"]
    salience: Float[Tensor, "caption word"]

    def rows(self, index: Tensor | slice) -> CaptionEmbeddings:
        """The embeddings of some captions, cut to the longest of them.

        On a GPU as wide as they are: the host would wait for the length.
        """
        mask = self.mask[index]
        longest = mask.shape[1] if mask.is_cuda else max(1, int(mask.sum(dim=1).max()))
        return CaptionEmbeddings(
            self.words[index][:, :longest],
            mask[:, :longest],
            self.pooled[index],
            self.salience[index][:, :longest],
        )


def unit(vectors: Float[Tensor, "*rows dim"]) -> Float[Tensor, "*rows dim"]:
    """Scales the vectors to length 1; a zero vector stays zero."""
    return torch.nn.functional.normalize(vectors, dim=-1)


def masked_mean(
    fragments: Float[Tensor, "rows fragment dim"], mask: Bool[Tensor, "rows fragment"]
) -> Float[Tensor, "rows dim"]:
    """Mean over the real fragments."""
    weights = mask.to(fragments.dtype)
    total = torch.einsum("nfd,nf->nd", fragments, weights)
    return total / weights.sum(dim=1, keepdim=True).clamp(min=1)
