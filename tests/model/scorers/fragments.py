"""Fragments of a few images and captions, padded, and gradients of scores."""

from __future__ import annotations

import torch
from torch import Tensor

from cpfean.model.embeddings import CaptionEmbeddings, ImageEmbeddings, masked_mean, unit

DIM = 12
NUM_REGIONS = (5, 3, 6)
NUM_WORDS = (4, 1, 7, 3)


def make_fragments(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Unnormalized regions, words and thresholds; leaves of the graph, in float64."""
    generator = torch.Generator().manual_seed(seed)
    regions = torch.randn(len(NUM_REGIONS), max(NUM_REGIONS), DIM, generator=generator).double()
    words = torch.randn(len(NUM_WORDS), max(NUM_WORDS), DIM, generator=generator).double()
    thresholds = 0.3 * torch.randn(regions.shape[:2], generator=generator).double() + 0.2
    return regions.requires_grad_(), words.requires_grad_(), thresholds.requires_grad_()


def mask_of(lengths: tuple[int, ...]) -> Tensor:
    return torch.arange(max(lengths))[None, :] < torch.tensor(lengths)[:, None]


def embed(
    regions: Tensor, words: Tensor, thresholds: Tensor
) -> tuple[ImageEmbeddings, CaptionEmbeddings]:
    region_mask, word_mask = mask_of(NUM_REGIONS), mask_of(NUM_WORDS)
    images = ImageEmbeddings(
        unit(regions), region_mask, unit(masked_mean(regions, region_mask)), thresholds
    )
    pooled = unit(masked_mean(words, word_mask))
    salience = torch.rand(word_mask.shape, generator=torch.Generator().manual_seed(5)).double()
    captions = CaptionEmbeddings(unit(words), word_mask, pooled, salience.clamp(min=0.02))
    return images, captions


def gradients(scores: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(7)
    weights = torch.randn(scores.shape, generator=generator).double()
    total = (weights * scores).sum()
    found = torch.autograd.grad(total, leaves, allow_unused=True, retain_graph=True)
    return [
        torch.zeros_like(leaf) if g is None else g for g, leaf in zip(found, leaves, strict=True)
    ]
