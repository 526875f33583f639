"""How many operators a training step of full size starts on a GPU, and how long they may take.

Counted is every operator that starts a kernel, once, though some start several: the optimizer's,
one for all its weights, above all. Views and memory are not. Tensors have shapes alone. The local
scores and their gradients are counted apart. Seconds are an estimate from the operations and bytes
of each operator, as `cpfean.training.counting` has it: no step was measured.
"""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cpfean.config import AlignmentConfig
from cpfean.data.batch import Batch, CaptionBatch, ImageBatch, each_once
from cpfean.model.cpfean import Cpfean, LabelEmbeddings, ModelInputs
from cpfean.model.embeddings import CaptionEmbeddings, ImageEmbeddings
from cpfean.model.scorers.pairs import Pairs
from cpfean.model.scorers.prominent_cuda_blocks import Inputs, Scoring
from cpfean.model.scorers.scorer import Scorer
from cpfean.model.text_encoder import TextBackbone
from cpfean.records.cards import Cards
from cpfean.training.counting import OF_MEMORY, Counter, Rates
from cpfean.training.global_batch import GlobalBatchLoss, find_gradients
from cpfean.training.optimizer import build_optimizer
from cpfean.training.precision import autocast
from experiments.baselines import FLICKR30K
from tests.pretended_cuda.device import Pretended, Record, pretended, starts_kernel

CUDA = torch.device("cuda")
_OF_SIZES = (torch.int64, torch.int32, torch.float64, torch.bool)
PAIRS, REGIONS, LABELS = 128, 29, 1600
# Together 1,500.
MOST = 1375  # without the local scores and their gradients
MOST_OF_SCORES = 125  # of these by Triton's kernels; a GPU makes eight casts less than a processor
MOST_SECONDS = 0.012  # on an H100
PRICES = Path(__file__).resolve().parents[2] / "experiments" / "prices.toml"


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


def h100() -> Counter:
    """Counts for the card of the table; enter it."""
    card = Cards.read(tomllib.loads(PRICES.read_text("utf-8")), nodes={}).known[
        "NVIDIA H100 80GB HBM3"
    ]
    return Counter(Rates(products=card.tflops_16 * 1e12, memory=card.gb_per_second * 1e9))


@pytest.fixture(scope="module")
def second_step() -> tuple[Record, Counter]:
    """What the second step does; the first one allocates."""
    patched = mock.patch.object(functional, "scaled_dot_product_attention", attention)
    with patched, pretended() as record:
        trained = model()
        trained.scorer = NoScorer(trained.scorer)  # type: ignore[assignment]
        trained._apply(Pretended)
        step = GlobalBatchLoss(trained, margin=0.2)
        optimizer = build_optimizer(trained, FLICKR30K.optim)
        for _ in range(2):
            pinned = batch().pin_memory()
            record.clear()
            with h100() as counter:
                given = pinned.to(CUDA, non_blocking=True)
                optimizer.zero_grad(set_to_none=True)
                with autocast("bf16", CUDA):
                    loss = step(given, "hardest", PAIRS)
                find_gradients(step, loss, trained.parameters(), clip_norm=2.0)
                optimizer.step()
    return record, counter


def test_a_step_of_full_size_starts_so_many_operators(second_step: tuple[Record, Counter]) -> None:
    record, _ = second_step
    kernels = record.launches
    # BERT-base and the region Transformer, both ways.
    assert kernels["aten._scaled_dot_product_efficient_attention.default"] == 13
    assert kernels["aten._scaled_dot_product_efficient_attention_backward.default"] == 13
    assert 1000 < kernels.total() <= MOST, kernels.most_common(12)
    assert record.waits.total() == 0, record.waits


class Counted(TorchDispatchMode):
    """Counts the operators that would start a kernel, those of the host's sizes left out."""

    def __init__(self) -> None:
        super().__init__()
        self.launches = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        of_host = given and all(x.ndim < 2 and x.dtype in _OF_SIZES for x in given)
        self.launches += starts_kernel(func) and not of_host
        return func(*args, **kwargs)


@pytest.fixture
def of_scores(monkeypatch: pytest.MonkeyPatch) -> tuple[int, Counted, Counter]:
    """The local scores of a step and their gradients: kernels of Triton's, and all else counted."""
    lengths = torch.from_numpy(np.sort(np.random.default_rng(0).integers(8, 21, PAIRS)))
    with torch.device("meta"):
        shapes = {
            "regions": torch.zeros(PAIRS, REGIONS, FLICKR30K.model.dim),
            "words": torch.zeros(PAIRS, 20, FLICKR30K.model.dim),
            "thresholds": torch.zeros(PAIRS, REGIONS),
            "lead": torch.zeros(PAIRS, 20),
            "constants": torch.zeros(4),
        }
        upstream = torch.zeros(PAIRS, PAIRS)
    inputs = Inputs(
        **shapes,
        num_regions=torch.full((PAIRS,), REGIONS),
        num_words=lengths,
        gate="soft",
        prominence=False,
        product_type=torch.bfloat16,
    )
    kernels, counter = 0, h100()

    def launch(kernel: Any, grid: Any, arguments: tuple[Any, ...], **_: Any) -> None:
        nonlocal kernels
        kernels += 1
        moved = sum(x.numel() * x.element_size() for x in arguments if isinstance(x, Tensor))
        counter.seconds += moved / (counter.rates.memory * OF_MEMORY)

    monkeypatch.setattr(Scoring, "launch", staticmethod(launch))
    with counter, Counted() as counted:
        Scoring(inputs).scores()
        Scoring(inputs).gradients(upstream)
    return kernels, counted, counter


def test_the_local_scores_of_a_step_and_their_gradients_start_so_many(
    of_scores: tuple[int, Counted, Counter],
) -> None:
    kernels, counted, _ = of_scores
    # Captions of up to 16 words and longer ones are two blocks, of a kernel forwards and two back.
    assert kernels == 2 * (1 + 2)
    assert 50 < counted.launches + kernels <= MOST_OF_SCORES


def test_a_step_of_full_size_is_estimated_at_12_ms_of_an_h100(
    second_step: tuple[Record, Counter], of_scores: tuple[int, Counted, Counter]
) -> None:
    """The score's kernels by their bytes alone: their instructions take some 0.2 ms."""
    _, step = second_step
    *_, scores = of_scores
    # A forward and two backward products of each weight of BERT's layers with 128 x 27 pieces.
    assert step.flops > 6 * 12 * 12 * 768**2 * PAIRS * 27
    assert 0.8 * MOST_SECONDS < step.seconds + scores.seconds <= MOST_SECONDS
