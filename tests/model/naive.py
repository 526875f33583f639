"""The scores pair by pair, contexts and all: slow, obvious, and what the closed forms must equal.

Written from docs/model.md, without looking at `cpfean.model.alignment`; a pair is one image's
regions (region, dim) and one caption's words (word, dim), none of them padded.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, leaky_relu

from cpfean.config import AlignmentConfig


def prominent_pair(
    regions: Tensor,
    words: Tensor,
    thresholds: Tensor,
    config: AlignmentConfig,
    *,
    sharpness: Tensor | None,
    prominence_weight: Tensor | None,
) -> Tensor:
    """The local score of one pair."""
    gate_mode = config.gate if config.fusion else "off"
    for last in [False] * (config.rounds - 1) + [True]:
        scores = torch.stack([torch.stack([v @ w for w in words]) for v in regions])
        relevance = scores.max(dim=1).values
        if gate_mode == "off":
            gates = log_gates = None
        else:
            soft = torch.sigmoid(sharpness * (relevance - thresholds))
            gates, log_gates = soft, soft.log()
            if gate_mode == "hard":
                open_ = relevance > thresholds
                closed = soft.new_tensor(1e-6)
                log_gates = (
                    soft.log()
                    + (torch.where(open_, closed.new_ones(()), closed).log() - soft.log()).detach()
                )
                gates = log_gates.exp()
        if gates is None:
            gates, log_gates = torch.ones_like(relevance), torch.zeros_like(relevance)
        prominent = (config.word_temperature * scores).softmax(dim=1)
        fused = prominent @ words
        if not last:
            moved = regions + gates[:, None] * fused
            regions = moved / moved.norm(dim=1, keepdim=True)
    weights = torch.ones(len(words), dtype=scores.dtype)
    if config.prominence and config.fusion:
        named_by = (gates[:, None] * prominent).sum(dim=0)
        weights = 1 + prominence_weight * named_by
    weights = weights / weights.sum()
    attention = (config.region_temperature * scores + log_gates[:, None]).softmax(dim=0)
    contexts = attention.T @ regions
    of_words = (weights * cosine_similarity(contexts, words, dim=1)).sum()
    of_regions = (gates * cosine_similarity(regions, fused, dim=1)).sum() / gates.sum()
    return 0.5 * of_words + 0.5 * of_regions


def cross_attention_pair(regions: Tensor, words: Tensor, inverse_temperature: float) -> Tensor:
    """SCAN's text-to-image score of one pair."""
    scores = leaky_relu(regions @ words.T, 0.1)
    scores = scores / scores.norm(dim=1, keepdim=True)
    contexts = (inverse_temperature * scores).softmax(dim=0).T @ regions
    return cosine_similarity(contexts, words, dim=1).mean()


def hard_coding_pair(regions: Tensor, words: Tensor, temperature: float) -> Tensor:
    """CHAN's score of one pair."""
    best = torch.stack([torch.stack([v @ w for v in regions]).max() for w in words])
    return temperature * (best / temperature).exp().sum().log()
