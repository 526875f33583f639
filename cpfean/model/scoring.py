"""The local scores of every image with every caption, block by block, and their gradients.

Axes:  image, caption   given               region, word   of all of them, one after the other
       dim              width of the joint embedding space

A block is one matrix product, which gives the cosines S of some words with some regions, and
reductions over S, made while S is in the cache. Nothing of S is kept: on the way back a block is
computed again, and only where a score has a gradient. Of hardest negatives that is one pair in
forty.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import pairwise, product
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from cpfean.kernels import prominent
from cpfean.model.alignment import ProminentAlignment, every_pair, listed_pairs
from cpfean.model.embeddings import CaptionEmbeddings, ImageEmbeddings

# So many regions by so many words are a block: S is 1 MB of float32, which the second cache of a
# core holds; smaller blocks make slower products.
_BLOCK_REGIONS = 16 * 36
_BLOCK_WORDS = 448
# Where fewer pairs than this share have a gradient they are picked out of their blocks.
_FEW = 0.2

# Images and captions of a block in plain torch; a GPU wants more at a time.
_PLAIN_BLOCK = {False: (16, 32), True: (64, 512)}

_Range = tuple[int, int]
_Embeddings = TypeVar("_Embeddings", ImageEmbeddings, CaptionEmbeddings)


def local_scores(
    scorer: nn.Module, images: ImageEmbeddings, captions: CaptionEmbeddings
) -> Float[Tensor, "image caption"]:
    """Scores every image with every caption.

    Equal to `scorer(every_pair(images, captions))`, gradients included, and with as many threads
    the same to the last bit at every call. CPFEAN's own alignment with one round of fusion is
    compiled for processors; other scorers, and other devices, work through blocks in plain torch.

    Under autocast the cosines S come from matrix products in its type; they are turned into the
    type of the embeddings, in which all else is computed.

    Args:
        scorer: a `Scorer` of `cpfean.model.alignment`.
        images: their regions are scored.
        captions: their words are scored.
    """
    device = images.regions.device.type
    kind = images.regions.dtype
    product_type = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else kind
    # Captions of like length next to each other: a block is padded little, and as many captions
    # are as much work. Evaluation gives them so; that spares a copy of all words.
    lengths = captions.mask.sum(dim=1)
    order = None
    if bool((lengths.diff() < 0).any()):
        order = lengths.argsort(stable=True)
        captions = captions.rows(order)
    with torch.autocast(device, enabled=False):
        if device == "cpu" and isinstance(scorer, ProminentAlignment) and scorer.rounds == 1:
            scores = _compiled(scorer, images, captions, product_type)
        else:
            parameters = [p for p in scorer.parameters() if p.requires_grad]
            fragments = images.regions, images.thresholds, captions.words
            scores = _PlainScores.apply(
                scorer, images.mask, captions.mask, product_type, *fragments, *parameters
            )
        return scores if order is None else scores[:, order.argsort()]


def _compiled(
    scorer: ProminentAlignment,
    images: ImageEmbeddings,
    captions: CaptionEmbeddings,
    product_type: torch.dtype,
) -> Tensor:
    regions, thresholds = _without_padding(images.regions, images.mask, images.thresholds)
    words, _ = _without_padding(captions.words, captions.mask, captions.mask)
    gates = {"soft": prominent.SOFT, "hard": prominent.HARD, "off": prominent.OFF}
    scores: Tensor = _CompiledScores.apply(
        regions.rows,
        words.rows,
        thresholds,
        scorer.constants(like=regions.rows),
        regions.gram,
        words.gram,
        _Layout(regions.offsets, words.offsets, gates[scorer.gate], product_type),
    )
    return scores


class _PlainScores(torch.autograd.Function):
    """Any scorer; the way back computes blocks again, or just the pairs that have a gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        scorer: nn.Module,
        region_mask: Tensor,
        word_mask: Tensor,
        product_type: torch.dtype,
        *tensors: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(region_mask, word_mask, *tensors)
        ctx.scorer, ctx.product_type = scorer, product_type
        images, captions = _embeddings(region_mask, word_mask, *tensors[:3])
        step_images, step_captions = _PLAIN_BLOCK[images.mask.device.type == "cuda"]
        blocks = [
            [
                scorer(every_pair(some_images, some_captions, product_type=product_type))
                for some_captions in _parts(captions, step_captions)
            ]
            for some_images in _parts(images, step_images)
        ]
        return torch.cat([torch.cat(row, dim=1) for row in blocks])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (upstream,) = gradients
        region_mask, word_mask, *tensors = ctx.saved_tensors
        images, captions = _embeddings(region_mask, word_mask, *tensors[:3])
        parameters = tensors[3:]
        totals = [torch.zeros_like(tensor) for tensor in tensors]
        num_images, num_captions = upstream.shape
        step_images, step_captions = _PLAIN_BLOCK[images.mask.device.type == "cuda"]
        few = int(upstream.count_nonzero()) < _FEW * upstream.numel()
        parts: Iterable[tuple[Tensor, Tensor]]
        if few:
            rows, columns = upstream.T.nonzero(as_tuple=True)[::-1]  # by caption, hence by length
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
        return (None, None, None, None, *totals)


def _embeddings(
    region_mask: Tensor, word_mask: Tensor, regions: Tensor, thresholds: Tensor, words: Tensor
) -> tuple[ImageEmbeddings, CaptionEmbeddings]:
    """What scorers of fragments look at; the pooled vectors are left empty."""
    images = ImageEmbeddings(regions, region_mask, regions[:, 0, :0], thresholds)
    return images, CaptionEmbeddings(words, word_mask, words[:, 0, :0])


def _parts(embeddings: _Embeddings, size: int) -> list[_Embeddings]:
    starts = range(0, len(embeddings.mask), size)
    return [embeddings.rows(slice(start, start + size)) for start in starts]


class _Fragments(NamedTuple):
    """Fragments of one modality without padding.

    Attributes:
        rows: unit-norm embeddings, those of the first image or caption first.
        offsets: the first row of each image or caption, and the end.
        gram: inner products of the fragments of each, padded; outside the graph, since whoever
            computes with them sends their gradient on to the rows.
    """

    rows: Float[Tensor, "fragment dim"]
    offsets: Int64[np.ndarray, "n+1"]
    gram: Float[Tensor, "n most most"]


def _without_padding(
    vectors: Float[Tensor, "n most dim"], mask: Bool[Tensor, "n most"], others: Tensor
) -> tuple[_Fragments, Tensor]:
    """The real fragments; and `others`, (n, most), with those of the real ones first."""
    counts = mask.sum(dim=1)
    first = torch.arange(mask.shape[1]) < counts[:, None]
    if not torch.equal(mask, first):
        order = mask.to(torch.uint8).argsort(dim=1, descending=True, stable=True)
        vectors = vectors.gather(1, order[..., None].expand_as(vectors))
        others = others.gather(1, order)
    offsets = np.concatenate([[0], counts.cumsum(0).numpy()]).astype(np.int64)
    rows = vectors.flatten(0, 1) if bool(first.all()) else vectors[first]
    with torch.no_grad():
        gram = vectors @ vectors.transpose(1, 2)
    return _Fragments(rows, offsets, gram), others


class _Layout(NamedTuple):
    """What is no tensor: where images and captions start, how gates work, the products' type."""

    regions: np.ndarray
    words: np.ndarray
    gate: int
    product_type: torch.dtype


class _CompiledScores(torch.autograd.Function):
    """Blocks of scores going forward; on the way back, blocks of gradients."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        ctx.save_for_backward(*arguments[:-1])
        ctx.layout = arguments[-1]
        return _Blocks(*arguments).scores()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        with torch.no_grad():
            blocks = _Blocks(*(*ctx.saved_tensors, ctx.layout))
            found = blocks.gradients(gradients[0].contiguous())
        return (*found, None, None, None)


class _Blocks:
    """All pairs of some images with some captions, in blocks that are shared out to threads."""

    def __init__(
        self,
        regions: Tensor,
        words: Tensor,
        thresholds: Tensor,
        constants: Tensor,
        region_gram: Tensor,
        word_gram: Tensor,
        layout: _Layout,
    ) -> None:
        self.layout = layout
        self.region_rows, self.word_rows = regions.detach(), words.detach()
        self.regions = self.region_rows.to(layout.product_type)
        self.words = self.word_rows.to(layout.product_type)
        self.region_gram, self.word_gram = region_gram, word_gram
        self.thresholds = thresholds.detach().contiguous()
        self.constants = constants.detach()
        self.threads = max(1, min(torch.get_num_threads(), len(thresholds)))
        share = -(-int(layout.regions[-1]) // self.threads)
        self.image_blocks = _blocks(layout.regions, at_most=min(_BLOCK_REGIONS, share))
        self.caption_blocks = _blocks(layout.words, at_most=_BLOCK_WORDS)

    def scores(self) -> Tensor:
        """The scores, (image, caption)."""
        result = self.constants.new_empty(len(self.region_gram), len(self.word_gram))
        # Nothing is added up here, so whoever is free takes the next block.
        blocks = iter(list(product(self.image_blocks, self.caption_blocks)))

        def work(number: int) -> None:
            thread = _Thread(self)
            for images, captions in blocks:
                thread.score(images, captions, result)

        _in_threads(work, self.threads)
        return result

    def gradients(self, upstream: Tensor) -> list[Tensor]:
        """The gradients of regions, words, thresholds and constants.

        Args:
            upstream: gradient of the scores, (image, caption).
        """
        few = int(upstream.count_nonzero()) < _FEW * upstream.numel()
        # An image belongs to one thread, so these have one writer for each place.
        d_regions = self.constants.new_zeros(self.regions.shape)
        d_region_gram = torch.zeros_like(self.region_gram)
        d_thresholds = torch.zeros_like(self.thresholds)
        threads = [
            _GradientThread(self, d_regions, d_region_gram, d_thresholds)
            for _ in range(self.threads)
        ]

        def work(number: int) -> None:
            for images in self.image_blocks[number :: self.threads]:
                if few:
                    threads[number].propagate_few(images, upstream)
                else:
                    for captions in self.caption_blocks:
                        threads[number].propagate(images, captions, upstream)

        _in_threads(work, self.threads)
        # In the order of the threads, whoever was first: the sums must not depend on that.
        first = threads[0]
        for other in threads[1:]:
            first.d_words += other.d_words
            first.d_word_gram += other.d_word_gram
            first.d_constants += other.d_constants
        _through_gram(d_regions, d_region_gram, self.region_rows, self.layout.regions)
        _through_gram(first.d_words, first.d_word_gram, self.word_rows, self.layout.words)
        return [d_regions, first.d_words, d_thresholds, first.d_constants]


class _Thread:
    """What one thread writes the cosines of a block to."""

    def __init__(self, blocks: _Blocks) -> None:
        self.blocks = blocks
        self.cosines = blocks.constants.new_zeros(0)

    def score(self, images: _Range, captions: _Range, scores: Tensor) -> None:
        """Writes the scores of a block where they belong."""
        blocks, layout = self.blocks, self.blocks.layout
        words = blocks.words[slice(*layout.words[list(captions)])]
        regions = blocks.regions[slice(*layout.regions[list(images)])]
        stride = self.multiply(words, regions)
        prominent.local_scores(
            self.cosines.numpy(),
            stride,
            _offsets(layout.words, captions),
            _offsets(layout.regions, images),
            blocks.region_gram[slice(*images)].numpy(),
            blocks.word_gram[slice(*captions)].numpy(),
            blocks.thresholds[slice(*images)].numpy(),
            blocks.constants.numpy(),
            layout.gate,
            scores.numpy(),
            images[0],
            captions[0],
        )

    def multiply(self, words: Tensor, regions: Tensor) -> int:
        """Fills `cosines` with words by regions; the stride of its rows."""
        stride = len(regions) + prominent.SLACK
        if len(self.cosines) < len(words) * stride:
            self.cosines = self.cosines.new_zeros(len(words) * stride)
        into = _rows(self.cosines, len(words), stride, len(regions))
        if words.dtype == into.dtype:
            torch.mm(words, regions.T, out=into)
        else:
            into.copy_(words @ regions.T)
        return stride


class _GradientThread(_Thread):
    """One thread's share of the gradients; what belongs to captions is the thread's own."""

    def __init__(
        self, blocks: _Blocks, d_regions: Tensor, d_region_gram: Tensor, d_thresholds: Tensor
    ) -> None:
        super().__init__(blocks)
        self.d_cosines = blocks.constants.new_zeros(0)
        self.d_regions = d_regions
        self.d_region_gram = d_region_gram
        self.d_thresholds = d_thresholds
        self.d_words = blocks.constants.new_zeros(blocks.words.shape)
        self.d_word_gram = torch.zeros_like(blocks.word_gram)
        self.d_constants = torch.zeros_like(blocks.constants)

    def propagate(self, images: _Range, captions: _Range, upstream: Tensor) -> None:
        """Adds the gradients that come from a block."""
        layout = self.blocks.layout
        rows = slice(*layout.words[list(captions)])
        d_words = self._propagate(
            images,
            self.blocks.words[rows],
            _offsets(layout.words, captions),
            self.blocks.word_gram[slice(*captions)],
            self.d_word_gram[slice(*captions)],
            upstream,
            captions[0],
        )
        self.d_words[rows] += d_words

    def propagate_few(self, images: _Range, upstream: Tensor) -> None:
        """The same for the pairs of some images that have a gradient at all."""
        starts = self.blocks.layout.words
        for image in range(*images):
            captions = upstream[image].nonzero().squeeze(1)
            if not len(captions):
                continue
            picked = captions.numpy()
            lengths = starts[picked + 1] - starts[picked]
            offsets = np.concatenate([[0], lengths.cumsum()])
            rows = np.arange(offsets[-1]) + np.repeat(starts[picked] - offsets[:-1], lengths)
            d_word_gram = torch.zeros_like(self.d_word_gram[: len(picked)])
            d_words = self._propagate(
                (image, image + 1),
                self.blocks.words[rows],
                offsets,
                self.blocks.word_gram[captions],
                d_word_gram,
                upstream[image : image + 1, captions],
                0,
            )
            self.d_words.index_add_(0, torch.from_numpy(rows), d_words)
            self.d_word_gram.index_add_(0, captions, d_word_gram)

    def _propagate(
        self,
        images: _Range,
        words: Tensor,
        word_offsets: np.ndarray,
        word_gram: Tensor,
        d_word_gram: Tensor,
        upstream: Tensor,
        first_caption: int,
    ) -> Tensor:
        """Adds all but the gradient of the words, and returns that."""
        blocks, layout = self.blocks, self.blocks.layout
        columns = slice(*layout.regions[list(images)])
        regions = blocks.regions[columns]
        stride = self.multiply(words, regions)
        if len(self.d_cosines) < len(self.cosines):
            self.d_cosines = torch.zeros_like(self.cosines)
        prominent.local_gradients(
            self.cosines.numpy(),
            stride,
            word_offsets,
            _offsets(layout.regions, images),
            blocks.region_gram[slice(*images)].numpy(),
            word_gram.numpy(),
            blocks.thresholds[slice(*images)].numpy(),
            blocks.constants.numpy(),
            layout.gate,
            upstream.numpy(),
            images[0] if len(upstream) == len(blocks.thresholds) else 0,
            first_caption,
            self.d_cosines.numpy(),
            self.d_region_gram[slice(*images)].numpy(),
            d_word_gram.numpy(),
            self.d_thresholds[slice(*images)].numpy(),
            self.d_constants.numpy(),
        )
        d_cosines = _rows(self.d_cosines, len(words), stride, len(regions)).to(words.dtype)
        self.d_regions[columns] += d_cosines.T @ words
        return (d_cosines @ regions).to(self.d_words.dtype)


def _through_gram(
    d_rows: Float[Tensor, "fragment dim"],
    d_gram: Float[Tensor, "n most most"],
    rows: Float[Tensor, "fragment dim"],
    offsets: Int64[np.ndarray, "n+1"],
) -> None:
    """Adds what reaches the fragments V of each through K = V V': 2 dK V, as dK is symmetric."""
    for one, (start, stop) in zip(d_gram, pairwise(offsets), strict=True):
        many = stop - start
        d_rows[start:stop].addmm_(one[:many, :many], rows[start:stop], alpha=2)


def _rows(flat: Tensor, num_rows: int, stride: int, num_columns: int) -> Tensor:
    """The block of (row, column) that a flat buffer starts with."""
    return flat[: num_rows * stride].view(num_rows, stride)[:, :num_columns]


def _offsets(offsets: np.ndarray, part: _Range) -> np.ndarray:
    """Those of some images or captions, from 0."""
    chosen = offsets[part[0] : part[1] + 1]
    return chosen - chosen[0]


def _blocks(offsets: np.ndarray, *, at_most: int) -> list[_Range]:
    """Consecutive images or captions with so many fragments together; at least one in each."""
    blocks, start = [], 0
    while start < len(offsets) - 1:
        limit = offsets[start] + at_most
        stop = max(start + 1, int(np.searchsorted(offsets, limit, side="right")) - 1)
        blocks.append((start, stop))
        start = stop
    return blocks


def _in_threads(work: Callable[[int], None], number: int) -> None:
    """Calls `work(0)` to `work(number - 1)` at once, each in a thread that is alone with its core.

    Blocks are independent, so threads need not wait for each other at every product; and a product
    of a block is too small to be shared.
    """
    if number == 1:
        work(0)
        return
    inference = torch.is_inference_mode_enabled()

    def alone(index: int) -> None:
        with torch.inference_mode(inference), torch.no_grad():
            work(index)

    for _ in _threads(number).map(alone, range(number)):
        pass


@cache
def _threads(number: int) -> ThreadPoolExecutor:
    before = torch.get_num_threads()
    pool = ThreadPoolExecutor(number, "scoring", initializer=torch.set_num_threads, initargs=(1,))
    # The number that a thread sets for itself is also what threads to come will start with.
    list(pool.map(lambda _: None, range(number)))
    torch.set_num_threads(before)
    return pool
