"""Relations among the fragments of one modality.

Axes:  image, caption   in the batch      region, word   fragments of each, padded
       dim              width of the joint embedding space
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional

from cpfean.config import RegionConfig, WordConfig


def overlap_graph(
    iou: Float[Tensor, "image region region"], *, threshold: float
) -> Bool[Tensor, "image region region"]:
    """True where two regions overlap by more than the threshold; a region neighbours itself."""
    itself = torch.eye(iou.shape[-1], dtype=torch.bool, device=iou.device)
    return (iou > threshold) | itself


def suppress_overlapping(
    iou: Float[Tensor, "image region region"],
    mask: Bool[Tensor, "image region"],
    *,
    threshold: float,
) -> Bool[Tensor, "image region"]:
    """Non-maximum suppression: True for regions that no kept, earlier one overlaps too much.

    Args:
        iou: intersection over union; regions in falling order of confidence.
        mask: True where a region is real.
        threshold: a region is dropped if its IoU with a kept, earlier one is above.
    """
    kept = mask.clone()
    for region in range(1, iou.shape[-1]):
        overlapped = (iou[:, region, :region] > threshold) & kept[:, :region]
        kept[:, region] &= ~overlapped.any(dim=1)
    return kept


def word_window(num_words: int, *, radius: int, device: torch.device) -> Bool[Tensor, "word word"]:
    """True where two words are at most `radius` places apart."""
    place = torch.arange(num_words, device=device)
    return (place[:, None] - place[None, :]).abs() <= radius


class RegionTransformerLayer(nn.Module):
    """A Transformer encoder layer whose attention keeps to the edges of a graph.

        y = LayerNorm(x + MultiHead(x, x, x; edges)),   z = LayerNorm(y + FFN(y))

    Source: Vaswani et al. (arXiv:1706.03762), post-norm; the region graph is arXiv:2311.02183's.
    """

    def __init__(self, *, dim: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.dropout = dropout
        self.projection = nn.Linear(dim, 3 * dim)
        self.output = nn.Linear(dim, dim)
        self.feed_forward = nn.Sequential(
            nn.Linear(dim, 2 * dim), nn.ReLU(), nn.Dropout(dropout), nn.Linear(2 * dim, dim)
        )
        self.attention_norm = nn.LayerNorm(dim)
        self.feed_forward_norm = nn.LayerNorm(dim)
        self.residual_dropout = nn.Dropout(dropout)

    def forward(
        self,
        regions: Float[Tensor, "image region dim"],
        edges: Bool[Tensor, "image region region"],
    ) -> Float[Tensor, "image region dim"]:
        """One step of reasoning; `edges` holds every region's edge to itself."""
        query, key, value = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in self.projection(regions).chunk(3, dim=-1)
        )
        attended = functional.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=edges[:, None],
            dropout_p=self.dropout if self.training else 0.0,
        )
        attended = self.output(attended.transpose(1, 2).flatten(2))
        regions = self.attention_norm(regions + self.residual_dropout(attended))
        return self.feed_forward_norm(regions + self.residual_dropout(self.feed_forward(regions)))


class RegionReasoning(nn.Module):
    """The visual Transformer on the region graph; with no layers, the identity."""

    def __init__(self, config: RegionConfig, *, dim: int) -> None:
        super().__init__()
        self.graph: Literal["iou", "dense", "filtered"] = config.graph
        self.iou_threshold = config.iou_threshold
        self.layers = nn.ModuleList(
            RegionTransformerLayer(dim=dim, heads=config.heads, dropout=config.dropout)
            for _ in range(config.layers)
        )

    def keep(
        self,
        mask: Bool[Tensor, "image region"],
        iou: Float[Tensor, "image region region"] | None,
    ) -> Bool[Tensor, "image region"]:
        """Which regions take part at all: with graph "filtered", those that suppression leaves."""
        if self.graph != "filtered" or iou is None:
            return mask
        return suppress_overlapping(iou, mask, threshold=self.iou_threshold)

    def forward(
        self,
        regions: Float[Tensor, "image region dim"],
        mask: Bool[Tensor, "image region"],
        iou: Float[Tensor, "image region region"] | None,
    ) -> Float[Tensor, "image region dim"]:
        """Regions aware of their neighbours. Without boxes (`iou` None) all are neighbours."""
        edges = mask[:, None, :].expand(-1, mask.shape[1], -1)
        if self.graph == "iou" and iou is not None:
            edges = edges & overlap_graph(iou, threshold=self.iou_threshold)
        # A padded region attends to itself, so that its softmax is not one over nothing (NaN).
        edges = edges | torch.eye(mask.shape[1], dtype=torch.bool, device=mask.device)
        for layer in self.layers:
            regions = layer(regions, edges)
        return regions


class WordGraphLayer(nn.Module):
    """A graph convolution over the words of a caption with learned affinities.

        Adj = softmax_k((w T)(w F)' / sqrt(D)) over the neighbours,   w + ReLU(Adj w G)

    Source: affinity of VSRN (arXiv:1909.02701), row softmax as in SGRAF (arXiv:2101.01368).
    """

    def __init__(self, *, dim: int) -> None:
        super().__init__()
        self.query = nn.Linear(dim, dim, bias=False)  # T
        self.key = nn.Linear(dim, dim, bias=False)  # F
        self.value = nn.Linear(dim, dim, bias=False)  # G
        self.scale = dim**-0.5

    def forward(
        self,
        words: Float[Tensor, "caption word dim"],
        edges: Bool[Tensor, "caption word word"],
    ) -> Float[Tensor, "caption word dim"]:
        """One layer; `edges` holds every word's edge to itself."""
        affinity = self.query(words) @ self.key(words).transpose(1, 2) * self.scale
        adjacency = affinity.masked_fill(~edges, -torch.inf).softmax(dim=-1)
        return words + (adjacency @ self.value(words)).relu()


class WordReasoning(nn.Module):
    """The textual GCN; with no layers, the identity."""

    def __init__(self, config: WordConfig, *, dim: int) -> None:
        super().__init__()
        self.graph: Literal["dense", "window", "syntax"] = config.graph
        self.layers = nn.ModuleList(WordGraphLayer(dim=dim) for _ in range(config.layers))

    def forward(
        self,
        words: Float[Tensor, "caption word dim"],
        mask: Bool[Tensor, "caption word"],
        links: Bool[Tensor, "caption word word"] | None,
    ) -> Float[Tensor, "caption word dim"]:
        """Words aware of their neighbours.

        Args:
            words: embeddings, padded.
            mask: True where a word is real.
            links: dependency edges, needed by graph "syntax" and ignored by the others.
        """
        edges = mask[:, None, :].expand(-1, mask.shape[1], -1)
        if self.graph == "window":
            edges = edges & word_window(mask.shape[1], radius=2, device=mask.device)
        elif self.graph == "syntax":
            assert links is not None, "captions were tokenized without dependency edges"
            edges = edges & links
        edges = edges | torch.eye(mask.shape[1], dtype=torch.bool, device=mask.device)
        for layer in self.layers:
            words = layer(words, edges)
        return words
