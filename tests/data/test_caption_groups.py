"""Which captions describe which image, against counting by hand."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cpfean.data.caption_groups import CaptionGroups


@given(sizes=st.lists(st.integers(1, 12), min_size=1, max_size=20), data=st.data())
def test_groups_are_those_of_counting(sizes: list[int], data: st.DataObject) -> None:
    groups = CaptionGroups.of_sizes(sizes)
    owners = [image for image, size in enumerate(sizes) for _ in range(size)]
    assert (groups.num_images, groups.num_captions) == (len(sizes), len(owners))
    assert groups.sizes.tolist() == sizes
    assert groups.image_of_caption.tolist() == owners
    for image in range(len(sizes)):
        own = [caption for caption, owner in enumerate(owners) if owner == image]
        assert list(groups.of_image(image)) == own
    assert [groups.image_of(caption) for caption in range(len(owners))] == owners
    assert groups.image_of(np.arange(len(owners))).tolist() == owners
    start = data.draw(st.integers(0, len(sizes)))
    stop = data.draw(st.integers(start, len(sizes)))
    some = groups.of_images(range(start, stop))
    assert [owners[caption] for caption in some] == [o for o in owners if start <= o < stop]
    count = data.draw(st.integers(1, len(sizes)))
    assert groups.first(count).sizes.tolist() == sizes[:count]
    assert groups.is_default == (set(sizes) == {5})


def test_the_number_is_told_as_one_or_as_a_range() -> None:
    assert CaptionGroups.even(3).described == "5"
    assert CaptionGroups.even(3, 1).described == "1"
    assert CaptionGroups.of_sizes([4, 7, 5]).described == "4 to 7"


@pytest.mark.parametrize("images", [[], [1, 1], [0, 0, 2], [0, 1, 0], [-1, 0], [0, 0, 1, 3]])
def test_captions_in_another_order_are_no_groups(images: list[int]) -> None:
    with pytest.raises(ValueError, match="order of the images"):
        CaptionGroups(np.array(images, dtype=np.int64))
