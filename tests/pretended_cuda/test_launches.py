"""How many operators a training step of full size starts on a GPU.

Counted is every operator that starts a kernel, once, though some start several: the optimizer's,
one for all its weights, above all. Views and memory are not. Tensors have shapes alone, but for the
scores, which the pairs with a gradient depend on.
"""

from __future__ import annotations

from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from cpfean.config import AlignmentConfig
from cpfean.data.batch import Batch, CaptionBatch, ImageBatch, each_once
from cpfean.model.cpfean import Cpfean, LabelEmbeddings, ModelInputs
from cpfean.model.embeddings import CaptionEmbeddings, ImageEmbeddings
from cpfean.model.scorers.pairs import Pairs
from cpfean.model.scorers.scorer import Scorer
from cpfean.model.text_encoder import TextBackbone
from cpfean.training.global_batch import GlobalBatchLoss, find_gradients
from cpfean.training.optimizer import build_optimizer
from cpfean.training.precision import autocast
from experiments.baselines import FLICKR30K
from tests.pretended_cuda.device import Pretended, Record, pretended

CUDA = torch.device("cuda")
PAIRS, REGIONS, LABELS = 128, 29, 1600
MOST = 1400  # without the local scores and their gradients
MOST_WITH_SCORES = 1750  # those of the plain path, by hardest negatives


class WithValues(torch.autograd.Function):
    """Gives scores numbers, so that some pairs are the hardest."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        numbers = torch.rand(scores.shape, generator=generator).pin_memory()
        return numbers.to(CUDA, non_blocking=True)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0]


class Nothing(torch.autograd.Function):
    """Scores and gradients out of nowhere, for no launch."""

    @staticmethod
    def forward(ctx: Any, *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*tensors)
        return tensors[0].new_empty(len(tensors[0]), len(tensors[1]))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.empty_like(tensor) for tensor in ctx.saved_tensors)


class NoScorer(Scorer):
    """In place of a scorer: all that is done for it and with its results, but not its own part."""

    def __init__(self, scorer: Any) -> None:
        super().__init__()
        self.scorer = scorer

    @classmethod
    def from_config(cls, config: AlignmentConfig, *, dim: int) -> NoScorer:
        raise NotImplementedError

    def forward(self, pairs: Pairs) -> Tensor:
        raise NotImplementedError

    def thresholds(self, regions: Tensor) -> Tensor:
        return self.scorer.thresholds(regions)

    def compiled_scores(
        self, images: ImageEmbeddings, captions: CaptionEmbeddings, *, product_type: torch.dtype
    ) -> Tensor:
        constants = self.scorer.constants(like=images.regions)
        return Nothing.apply(images.regions, captions.words, images.thresholds, constants)


def attention(
    query: Tensor, key: Tensor, value: Tensor, *, attn_mask: Tensor, dropout_p: float, **_: Any
) -> Tensor:
    """As a GPU computes it where there is a mask: one kernel, which takes it added and aligned."""
    kind = torch.get_autocast_dtype("cuda")
    query, key, value = (tensor.to(kind) for tensor in (query, key, value))
    with torch.autocast("cuda", enabled=False):
        if attn_mask.dtype == torch.bool:
            added = torch.zeros_like(attn_mask, dtype=kind)
            attn_mask = added.masked_fill_(~attn_mask, -torch.inf)
        if any(stride % 8 for stride in attn_mask.stride()[:-1]):
            length = attn_mask.shape[-1]
            attn_mask = functional.pad(attn_mask, (0, -length % 8))[..., :length]
        attn_mask = attn_mask.to(kind).expand(*query.shape[:3], key.shape[2])
        found = torch.ops.aten._scaled_dot_product_efficient_attention(
            query, key, value, attn_mask, True, dropout_p
        )
    return found[0]


def batch() -> Batch:
    rng = np.random.default_rng(0)
    lengths = torch.from_numpy(rng.integers(8, 21, PAIRS))
    labels = torch.from_numpy(rng.integers(0, LABELS, (PAIRS, REGIONS)))
    words = torch.arange(int(lengths.max()))
    pieces = torch.arange(len(words) + 6)
    images = ImageBatch(
        features=torch.zeros(PAIRS, REGIONS, 2048),
        geometry=torch.zeros(PAIRS, REGIONS, 5),
        iou=torch.zeros(PAIRS, REGIONS, REGIONS, dtype=torch.float16),
        labels=labels,
        shown_labels=each_once(labels),
        confidences=torch.zeros(PAIRS, REGIONS),
        region_mask=torch.ones(PAIRS, REGIONS, dtype=torch.bool),
    )
    captions = CaptionBatch(
        tokens=torch.zeros(PAIRS, len(pieces), dtype=torch.int64),
        token_mask=pieces < lengths[:, None] + 2,
        word_index=torch.where(pieces < lengths[:, None], pieces, -1),
        word_mask=words < lengths[:, None],
        word_links=None,
        word_features=None,
    )
    return Batch(images, captions, torch.arange(PAIRS))


def model() -> Cpfean:
    """The model of the Flickr30K baseline on BERT-base, without memory."""
    from transformers import BertConfig

    config = FLICKR30K.model
    with torch.device("meta"):
        backbone = TextBackbone.from_config(BertConfig(), trainable=True)
        vectors = torch.zeros(LABELS, backbone.word_dim(static=config.text.static))
        return Cpfean(
            config,
            inputs=ModelInputs(
                feature_dim=2048, has_boxes=True, label_names=tuple(map(str, range(LABELS)))
            ),
            backbone=backbone,
            labels=LabelEmbeddings(vectors=vectors),
        )


def second_step(*, scored: bool) -> Record:
    """What the second step does; the first one allocates."""
    patched = mock.patch.object(functional, "scaled_dot_product_attention", attention)
    with patched, pretended() as record:
        trained = model()
        if scored:
            score = trained.score
            trained.score = lambda *sides: WithValues.apply(score(*sides))  # type: ignore[method-assign]
        else:
            trained.scorer = NoScorer(trained.scorer)  # type: ignore[assignment]
        trained._apply(Pretended)
        step = GlobalBatchLoss(trained, margin=0.2)
        optimizer = build_optimizer(trained, FLICKR30K.optim)
        for _ in range(2):
            pinned = batch().pin_memory()
            record.clear()
            given = pinned.to(CUDA, non_blocking=True)
            optimizer.zero_grad(set_to_none=True)
            with autocast("bf16", CUDA):
                loss = step(given, "hardest", PAIRS)
            find_gradients(step, loss, trained.parameters(), clip_norm=2.0)
            optimizer.step()
    return record


@pytest.mark.parametrize(
    ("scored", "most", "waits"),
    [(False, MOST, 0), pytest.param(True, MOST_WITH_SCORES, 1, marks=pytest.mark.long)],
    ids=["without the local scores", "with those of the plain path"],
)
def test_a_step_of_full_size_starts_so_many_operators(scored: bool, most: int, waits: int) -> None:
    record = second_step(scored=scored)
    kernels = record.launches
    # BERT-base and the region Transformer, both ways.
    assert kernels["aten._scaled_dot_product_efficient_attention.default"] == 13
    assert kernels["aten._scaled_dot_product_efficient_attention_backward.default"] == 13
    assert 1000 < kernels.total() <= most, kernels.most_common(12)
    assert record.waits.total() == waits, record.waits
