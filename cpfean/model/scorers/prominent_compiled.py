"""CPFEAN's scores on processors: blocks of cosines, reduced by the kernel, and their gradients.

Axes:  image, caption   given               region, word   of one or all of them, without padding
       dim              width of the joint embedding space
       most             the largest number of fragments of one image or caption
       row, column      words and regions of a block

A block is one matrix product, which gives the cosines S of some words with some regions, and
reductions over S, made by `cpfean.kernels.prominent` while S is in the cache. Blocks are shared out
to threads. Nothing of S is kept: on the way back a block is computed again.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import pairwise, product
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64, Shaped
from torch import Tensor

from cpfean.kernels import prominent
from cpfean.model.embeddings import CaptionEmbeddings, ImageEmbeddings
from cpfean.model.scorers.pairs import FEW

# So many regions by so many words are a block: S is 1 MB of float32, which the second cache of a
# core holds; smaller blocks make slower products.
_BLOCK_REGIONS = 16 * 36
_BLOCK_WORDS = 448

_GATES = {"soft": prominent.SOFT, "hard": prominent.HARD, "off": prominent.OFF}

_Range = tuple[int, int]


def compiled_scores(
    images: ImageEmbeddings,
    captions: CaptionEmbeddings,
    *,
    lead: Float[Tensor, "caption word"],
    constants: Float[Tensor, "4"],
    gate: Literal["soft", "hard", "off"],
    product_type: torch.dtype,
) -> Float[Tensor, "image caption"]:
    """Scores every image with every caption, as `ProminentAlignment` with one round does.

    Args:
        images, captions: fragments, on a processor.
        lead: log(s) / tau of each word.
        constants: kappa, tau, lambda and beta.
        gate: how gates work.
        product_type: S comes from matrix products in this type.
    """
    regions, thresholds = _without_padding(images.regions, images.mask, images.thresholds)
    words, lead = _without_padding(captions.words, captions.mask, lead)
    scores: Tensor = _CompiledScores.apply(
        regions.rows,
        words.rows,
        thresholds,
        constants,
        regions.gram,
        words.gram,
        lead,
        _Layout(regions.offsets, words.offsets, _GATES[gate], product_type),
    )
    return scores


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
    vectors: Float[Tensor, "n most dim"],
    mask: Bool[Tensor, "n most"],
    others: Shaped[Tensor, "n most"],
) -> tuple[_Fragments, Shaped[Tensor, "n most"]]:
    """The real fragments; and `others` with those of the real ones first."""
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

    regions: Int64[np.ndarray, "image+1"]
    words: Int64[np.ndarray, "caption+1"]
    gate: int
    product_type: torch.dtype


class _CompiledScores(torch.autograd.Function):
    """Blocks of scores going forward; on the way back, blocks of gradients."""

    @staticmethod
    def forward(
        ctx: Any,
        regions: Float[Tensor, "region dim"],
        words: Float[Tensor, "word dim"],
        thresholds: Float[Tensor, "image most_regions"],
        constants: Float[Tensor, "4"],
        region_gram: Float[Tensor, "image most_regions most_regions"],
        word_gram: Float[Tensor, "caption most_words most_words"],
        lead: Float[Tensor, "caption most_words"],
        layout: _Layout,
    ) -> Float[Tensor, "image caption"]:
        tensors = regions, words, thresholds, constants, region_gram, word_gram, lead
        ctx.save_for_backward(*tensors)
        ctx.layout = layout
        return _Blocks(*tensors, layout).scores()

    @staticmethod
    def backward(ctx: Any, *gradients: Float[Tensor, "image caption"]) -> tuple[Tensor | None, ...]:
        with torch.no_grad():
            blocks = _Blocks(*(*ctx.saved_tensors, ctx.layout))
            found = blocks.gradients(gradients[0].contiguous())
        return (*found, None, None, None, None)


class _Blocks:
    """All pairs of some images with some captions, in blocks that are shared out to threads."""

    def __init__(
        self,
        regions: Float[Tensor, "region dim"],
        words: Float[Tensor, "word dim"],
        thresholds: Float[Tensor, "image most_regions"],
        constants: Float[Tensor, "4"],
        region_gram: Float[Tensor, "image most_regions most_regions"],
        word_gram: Float[Tensor, "caption most_words most_words"],
        lead: Float[Tensor, "caption most_words"],
        layout: _Layout,
    ) -> None:
        self.layout = layout
        self.region_rows, self.word_rows = regions.detach(), words.detach()
        self.regions = self.region_rows.to(layout.product_type)
        self.words = self.word_rows.to(layout.product_type)
        self.region_gram, self.word_gram = region_gram, word_gram
        self.thresholds = thresholds.detach().contiguous()
        self.constants = constants.detach()
        self.lead = lead.detach().contiguous()
        self.threads = max(1, min(torch.get_num_threads(), len(thresholds)))
        share = -(-int(layout.regions[-1]) // self.threads)
        self.image_blocks = _blocks(layout.regions, at_most=min(_BLOCK_REGIONS, share))
        self.caption_blocks = _blocks(layout.words, at_most=_BLOCK_WORDS)

    def scores(self) -> Float[Tensor, "image caption"]:
        """The scores."""
        result = self.constants.new_empty(len(self.region_gram), len(self.word_gram))
        # Nothing is added up here, so whoever is free takes the next block.
        blocks = iter(list(product(self.image_blocks, self.caption_blocks)))

        def work(number: int) -> None:
            thread = _Thread(self)
            for images, captions in blocks:
                thread.score(images, captions, result)

        _in_threads(work, self.threads)
        return result

    def gradients(self, upstream: Float[Tensor, "image caption"]) -> list[Tensor]:
        """The gradients of regions, words, thresholds and constants.

        Args:
            upstream: gradient of the scores.
        """
        few = int(upstream.count_nonzero()) < FEW * upstream.numel()
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


class _Images(NamedTuple):
    """The images of a block.

    Attributes:
        regions: one after the other, in the products' type.
        offsets: the first region of each, and the end.
        gram: K of each.
        thresholds: theta of each.
        place: of the regions among those of all images.
    """

    regions: Float[Tensor, "region dim"]
    offsets: Int64[np.ndarray, "image+1"]
    gram: Float[Tensor, "image most most"]
    thresholds: Float[Tensor, "image most"]
    place: slice


class _Captions(NamedTuple):
    """The captions of a block.

    Attributes:
        words: one after the other, in the products' type.
        offsets: the first word of each, and the end.
        gram: G of each.
        lead: log(s) / tau of each word.
    """

    words: Float[Tensor, "word dim"]
    offsets: Int64[np.ndarray, "caption+1"]
    gram: Float[Tensor, "caption most most"]
    lead: Float[Tensor, "caption most"]


class _Thread:
    """What one thread writes the cosines of a block to."""

    def __init__(self, blocks: _Blocks) -> None:
        self.blocks = blocks
        self.cosines = blocks.constants.new_zeros(0)

    def score(
        self, images: _Range, captions: _Range, scores: Float[Tensor, "image caption"]
    ) -> None:
        """Writes the scores of a block where they belong."""
        block = self.multiply(self.images(images), self.captions(captions))
        prominent.local_scores(block, scores.numpy(), images[0], captions[0])

    def images(self, part: _Range) -> _Images:
        """Consecutive images."""
        blocks = self.blocks
        offsets = blocks.layout.regions[part[0] : part[1] + 1]
        place, chosen = slice(offsets[0], offsets[-1]), slice(*part)
        return _Images(
            blocks.regions[place],
            offsets - offsets[0],
            blocks.region_gram[chosen],
            blocks.thresholds[chosen],
            place,
        )

    def captions(self, part: _Range) -> _Captions:
        """Consecutive captions."""
        offsets = self.blocks.layout.words[part[0] : part[1] + 1]
        words = self.blocks.words[offsets[0] : offsets[-1]]
        blocks, chosen = self.blocks, slice(*part)
        return _Captions(
            words,
            offsets - offsets[0],
            blocks.word_gram[chosen],
            blocks.lead[chosen],
        )

    def multiply(self, images: _Images, captions: _Captions) -> prominent.Block:
        """Fills `cosines` with words by regions; what the kernel takes with them."""
        regions = images.regions
        stride = len(regions) + prominent.SLACK
        if len(self.cosines) < len(captions.words) * stride:
            self.cosines = self.cosines.new_zeros(len(captions.words) * stride)
        into = _rows(self.cosines, len(captions.words), stride, len(regions))
        if captions.words.dtype == into.dtype:
            torch.mm(captions.words, regions.T, out=into)
        else:
            into.copy_(captions.words @ regions.T)
        return prominent.Block(
            cosines=self.cosines.numpy(),
            stride=stride,
            word_offsets=captions.offsets,
            region_offsets=images.offsets,
            region_gram=images.gram.numpy(),
            word_gram=captions.gram.numpy(),
            thresholds=images.thresholds.numpy(),
            lead=captions.lead.numpy(),
            constants=self.blocks.constants.numpy(),
            gate=self.blocks.layout.gate,
        )


class _GradientThread(_Thread):
    """One thread's share of the gradients; what belongs to captions is the thread's own."""

    def __init__(
        self,
        blocks: _Blocks,
        d_regions: Float[Tensor, "region dim"],
        d_region_gram: Float[Tensor, "image most most"],
        d_thresholds: Float[Tensor, "image most"],
    ) -> None:
        super().__init__(blocks)
        self.d_cosines = blocks.constants.new_zeros(0)
        self.d_regions = d_regions
        self.d_region_gram = d_region_gram
        self.d_thresholds = d_thresholds
        self.d_words = blocks.constants.new_zeros(blocks.words.shape)
        self.d_word_gram = torch.zeros_like(blocks.word_gram)
        self.d_constants = torch.zeros_like(blocks.constants)

    def propagate(
        self, images: _Range, captions: _Range, upstream: Float[Tensor, "image caption"]
    ) -> None:
        """Adds the gradients that come from a block."""
        d_words = self._propagate(
            images,
            self.captions(captions),
            self.d_word_gram[slice(*captions)],
            upstream,
            starts=(images[0], captions[0]),
        )
        self.d_words[slice(*self.blocks.layout.words[list(captions)])] += d_words

    def propagate_few(self, images: _Range, upstream: Float[Tensor, "image caption"]) -> None:
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
                _Captions(
                    self.blocks.words[rows],
                    offsets,
                    self.blocks.word_gram[captions],
                    self.blocks.lead[captions],
                ),
                d_word_gram,
                upstream[image : image + 1, captions],
                starts=(0, 0),
            )
            self.d_words.index_add_(0, torch.from_numpy(rows), d_words)
            self.d_word_gram.index_add_(0, captions, d_word_gram)

    def _propagate(
        self,
        images: _Range,
        captions: _Captions,
        d_word_gram: Float[Tensor, "caption most most"],
        upstream: Float[Tensor, "all_images all_captions"],
        *,
        starts: tuple[int, int],
    ) -> Float[Tensor, "word dim"]:
        """Adds all but the gradient of the words, and returns that.

        Args:
            starts: where in `upstream` the block starts.
        """
        given = self.images(images)
        block = self.multiply(given, captions)
        if len(self.d_cosines) < len(self.cosines):
            self.d_cosines = torch.zeros_like(self.cosines)
        gradients = prominent.Gradients(
            cosines=self.d_cosines.numpy(),
            region_gram=self.d_region_gram[slice(*images)].numpy(),
            word_gram=d_word_gram.numpy(),
            thresholds=self.d_thresholds[slice(*images)].numpy(),
            constants=self.d_constants.numpy(),
        )
        prominent.local_gradients(block, gradients, upstream.numpy(), *starts)
        words, regions = captions.words, given.regions
        d_cosines = _rows(self.d_cosines, len(words), block.stride, len(regions)).to(words.dtype)
        self.d_regions[given.place] += d_cosines.T @ words
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


def _rows(
    flat: Float[Tensor, " numbers"], num_rows: int, stride: int, num_columns: int
) -> Float[Tensor, "row column"]:
    """The block that a flat buffer starts with."""
    return flat[: num_rows * stride].view(num_rows, stride)[:, :num_columns]


def _blocks(offsets: Int64[np.ndarray, " starts"], *, at_most: int) -> list[_Range]:
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
