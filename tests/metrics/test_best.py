"""The best candidates of each query against sorting them by hand."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from cpfean.metrics.best import BestCandidates


def by_hand(scores: Tensor, count: int) -> list[list[int]]:
    """Positions by falling score, equal ones in their order."""
    return [sorted(range(len(row)), key=lambda i: (-row[i], i))[:count] for row in scores.tolist()]


@given(
    seed=st.integers(0, 2**16),
    images=st.integers(1, 25),
    captions=st.integers(1, 40),
    rows=st.integers(1, 9),
    levels=st.sampled_from([1, 3, 1000]),
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_best_are_those_of_a_sorted_list_whatever_rows_come_together(
    seed: int, images: int, captions: int, rows: int, levels: int, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = (torch.rand(images, captions, generator=generator) * levels).round().to(dtype)
    best = BestCandidates(images, captions, captions_each=7, images_each=4, dtype=dtype)
    for start in range(0, images, rows):
        best.add(scores[start : start + rows], first=start)
    assert best.captions.tolist() == by_hand(scores, 7)
    assert best.images.tolist() == by_hand(scores.T, 4)
