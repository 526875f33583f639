"""Recalls against sorting each query's candidates by hand."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cpfean.errors import DataError, DivergedError
from cpfean.metrics.retrieval import (
    RankCounter,
    RetrievalMetrics,
    folds,
    query_ranks,
    retrieval_metrics,
)
from tests.metrics.naive import naive_recalls

PER_IMAGE = 5


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


@given(seed=st.integers(0, 2**16), num_images=st.integers(1, 15), ties=st.booleans())
def test_ranks_of_single_queries_are_those_behind_the_recalls(
    seed: int, num_images: int, ties: bool
) -> None:
    scores = torch.rand(
        num_images, num_images * PER_IMAGE, generator=torch.Generator().manual_seed(seed)
    )
    if ties:
        scores = (scores * 4).round()
    ranks = query_ranks(scores)
    assert ranks.metrics() == retrieval_metrics(scores)
    # By hand: wrong candidates that are as good as the best match come before it.
    for image, row in enumerate(scores.tolist()):
        own = range(image * PER_IMAGE, (image + 1) * PER_IMAGE)
        best = max(row[caption] for caption in own)
        wrong = [score for caption, score in enumerate(row) if caption not in own]
        assert ranks.images[image] == 1 + sum(score >= best for score in wrong)
    for caption, column in enumerate(scores.T.tolist()):
        match = column.pop(caption // PER_IMAGE)
        assert ranks.captions[caption] == 1 + sum(score >= match for score in column)


def test_ranks_are_refused_where_metrics_are() -> None:
    with pytest.raises(DataError, match="expected 5 captions"):
        query_ranks(torch.zeros(2, 9))
    broken = torch.zeros(2, 10)
    broken[1, 3] = math.nan
    with pytest.raises(DivergedError, match="image 1, caption 3"):
        query_ranks(broken)


def test_constant_scores_earn_nothing_and_perfect_ones_everything() -> None:
    constant = torch.zeros(20, 100)
    assert retrieval_metrics(constant).rsum == 0
    perfect = torch.eye(20).repeat_interleave(PER_IMAGE, dim=1)
    assert retrieval_metrics(perfect).rsum == 600


@given(seed=st.integers(0, 2**16), ties=st.booleans(), order=st.permutations(range(4)))
def test_rows_may_come_in_blocks_and_in_any_order(seed: int, ties: bool, order: list[int]) -> None:
    """More images than rivals are kept of, in blocks of 1 to 12; images 100 to 122 of a split."""
    scores = torch.rand(23, 115, generator=torch.Generator().manual_seed(seed))
    if ties:
        scores = (scores * 8).round()
    before = scores.clone()
    counter = RankCounter(range(100, 123), captions_per_image=PER_IMAGE)
    edges = [0, 1, 13, 18, 23]
    for block in order:
        start, stop = edges[block], edges[block + 1]
        counter.add(scores[start:stop], first=100 + start)
    expected = naive_recalls(scores)
    found = counter.metrics().as_dict()
    assert found.pop("rsum") == pytest.approx(sum(expected.values()))
    assert found == pytest.approx(expected)
    assert torch.equal(scores, before)


def test_one_ulp_decides() -> None:
    """A rival that is better by the last bit is better; one that is worse by it is not."""
    scores = torch.zeros(2, 10)
    scores[:, :5] = 0.5
    scores[1, :5] = torch.tensor(0.5).nextafter(torch.tensor(-1.0))
    assert retrieval_metrics(scores).text_to_image.r1 == 50  # captions of image 1 tie
    scores[1, :5] = torch.tensor(0.5).nextafter(torch.tensor(1.0))
    assert retrieval_metrics(scores).text_to_image.r1 == 0


def test_folds_are_consecutive_and_of_one_size() -> None:
    assert folds(12, fold_size=4) == [range(4), range(4, 8), range(8, 12)]
    with pytest.raises(DataError, match="12 images do not divide into folds of 5"):
        folds(12, fold_size=5)


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
