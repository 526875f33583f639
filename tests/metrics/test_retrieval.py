"""Recalls against sorting each query's candidates by hand."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from cpfean.errors import DataError, DivergedError
from cpfean.metrics.retrieval import (
    RetrievalMetrics,
    better_captions,
    better_images,
    fold_metrics,
    match_scores,
    retrieval_metrics,
)

PER_IMAGE = 5


def naive_recalls(scores: Tensor) -> dict[str, float]:
    """Ranks by walking down sorted lists in which, of equal scores, wrong candidates come first."""
    num_images, num_captions = scores.shape
    ranks: dict[str, list[int]] = {"i2t": [], "t2i": []}
    for i in range(num_images):
        own = range(i * PER_IMAGE, (i + 1) * PER_IMAGE)
        line = sorted(range(num_captions), key=lambda c: (-scores[i, c].item(), c in own))
        ranks["i2t"].append(min(line.index(c) for c in own))
    for c in range(num_captions):
        own_image = c // PER_IMAGE
        line = sorted(range(num_images), key=lambda i: (-scores[i, c].item(), i == own_image))
        ranks["t2i"].append(line.index(own_image))
    return {
        f"{way}_r{k}": 100 * sum(rank < k for rank in found) / len(found)
        for way, found in ranks.items()
        for k in (1, 5, 10)
    }


@given(seed=st.integers(0, 2**16), num_images=st.integers(1, 15), ties=st.booleans())
def test_recalls_equal_sorting_by_hand(seed: int, num_images: int, ties: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(num_images, num_images * PER_IMAGE, generator=generator)
    if ties:
        scores = (scores * 4).round()
    found = retrieval_metrics(scores).as_dict()
    expected = naive_recalls(scores)
    assert found.pop("rsum") == pytest.approx(sum(expected.values()))
    assert found == pytest.approx(expected)


def test_constant_scores_earn_nothing_and_perfect_ones_everything() -> None:
    constant = torch.zeros(20, 100)
    assert retrieval_metrics(constant).rsum == 0
    perfect = torch.eye(20).repeat_interleave(PER_IMAGE, dim=1)
    assert retrieval_metrics(perfect).rsum == 600


@given(seed=st.integers(0, 2**16), cut=st.integers(1, 8))
def test_counts_of_shares_add_up(seed: int, cut: int) -> None:
    scores = torch.rand(9, 45, generator=torch.Generator().manual_seed(seed))
    matches = match_scores(scores, first=0, captions_per_image=PER_IMAGE).flatten()
    whole = better_images(scores, matches, first=0, captions_per_image=PER_IMAGE)
    parts = [
        better_images(rows, matches, first=first, captions_per_image=PER_IMAGE)
        for first, rows in ((0, scores[:cut]), (cut, scores[cut:]))
    ]
    assert torch.equal(parts[0] + parts[1], whole)
    captions = [
        better_captions(rows, first=first, captions_per_image=PER_IMAGE)
        for first, rows in ((0, scores[:cut]), (cut, scores[cut:]))
    ]
    assert torch.equal(
        torch.cat(captions), better_captions(scores, first=0, captions_per_image=PER_IMAGE)
    )


def test_folds_are_the_diagonal_blocks() -> None:
    scores = torch.rand(12, 60, generator=torch.Generator().manual_seed(0))
    blocks = [
        retrieval_metrics(scores[i : i + 4, 5 * i : 5 * (i + 4)]).as_dict() for i in (0, 4, 8)
    ]
    mean = {key: sum(block[key] for block in blocks) / 3 for key in blocks[0]}
    assert fold_metrics(scores, fold_size=4).as_dict() == pytest.approx(mean)
    with pytest.raises(DataError, match="12 images do not divide into folds of 5"):
        fold_metrics(scores, fold_size=5)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [(0, 0), (2, 7)])
def test_scores_that_are_not_finite_are_refused(bad: float, place: tuple[int, int]) -> None:
    scores = torch.rand(3, 15)
    scores[place] = bad
    with pytest.raises(DivergedError, match=f"image {place[0]}, caption {place[1]}"):
        retrieval_metrics(scores)


def test_columns_that_do_not_belong_to_the_rows_are_refused() -> None:
    with pytest.raises(DataError, match="3 images by 14 captions"):
        retrieval_metrics(torch.rand(3, 14))


def test_metrics_survive_their_dictionary() -> None:
    metrics = retrieval_metrics(torch.rand(7, 35))
    assert RetrievalMetrics.from_dict(metrics.as_dict("val/"), "val/") == metrics
