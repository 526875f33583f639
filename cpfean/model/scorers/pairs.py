"""Pairs of images and captions, as scorers see them, and closed forms over their cosines.

Axes:  image, caption   in the batch        region, word   fragments of each, padded
       dim              width of the joint embedding space

Everything after the cosines S works on "image caption word region" numbers and on the Gram matrices
of an image's regions and of a caption's words; no tensor has both a pair and a `dim` axis. Regions
are the last axis, which is the longest one that is reduced over.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from cpfean.model.embeddings import CaptionEmbeddings, ImageEmbeddings

TINY = 1e-12  # least squared length, and least sum of gates
# Where fewer pairs than this share have a gradient they are picked out of their blocks.
FEW = 0.2


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """Pairs of images and captions, as all that their scores depend on.

    The axes `image` and `caption` span either every pair of a batch of images with a batch of
    captions, or a list of pairs, of length `image`, with a `caption` axis of length 1.

    Attributes:
        cosines: S, of every word with every region.
        region_mask, word_mask: True where a fragment is real.
        thresholds: theta of each region, as the scorer itself has made them.
        salience: s of each word, in (0, 1].
        regions, words: unit-norm embeddings; a scorer that needs more of them than S takes the
            Gram matrices, which are made when they are asked for.
    """

    cosines: Float[Tensor, "image caption word region"]
    region_mask: Bool[Tensor, "image 1 1 region"]
    word_mask: Bool[Tensor, "#image caption word 1"]
    thresholds: Float[Tensor, "image 1 region"]
    salience: Float[Tensor, "#image caption word"]
    regions: Float[Tensor, "image region dim"]
    words: Float[Tensor, "#image caption word dim"]

    @cached_property
    def region_gram(self) -> Float[Tensor, "image region region"]:
        """K, inner products of the regions of an image."""
        return self.regions @ self.regions.transpose(1, 2)

    @cached_property
    def word_gram(self) -> Float[Tensor, "#image caption word word"]:
        """G, inner products of the words of a caption."""
        return self.words @ self.words.transpose(2, 3)


def every_pair(
    images: ImageEmbeddings, captions: CaptionEmbeddings, *, product_type: torch.dtype | None = None
) -> Pairs:
    """All images with all captions.

    Args:
        images, captions: fragments.
        product_type: S comes from a matrix product in this type; None for that of the embeddings.
    """
    num_captions, num_words, dim = captions.words.shape
    flat = captions.words.reshape(1, num_captions * num_words, dim)
    cosines = _cosines(flat, images.regions, product_type).unflatten(1, (num_captions, num_words))
    return _pairs(images, captions, cosines, over=0)


def listed_pairs(
    images: ImageEmbeddings, captions: CaptionEmbeddings, *, product_type: torch.dtype | None = None
) -> Pairs:
    """Image k with caption k, for every k; otherwise as `every_pair`."""
    cosines = _cosines(captions.words, images.regions, product_type)[:, None]
    return _pairs(images, captions, cosines, over=1)


def _cosines(
    words: Float[Tensor, "#image word dim"],
    regions: Float[Tensor, "image region dim"],
    product_type: torch.dtype | None,
) -> Float[Tensor, "image word region"]:
    kind = product_type or regions.dtype
    return (words.to(kind) @ regions.to(kind).transpose(1, 2)).to(regions.dtype)


def _pairs(
    images: ImageEmbeddings,
    captions: CaptionEmbeddings,
    cosines: Float[Tensor, "image caption word region"],
    *,
    over: int,
) -> Pairs:
    return Pairs(
        cosines=cosines,
        region_mask=images.mask[:, None, None, :],
        word_mask=captions.mask[:, :, None].unsqueeze(over),
        thresholds=images.thresholds[:, None, :],
        salience=captions.salience.unsqueeze(over),
        regions=images.regions,
        words=captions.words.unsqueeze(over),
    )


def quadratic_form(
    weights: Float[Tensor, "image caption word region"],
    region_gram: Float[Tensor, "image region region"],
) -> Float[Tensor, "image caption word"]:
    """Squared length of sum_r weights_r v_r, from the Gram matrix K of the regions: w' K w."""
    flat = weights.flatten(1, 2)
    return ((flat @ region_gram) * flat).sum(dim=-1).unflatten(1, weights.shape[1:3])


def cosine_from(
    inner: Float[Tensor, "*pairs"], squared_length: Float[Tensor, "*pairs"]
) -> Float[Tensor, "*pairs"]:
    """The cosine with a unit vector, given the inner product with it and one's squared length."""
    return inner * squared_length.clamp(min=TINY).rsqrt()
