"""The scores pair by pair, contexts and all: slow, obvious, and what the scorers must equal.

Written from docs/model.md, without looking at `cpfean.model.scorers`. `NAIVE` has one of them for
each entry of the registry.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, leaky_relu, softplus

from cpfean.config import AlignmentConfig


class Pair(NamedTuple):
    """One image's fragments and one caption's, none of them padded.

    Attributes:
        regions: (region, dim) unit-norm embeddings.
        words: (word, dim) likewise.
        thresholds: (region,) theta.
        salience: (word,) s.
        config: the settings of `model.alignment`.
        learned: the scorer's parameters by name.
    """

    regions: Tensor
    words: Tensor
    thresholds: Tensor
    salience: Tensor
    config: AlignmentConfig
    learned: Mapping[str, Tensor]


def prominent(pair: Pair) -> Tensor:
    """CPFEAN's local score."""
    regions, words, config = pair.regions, pair.words, pair.config
    gate_mode = config.gate if config.fusion else "off"
    for last in [False] * (config.rounds - 1) + [True]:
        scores = torch.stack([torch.stack([v @ w for w in words]) for v in regions])
        lead = pair.salience.log() / config.word_temperature
        relevance = (scores + lead).max(dim=1).values
        if gate_mode == "off":
            gates = log_gates = None
        else:
            sharpness = pair.learned["log_sharpness"].exp()
            soft = torch.sigmoid(sharpness * (relevance - pair.thresholds))
            gates, log_gates = soft, soft.log()
            if gate_mode == "hard":
                open_ = relevance > pair.thresholds
                closed = soft.new_tensor(1e-6)
                log_gates = (
                    soft.log()
                    + (torch.where(open_, closed.new_ones(()), closed).log() - soft.log()).detach()
                )
                gates = log_gates.exp()
        if gates is None:
            gates, log_gates = torch.ones_like(relevance), torch.zeros_like(relevance)
        likeness = pair.salience * (config.word_temperature * scores).exp()
        prominent = likeness / likeness.sum(dim=1, keepdim=True)
        fused = prominent @ words
        if not last:
            moved = regions + gates[:, None] * fused
            regions = moved / moved.norm(dim=1, keepdim=True)
    weights = torch.ones(len(words), dtype=scores.dtype)
    if config.prominence and config.fusion:
        named_by = (gates[:, None] * prominent).sum(dim=0)
        weights = 1 + softplus(pair.learned["raw_prominence_weight"]) * named_by
    weights = weights / weights.sum()
    attention = (config.region_temperature * scores + log_gates[:, None]).softmax(dim=0)
    contexts = attention.T @ regions
    of_words = (weights * cosine_similarity(contexts, words, dim=1)).sum()
    of_regions = (gates * cosine_similarity(regions, fused, dim=1)).sum() / gates.sum()
    return 0.5 * of_words + 0.5 * of_regions


def cross_attention(pair: Pair) -> Tensor:
    """SCAN's text-to-image score."""
    scores = leaky_relu(pair.regions @ pair.words.T, 0.1)
    scores = scores / scores.norm(dim=1, keepdim=True)
    contexts = (pair.config.region_temperature * scores).softmax(dim=0).T @ pair.regions
    return cosine_similarity(contexts, pair.words, dim=1).mean()


def hard_coding(pair: Pair) -> Tensor:
    """CHAN's score."""
    best = torch.stack([torch.stack([v @ w for v in pair.regions]).max() for w in pair.words])
    temperature = 1 / pair.config.word_temperature
    return temperature * (best / temperature).exp().sum().log()


def hard_coding_mean(pair: Pair) -> Tensor:
    """CHAN's score of words from BERT."""
    return torch.stack([(pair.regions @ w).max() for w in pair.words]).mean()


def late_interaction(pair: Pair) -> Tensor:
    """FILIP's score, the mean of both directions."""
    scores = [[v @ w for w in pair.words] for v in pair.regions]
    of_regions = [torch.stack(row).max() for row in scores]
    of_words = [torch.stack(column).max() for column in zip(*scores, strict=True)]
    return (torch.stack(of_regions).mean() + torch.stack(of_words).mean()) / 2


NAIVE: dict[str, Callable[[Pair], Tensor]] = {
    "prominent": prominent,
    "cross_attention": cross_attention,
    "hard_coding": hard_coding,
    "hard_coding_mean": hard_coding_mean,
    "late_interaction": late_interaction,
}

# Sums over words, which are no means and leave [-1, 1].
SUMS = {"hard_coding"}
