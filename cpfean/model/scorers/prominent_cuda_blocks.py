"""CPFEAN's scores on a GPU, block by block: a product, and the Triton kernels on its result.

Axes:  image, caption   given               region, word   fragments of each, padded
       dim              width of the joint embedding space
       row              words of a block's captions, without padding
       slot             region places of an image in S, a multiple of 8
       column           slots of a block's images

Nothing of S is kept: on the way back a block's S is made again. Where embeddings are on a
processor, Triton's interpreter takes the kernels.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int32, Int64
from torch import Tensor

from cpfean.model.scorers.prominent_plan import Block, Tile, image_runs, plan_blocks, slots_for

_GATES = {"soft": 0, "hard": 1, "off": 2}  # SOFT, HARD and OFF of the kernels

# So many warps of a backward kernel keep a GPU of some 130 multiprocessors busy, each of which has
# registers for 8. A constant, not the GPU's own number: it decides in which parts gradients are
# added up.
_WARPS = 2112
_IMAGES_EACH = 8  # images of a program of the forward kernel

# One stage: to load the next image's K and S early takes more registers than there are. Products
# and sums are fused, which Triton will stop to do unasked.
_COMPILER = {"num_stages": 1, "enable_fp_fusion": True}

# dS may not reach the largest number of float16, 65504, when nothing upstream is above 1.
_LARGEST_SLOPE = 1024.0


def compiler_options(tile: Tile) -> dict[str, int]:
    """What Triton is to know of a kernel's program besides its constants."""
    limit = {} if tile.registers is None else {"maxnreg": tile.registers}
    return {**_COMPILER, "num_warps": tile.num_warps, **limit}


def sent(numbers: Int64[Tensor, "n"] | Int32[Tensor, "n"], device: torch.device) -> Tensor:
    """A few numbers of the host on the device, which is not waited for."""
    if device.type != "cuda":
        return numbers.to(device)
    return numbers.pin_memory().to(device, non_blocking=True)


class Inputs(NamedTuple):
    """What the operators are given, `prominent_scores` of `cpfean.model.scorers.prominent_cuda`."""

    regions: Float[Tensor, "image region dim"]
    words: Float[Tensor, "caption word dim"]
    num_regions: Int64[Tensor, "image"]
    num_words: Int64[Tensor, "caption"]
    thresholds: Float[Tensor, "image region"]
    lead: Float[Tensor, "caption word"]
    constants: Float[Tensor, "4"]
    gate: str
    prominence: bool
    product_type: torch.dtype


class _Images(NamedTuple):
    """A run of images, as blocks take them.

    Attributes:
        regions: in the products' type; 0 where there is none.
        gram: K, in float16 unless products are in float32.
        thresholds: theta.
        counts: real regions, on the device.
    """

    regions: Float[Tensor, "image slot dim"]
    gram: Float[Tensor, "image slot slot"]
    thresholds: Float[Tensor, "image slot"]
    counts: Tensor

    def rows(self, part: slice) -> _Images:
        """Some of them."""
        return _Images(*(field[part] for field in self))


class _Captions(NamedTuple):
    """Captions, as blocks take them.

    Attributes:
        rows: words in the products' type, without padding.
        gram: G, in float16 unless products are in float32; arbitrary where there is no word.
        lead: log(s) / tau.
        starts: the first row of each caption and the end, on the device.
        place: of each row among all word places; None where none is padded.
    """

    rows: Float[Tensor, "row dim"]
    gram: Float[Tensor, "caption word word"]
    lead: Float[Tensor, "caption word"]
    starts: Tensor
    place: Int64[Tensor, "row"] | None


class Scoring:
    """All pairs of some images with some captions, block by block."""

    def __init__(self, inputs: Inputs) -> None:
        self.inputs = inputs
        self.constants = inputs.constants.contiguous()
        kind = inputs.product_type
        self.gram_type = torch.float32 if kind == torch.float32 else torch.float16
        self.starts = torch.cat([inputs.num_words.new_zeros(1), inputs.num_words.cumsum(0)])
        self.captions = self._captions()
        self.switches = {
            "GATE": _GATES[inputs.gate],
            "PROMINENCE": inputs.prominence,
            "HALF": kind != torch.float32,
        }
        device = inputs.regions.device
        self.on_device = torch.cuda.device(device) if device.type == "cuda" else nullcontext()

    def scores(self) -> Float[Tensor, "image caption"]:
        """The scores."""
        from cpfean.kernels.triton_forward import score_pairs

        inputs, captions = self.inputs, self.captions
        result = self.constants.new_empty(len(inputs.regions), len(inputs.words))
        with self.on_device:
            for images, block in self._blocks():
                into = result[block.images, block.captions]
                tiles = -(-into.shape[1] // block.forward.captions)
                grid = (tiles, -(-into.shape[0] // _IMAGES_EACH))
                arguments = (
                    self._cosines(images, block),
                    images.gram,
                    captions.gram[block.captions],
                    images.thresholds,
                    captions.lead[block.captions],
                    self.constants,
                    captions.starts[block.captions.start : block.captions.stop + 1],
                    images.counts,
                    into,
                    into.stride(0),
                    *into.shape,
                    _IMAGES_EACH,
                    block.slots // 8,
                    captions.lead.shape[1],
                )
                self.launch(score_pairs, grid, arguments, tile=block.forward)
        return result

    def gradients(
        self, upstream: Float[Tensor, "image caption"]
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The gradients of regions, words, thresholds and constants."""
        inputs = self.inputs
        scale = self._scale(upstream)
        upstream = (upstream / scale).contiguous()
        d_regions = torch.zeros_like(inputs.regions, memory_format=torch.contiguous_format)
        d_rows = self.constants.new_zeros(self.captions.rows.shape)
        d_word_gram = self.constants.new_zeros(self.captions.gram.shape)
        d_thresholds = torch.zeros_like(inputs.thresholds, memory_format=torch.contiguous_format)
        d_constants = torch.zeros_like(self.constants)
        with self.on_device:
            for images, block in self._blocks():
                found = self._block_gradients(images, block, upstream[block.images, block.captions])
                real = min(block.slots, d_regions.shape[1])
                d_regions[block.images, :real].add_(found.regions[:, :real])
                d_thresholds[block.images, :real].add_(found.thresholds[:, :real])
                d_rows[self._rows(block)].add_(found.rows)
                places = found.word_gram.shape[1]
                d_word_gram[block.captions, :places, :places].add_(found.word_gram)
                d_constants += found.constants
        d_words = self._through_words(d_rows, d_word_gram)
        return d_regions * scale, d_words * scale, d_thresholds * scale, d_constants * scale

    def _scale(self, upstream: Float[Tensor, "image caption"]) -> Float[Tensor, ""]:
        """A power of two by which `upstream` is divided: dS is kept in the products' type.

        The sum of the constants bounds the slope of a score, but for lengths near 0.
        """
        slope = ((1 + self.constants.sum()) / _LARGEST_SLOPE).clamp(min=1)
        largest = upstream.abs().amax() * slope
        return torch.where(largest > 0, largest, 1.0).log2().ceil().exp2()

    def _blocks(self) -> Iterator[tuple[_Images, Block]]:
        """The blocks in their order, with their images."""
        inputs = self.inputs
        width = torch.finfo(inputs.product_type).bits // 8
        for run in image_runs(inputs.num_regions):
            images = self._images(run)
            for block in plan_blocks(run, inputs.num_regions, inputs.num_words, width=width):
                part = slice(block.images.start - run.start, block.images.stop - run.start)
                yield images.rows(part), block

    def _images(self, run: slice) -> _Images:
        """Some consecutive images, with as many slots as the largest needs."""
        inputs = self.inputs
        counts = inputs.num_regions[run]
        slots = slots_for(counts)
        regions = inputs.regions[run, :slots].to(inputs.product_type)
        thresholds = inputs.thresholds[run, :slots]
        missing = slots - regions.shape[1]
        regions = torch.nn.functional.pad(regions, (0, 0, 0, missing))
        thresholds = torch.nn.functional.pad(thresholds, (0, missing)).contiguous()
        counts = sent(counts.int(), regions.device)
        none = torch.arange(slots, device=counts.device) >= counts[:, None]
        regions = regions.masked_fill(none[..., None], 0)
        return _Images(regions, self._gram(regions), thresholds, counts)

    def _captions(self) -> _Captions:
        """The captions."""
        inputs = self.inputs
        words = inputs.words.to(inputs.product_type)
        device, most = words.device, words.shape[1]
        total = int(self.starts[-1])
        flat, place = words.flatten(0, 1), None
        if total < len(flat):
            counts = sent(inputs.num_words, device)
            owner = torch.arange(len(counts), device=device).repeat_interleave(
                counts, output_size=total
            )
            starts = sent(self.starts, device)
            place = owner * most + torch.arange(total, device=device) - starts[owner]
            flat = flat[place]
        starts = sent(self.starts.int(), device)
        return _Captions(flat, self._gram(words), inputs.lead.contiguous(), starts, place)

    def _gram(self, vectors: Float[Tensor, "n most dim"]) -> Float[Tensor, "n most most"]:
        vectors = vectors.to(self.gram_type)
        return vectors @ vectors.transpose(1, 2)

    def _rows(self, block: Block) -> slice:
        """The rows of a block's captions."""
        return slice(int(self.starts[block.captions.start]), int(self.starts[block.captions.stop]))

    def _cosines(self, images: _Images, block: Block) -> Float[Tensor, "row column"]:
        """S of a block."""
        return self.captions.rows[self._rows(block)] @ images.regions.flatten(0, 1).T

    def launch(
        self, kernel: Any, grid: tuple[int, int], arguments: tuple[Any, ...], *, tile: Tile
    ) -> None:
        """Starts a kernel.

        Args:
            kernel: one of Triton.
            grid: programs.
            arguments: all that are no constants.
            tile: what each program has at a time.
        """
        sizes = {"C": tile.captions, "L": tile.word_places, "R": tile.region_places}
        kernel[grid](*arguments, **sizes, **self.switches, **compiler_options(tile))

    def _block_gradients(
        self, images: _Images, block: Block, upstream: Float[Tensor, "image caption"]
    ) -> _BlockGradients:
        """The gradients that come from a block."""
        from cpfean.kernels.triton_backward import regions_backward, words_backward

        captions, slots = self.captions, block.slots
        num_images, num_captions = upstream.shape
        # Either kernel goes through shares of what it sums over, whose sums are added up below.
        tiles = -(-num_captions // block.words_backward.captions)
        programs = _WARPS // block.words_backward.num_warps
        tiles_each = -(-tiles // min(tiles, -(-programs // num_images)))
        tile_shares = -(-tiles // tiles_each)
        tiles = -(-num_captions // block.regions_backward.captions)
        programs = _WARPS // block.regions_backward.num_warps
        images_each = -(-num_images // min(num_images, -(-programs // tiles)))
        image_shares = -(-num_images // images_each)
        S = self._cosines(images, block)
        most_words = captions.lead.shape[1]
        new = self.constants.new_empty
        dS = torch.empty_like(S)
        dn = new(num_images, len(S))
        dlog = new(num_captions, num_images * slots)
        dK, dbeta = new(tile_shares, num_images, slots, slots), new(tile_shares, num_images)
        places = block.regions_backward.word_places
        dG = new(image_shares, num_captions, places, places)
        gated = self.inputs.gate != "off"
        make = new if gated else self.constants.new_zeros
        dtheta, dkappa = make(tiles, num_images * slots), make(tiles, num_images)

        common = (
            images.thresholds,
            captions.lead[block.captions],
            self.constants,
            captions.starts[block.captions.start : block.captions.stop + 1],
            images.counts,
            upstream,
            upstream.stride(0),
            num_images,
            num_captions,
        )
        arguments = S, images.gram, *common, tiles_each, slots // 8, most_words
        grid = num_images, tile_shares
        self.launch(
            words_backward, grid, (*arguments, dS, dn, dlog, dK, dbeta), tile=block.words_backward
        )
        results = dS, dn, dlog, dG, dtheta, dkappa
        G = captions.gram[block.captions]
        arguments = S, G, *common, images_each, slots // 8, most_words
        grid = tiles, image_shares
        self.launch(regions_backward, grid, (*arguments, *results), tile=block.regions_backward)

        rows = captions.rows[self._rows(block)]
        d_regions = _product(dS.T, rows).unflatten(0, (num_images, slots))
        d_regions += _through_gram(dK.sum(dim=0), images.regions)
        d_rows = _product(dS, images.regions.flatten(0, 1))
        zero = self.constants.new_zeros(())
        d_constants = torch.stack([dkappa.sum(), zero, zero, dbeta.sum()])
        d_thresholds = dtheta.sum(dim=0).unflatten(0, (num_images, slots))
        d_word_gram = dG.sum(dim=0)[:, :most_words, :most_words]
        return _BlockGradients(d_regions, d_rows, d_thresholds, d_word_gram, d_constants)

    def _through_words(
        self, d_rows: Float[Tensor, "row dim"], d_gram: Float[Tensor, "caption word word"]
    ) -> Float[Tensor, "caption word dim"]:
        """The gradient of the words: of the rows, put in their places, and what comes through G."""
        shape, place = self.inputs.words.shape, self.captions.place
        if place is None:
            words, d_words = self.captions.rows.view(shape), d_rows.view(shape)
        else:
            words, d_words = self.captions.rows.new_zeros(shape), d_rows.new_zeros(shape)
            words.view(-1, shape[2])[place] = self.captions.rows
            d_words.view(-1, shape[2])[place] = d_rows
        return d_words + _through_gram(d_gram, words)


class _BlockGradients(NamedTuple):
    """What a block adds to the gradients."""

    regions: Float[Tensor, "image slot dim"]
    rows: Float[Tensor, "row dim"]
    thresholds: Float[Tensor, "image slot"]
    word_gram: Float[Tensor, "caption places places"]
    constants: Float[Tensor, "4"]


def _product(x: Float[Tensor, "m k"], y: Float[Tensor, "k n"]) -> Float[Tensor, "m n"]:
    """A product with a result in float32, whatever the type of the factors."""
    if x.device.type == "cuda":
        return torch.mm(x, y, out_dtype=torch.float32)
    return x.float() @ y.float()  # processors have no such product


def _through_gram(
    d_gram: Float[Tensor, "n most most"], vectors: Float[Tensor, "n most dim"]
) -> Float[Tensor, "n most dim"]:
    """What the gradient of X X' gives to X. It is symmetric but for rounding."""
    return (d_gram + d_gram.transpose(1, 2)) @ vectors.float()
