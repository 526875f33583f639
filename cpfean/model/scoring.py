"""The local scores of every image with every caption, block by block, and their gradients.

Axes:  image, caption   given               region, word   fragments of each, padded
       dim              width of the joint embedding space

Nothing of a block's cosines is kept: on the way back a block is computed again, and only where a
score has a gradient. Of hardest negatives that is one pair in forty.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import product
from typing import Any, TypeVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from cpfean.config import Products
from cpfean.model.embeddings import CaptionEmbeddings, ImageEmbeddings
from cpfean.model.scorers.pairs import FEW, every_pair, listed_pairs
from cpfean.model.scorers.scorer import Scorer

# Images and captions of a block, by whether a GPU takes them, which wants more at a time.
_BLOCK = {False: (16, 32), True: (64, 512)}

_Embeddings = TypeVar("_Embeddings", ImageEmbeddings, CaptionEmbeddings)


def local_scores(
    scorer: Scorer, images: ImageEmbeddings, captions: CaptionEmbeddings
) -> Float[Tensor, "image caption"]:
    """Scores every image with every caption.

    Equal to `scorer(every_pair(images, captions))`, gradients included, and with as many threads
    the same to the last bit at every call. A scorer's own kernel is used where it has one; else
    blocks of pairs go through its `forward`.

    Under autocast the cosines S come from matrix products in its type; they are turned into the
    type of the embeddings, in which all else is computed.

    Args:
        scorer: of fragments.
        images: their regions are scored.
        captions: their words are scored.
    """
    device = images.regions.device.type
    kind = images.regions.dtype
    product_type = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else kind
    # Captions of like length next to each other: a block is padded little, and as many captions
    # are as much work. Evaluation gives them so; that spares a copy of all words.
    # A GPU's blocks are not cut to the length of their captions, so that their order has no say.
    order = None
    if device != "cuda":
        lengths = captions.mask.sum(dim=1)
        if bool((lengths.diff() < 0).any()):
            order = lengths.argsort(stable=True)
            captions = captions.rows(order)
    with torch.autocast(device, enabled=False):
        scores = scorer.compiled_scores(images, captions, product_type=product_type)
        if scores is None:
            parameters = [p for p in scorer.parameters() if p.requires_grad]
            fragments = images.regions, images.thresholds, captions.words
            fixed = images.mask, captions.mask, captions.salience
            scores = _BlockScores.apply(scorer, *fixed, product_type, *fragments, *parameters)
        return scores if order is None else scores[:, order.argsort()]


def in_products(products: Products, device: torch.device) -> torch.autocast:
    """A context in which `local_scores` makes S by products in this type.

    Args:
        products: "auto" is fp16 on a GPU, as fast as bf16 there and seven times as exact, since
            unit vectors need no exponents; elsewhere fp32.
        device: of the embeddings.
    """
    if products == "auto":
        products = "fp16" if device.type == "cuda" else "fp32"
    half = torch.float16 if products == "fp16" else torch.bfloat16
    return torch.autocast(device.type, half, enabled=products != "fp32")


class _BlockScores(torch.autograd.Function):
    """Any scorer; the way back computes blocks again, or just the pairs that have a gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        scorer: Scorer,
        region_mask: Bool[Tensor, "image region"],
        word_mask: Bool[Tensor, "caption word"],
        salience: Float[Tensor, "caption word"],
        product_type: torch.dtype,
        regions: Float[Tensor, "image region dim"],
        thresholds: Float[Tensor, "image region"],
        words: Float[Tensor, "caption word dim"],
        *parameters: Float[Tensor, "..."],
    ) -> Float[Tensor, "image caption"]:
        tensors = region_mask, word_mask, salience, regions, thresholds, words
        ctx.save_for_backward(*tensors, *parameters)
        ctx.scorer, ctx.product_type = scorer, product_type
        images, captions = _embeddings(*tensors)
        step_images, step_captions = _BLOCK[images.mask.device.type == "cuda"]
        blocks = [
            [
                scorer(every_pair(some_images, some_captions, product_type=product_type))
                for some_captions in _parts(captions, step_captions)
            ]
            for some_images in _parts(images, step_images)
        ]
        return torch.cat([torch.cat(row, dim=1) for row in blocks])

    @staticmethod
    def backward(ctx: Any, *gradients: Float[Tensor, "image caption"]) -> tuple[Tensor | None, ...]:
        (upstream,) = gradients
        region_mask, word_mask, salience, *tensors = ctx.saved_tensors
        images, captions = _embeddings(region_mask, word_mask, salience, *tensors[:3])
        parameters = tensors[3:]
        totals = [torch.zeros_like(tensor) for tensor in tensors]
        num_images, num_captions = upstream.shape
        step_images, step_captions = _BLOCK[images.mask.device.type == "cuda"]
        parts: Iterable[tuple[Tensor, Tensor]]
        rows, columns = upstream.T.nonzero(as_tuple=True)[::-1]  # by caption, hence by length
        few = len(rows) < FEW * upstream.numel()
        if few:
            step = step_images * step_captions
            parts = zip(rows.split(step), columns.split(step), strict=True)
        else:
            every = [torch.arange(n, device=upstream.device) for n in (num_images, num_captions)]
            parts = product(every[0].split(step_images), every[1].split(step_captions))
        for rows, columns in parts:
            some_images, some_captions = images.rows(rows), captions.rows(columns)
            leaves = [
                some_images.regions.detach().requires_grad_(),
                some_images.thresholds.detach().requires_grad_(),
                some_captions.words.detach().requires_grad_(),
            ]
            some_images = some_images._replace(regions=leaves[0], thresholds=leaves[1])
            some_captions = some_captions._replace(words=leaves[2])
            make = listed_pairs if few else every_pair
            given = upstream[rows, columns][:, None] if few else upstream[rows][:, columns]
            with torch.enable_grad():
                scores = ctx.scorer(make(some_images, some_captions, product_type=ctx.product_type))
            found = torch.autograd.grad(
                scores, [*leaves, *parameters], given, allow_unused=True, materialize_grads=True
            )
            totals[0].index_add_(0, rows, found[0])
            totals[1].index_add_(0, rows, found[1])
            totals[2][:, : leaves[2].shape[1]].index_add_(0, columns, found[2])
            for total, one in zip(totals[3:], found[3:], strict=True):
                total += one
        return (None, None, None, None, None, *totals)


def _embeddings(
    region_mask: Bool[Tensor, "image region"],
    word_mask: Bool[Tensor, "caption word"],
    salience: Float[Tensor, "caption word"],
    regions: Float[Tensor, "image region dim"],
    thresholds: Float[Tensor, "image region"],
    words: Float[Tensor, "caption word dim"],
) -> tuple[ImageEmbeddings, CaptionEmbeddings]:
    """What scorers of fragments look at; the pooled vectors are left empty."""
    images = ImageEmbeddings(regions, region_mask, regions[:, 0, :0], thresholds)
    return images, CaptionEmbeddings(words, word_mask, words[:, 0, :0], salience)


def _parts(embeddings: _Embeddings, size: int) -> list[_Embeddings]:
    starts = range(0, len(embeddings.mask), size)
    return [embeddings.rows(slice(start, start + size)) for start in starts]
