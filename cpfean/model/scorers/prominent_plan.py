"""How scores on a GPU are divided into blocks, and those into tiles of a kernel.

Axes:  image, caption   given

A block is a run of images and a run of captions. A tile is a few captions with one image; its sizes
are powers of two, so images and captions go by the power that they need: what a tile computes for
nothing is less than its half.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Int64
from torch import Tensor

MOST_FRAGMENTS = 128  # of an image or caption
_FEWEST_PLACES = 16  # what the tensor cores take

# Shared memory of a program, in bytes, at most: as Triton 3.9 builds the three kernels for an H100,
# by the numbers of a tile, whether it has more than 64 region places, and the bytes of a number. An
# H100 has 227 KB of it, an A100 163, an RTX 40 99.
_SHARED = {
    (4096, False, 2): 48 << 10,
    (4096, True, 2): 80 << 10,
    (8192, False, 2): 80 << 10,
    (8192, True, 2): 97 << 10,
    (16384, True, 2): 148 << 10,
    (4096, False, 4): 97 << 10,
    (4096, True, 4): 132 << 10,
    (8192, False, 4): 225 << 10,
    (8192, True, 4): 225 << 10,
    (16384, True, 4): 385 << 10,
}

# S of a block: long enough for the product and the kernel to run at their rates, and the whole of
# it may still be in the second cache (50 MB of an H100) when the kernel reads it.
_BLOCK_BYTES = 32 << 20
_BLOCK_IMAGES = 128
_TILE_ROWS = 64  # words of a tile: what a product of an H100 takes at a time
_TILE_NUMBERS = 4096  # of S in a tile, more only where a single caption has more

# Numbers of a tile's S that a thread has in the first two kernels: as many as its registers hold
# with what is made of each.
_NUMBERS = 32
_LEAST_WARPS, _MOST_WARPS = 4, 8  # with more, each thread has fewer registers
# For some sizes of the last kernel the assemblers of CUDA 12.8 and 13.1 take 32 registers and spill
# everything else, unless they are told how many there are.
_REGISTERS = 255


@dataclass(frozen=True, kw_only=True, slots=True)
class Tile:
    """What a program has at a time: C captions of L word places with R region places.

    Attributes:
        captions, word_places, region_places: C, L and R, each a power of two.
        num_warps: of 32 threads, that have it.
        registers: that a thread may have, where the assembler has to be told; else None.
    """

    captions: int
    word_places: int
    region_places: int
    num_warps: int
    registers: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Block:
    """Images and captions whose S is made at a time.

    Attributes:
        images, captions: which.
        slots: columns of an image in S.
        forward, words_backward, regions_backward: the tiles of each kernel. Those of the last have
            no captions of two tiles of the second.
    """

    images: slice
    captions: slice
    slots: int
    forward: Tile
    words_backward: Tile
    regions_backward: Tile


def bucket(counts: Int64[Tensor, "n"]) -> Int64[Tensor, "n"]:
    """The least power of two, from 16, with room for so many fragments."""
    floor = counts.clamp(min=_FEWEST_PLACES).double()
    return floor.log2().ceil().exp2().long()


def shared_memory(most_regions: int, most_words: int, *, width: int) -> int:
    """Bytes of shared memory that the tiles of such images and captions need.

    Args:
        most_regions, most_words: of an image and of a caption.
        width: bytes of a number of S.
    """
    regions, words = bucket(torch.tensor([most_regions, most_words])).tolist()
    return _SHARED[max(_TILE_NUMBERS, regions * words), regions > 64, width]


def slots_for(num_regions: Int64[Tensor, "image"]) -> int:
    """Columns of S for each of these images: 16 bytes, which a thread loads at a time, at least."""
    return max(8, -(-int(num_regions.max()) // 8) * 8)


def image_runs(num_regions: Int64[Tensor, "image"]) -> list[slice]:
    """Consecutive images of one bucket."""
    return _runs(bucket(num_regions))


def plan_blocks(
    run: slice,
    num_regions: Int64[Tensor, "image"],
    num_words: Int64[Tensor, "caption"],
    *,
    width: int,
) -> Iterator[Block]:
    """The blocks of a run of images with all captions.

    Args:
        run: of `image_runs`.
        num_regions, num_words: of all images and captions.
        width: bytes of a number of S.
    """
    slots = slots_for(num_regions[run])
    region_places = int(bucket(num_regions[run][:1]))
    step = min(_BLOCK_IMAGES, run.stop - run.start)
    most_rows = max(1, _BLOCK_BYTES // (width * step * slots))
    word_buckets = bucket(num_words)
    for captions in _runs(word_buckets):
        sizes = int(word_buckets[captions.start]), region_places
        most_captions = max(1, most_rows // max(1, int(num_words[captions].max())))
        for first in range(run.start, run.stop, step):
            for start in range(captions.start, captions.stop, most_captions):
                yield Block(
                    images=slice(first, min(first + step, run.stop)),
                    captions=slice(start, min(start + most_captions, captions.stop)),
                    slots=slots,
                    **tiles_of(*sizes, width=width),
                )


def tiles_of(word_places: int, region_places: int, *, width: int) -> dict[str, Tile]:
    """The tile of each kernel, by its name in `Block`.

    Args:
        word_places, region_places: L and R.
        width: bytes of a number of S.
    """
    places = {"word_places": word_places, "region_places": region_places}
    captions = max(1, min(_TILE_ROWS, _TILE_NUMBERS // region_places) // word_places)

    def tile(captions: int, *, numbers: int) -> Tile:
        num_warps = captions * word_places * region_places // (32 * numbers)
        least = min(_LEAST_WARPS, 2 * captions)  # those of one caption are small: 2 do
        num_warps = max(least, min(_MOST_WARPS, num_warps))
        return Tile(captions=captions, num_warps=num_warps, **places)

    half = 1 if width == 2 else 2  # what the forward kernel makes is twice as much in float32
    return {
        # Of longer captions one has more than its registers already.
        "forward": tile(captions if word_places <= 16 else 1, numbers=_NUMBERS // half),
        "words_backward": tile(captions, numbers=_NUMBERS),
        # One warp: if there are more, each makes the small products of all of them once more. And
        # the tensor memory of a B200 takes 4: at its products, reshaped, Triton 3.7 breaks off
        # from 64 words on.
        "regions_backward": Tile(captions=1, num_warps=1, registers=_REGISTERS, **places),
    }


def _runs(values: Int64[Tensor, "n"]) -> list[slice]:
    """Where consecutive values are equal."""
    edges = ((values.diff() != 0).nonzero().squeeze(1) + 1).tolist()
    return [slice(a, b) for a, b in zip([0, *edges], [*edges, len(values)], strict=True)]
