"""How scores on a GPU are divided: every pair once, in tiles that have room for it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cpfean.model.scorers.prominent_plan import (
    MOST_FRAGMENTS,
    Tile,
    bucket,
    image_runs,
    plan_blocks,
    shared_memory,
)

LENGTHS = st.lists(st.integers(1, MOST_FRAGMENTS), min_size=1, max_size=300)


@given(num_regions=LENGTHS, num_words=LENGTHS, width=st.sampled_from([2, 4]))
def test_every_pair_is_in_one_block_whose_tiles_have_room_for_it(
    num_regions: list[int], num_words: list[int], width: int
) -> None:
    regions, words = torch.tensor(num_regions), torch.tensor(num_words)
    times = torch.zeros(len(regions), len(words), dtype=torch.long)
    for run in image_runs(regions):
        for block in plan_blocks(run, regions, words, width=width):
            times[block.images, block.captions] += 1
            most_regions = int(regions[block.images].max())
            most_words = int(words[block.captions].max())
            assert most_regions <= block.slots <= block.forward.region_places
            assert block.slots % 8 == 0
            rows = int(words[block.captions].sum())
            images, captions = regions[block.images], words[block.captions]
            # 32 MB, unless one caption alone is more than that.
            assert len(captions) == 1 or rows * len(images) * block.slots * width <= 32 << 20
            for tile in (block.forward, block.words_backward, block.regions_backward):
                assert most_words <= tile.word_places
                assert most_regions <= tile.region_places
            # What the regions' kernel passes over is no part of a tile of which the words' has set
            # what it adds to.
            assert block.words_backward.captions % block.regions_backward.captions == 0
    assert (times == 1).all()


def test_buckets_are_the_powers_of_two_from_16() -> None:
    counts = torch.tensor([0, 1, 16, 17, 32, 33, 64, 65, 128])
    assert bucket(counts).tolist() == [16, 16, 16, 32, 32, 64, 64, 128, 128]


def test_a_tile_is_a_few_captions_for_a_few_warps() -> None:
    (block,) = plan_blocks(slice(0, 2), torch.tensor([36, 36]), torch.tensor([9, 13]), width=2)
    sizes = {"word_places": 16, "region_places": 64}
    assert block.forward == Tile(captions=4, num_warps=4, **sizes)
    assert block.words_backward == Tile(captions=4, num_warps=4, **sizes)
    assert block.regions_backward == Tile(captions=1, num_warps=1, registers=255, **sizes)


@pytest.mark.parametrize("width", [2, 4])
def test_larger_tiles_need_more_shared_memory(width: int) -> None:
    sizes = (1, 36, 64, 100, 128)
    needed = [[shared_memory(r, w, width=width) for w in sizes] for r in sizes]
    assert all(row == sorted(row) for row in needed)
    assert all(column == sorted(column) for column in map(list, zip(*needed, strict=True)))
    # 36 regions and a sentence have room on any GPU that there are tensor cores on.
    assert needed[1][0] <= 99 * 1024
