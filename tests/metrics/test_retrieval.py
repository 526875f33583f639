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
    RankCounter,
    RetrievalMetrics,
    folds,
    query_ranks,
    retrieval_metrics,
)
from tests.metrics.naive import naive_recalls

# How many captions each image has: five as in most data sets, one, ten, or from four to seven.
SIZES = st.one_of(
    *(
        st.lists(st.integers(least, most), min_size=1, max_size=12)
        for least, most in ((5, 5), (1, 1), (10, 10), (4, 7), (1, 12))
    )
)


def owners(sizes: list[int]) -> Tensor:
    """The image of each caption."""
    return torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))


def drawn(seed: int, sizes: list[int], *, ties: bool) -> Tensor:
    """Scores of images with their captions."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(len(sizes), sum(sizes), generator=generator)
    return (scores * 4).round() if ties else scores


@given(seed=st.integers(0, 2**16), sizes=SIZES, ties=st.booleans())
def test_recalls_equal_sorting_by_hand(seed: int, sizes: list[int], ties: bool) -> None:
    scores = drawn(seed, sizes, ties=ties)
    found = retrieval_metrics(scores, owners(sizes)).as_dict()
    expected = naive_recalls(scores, owners(sizes).tolist())
    assert found.pop("rsum") == pytest.approx(sum(expected.values()))
    assert found == pytest.approx(expected)


@given(seed=st.integers(0, 2**16), sizes=SIZES, ties=st.booleans())
def test_ranks_of_single_queries_are_those_behind_the_recalls(
    seed: int, sizes: list[int], ties: bool
) -> None:
    scores, image_of_caption = drawn(seed, sizes, ties=ties), owners(sizes)
    ranks = query_ranks(scores, image_of_caption)
    assert ranks.metrics() == retrieval_metrics(scores, image_of_caption)
    # By hand: wrong candidates that are as good as the best match come before it.
    for image, row in enumerate(scores.tolist()):
        own = [c for c, of in enumerate(image_of_caption.tolist()) if of == image]
        best = max(row[caption] for caption in own)
        wrong = [score for caption, score in enumerate(row) if caption not in own]
        assert ranks.images[image] == 1 + sum(score >= best for score in wrong)
    for caption, column in enumerate(scores.T.tolist()):
        match = column.pop(image_of_caption[caption])
        assert ranks.captions[caption] == 1 + sum(score >= match for score in column)


def test_ranks_are_refused_where_metrics_are() -> None:
    with pytest.raises(DataError, match="expected the 10 captions"):
        query_ranks(torch.zeros(2, 9), owners([5, 5]))
    broken = torch.zeros(2, 10)
    broken[1, 3] = math.nan
    with pytest.raises(DivergedError, match="image 1, caption 3"):
        query_ranks(broken, owners([2, 8]))


def test_constant_scores_earn_nothing_and_perfect_ones_everything() -> None:
    for sizes in ([5] * 20, [1] * 20, [10] * 20, [4, 7, 6, 5] * 5):
        constant = torch.zeros(20, sum(sizes))
        assert retrieval_metrics(constant, owners(sizes)).rsum == 0
        perfect = torch.eye(20)[:, owners(sizes)]
        assert retrieval_metrics(perfect, owners(sizes)).rsum == 600


@pytest.mark.parametrize("captions", [[5] * 23, [1] * 23, [10] * 23, [4, 7, 6, 5] * 5 + [9, 1, 5]])
@given(seed=st.integers(0, 2**16), ties=st.booleans(), order=st.permutations(range(4)))
def test_rows_may_come_in_blocks_and_in_any_order(
    captions: list[int], seed: int, ties: bool, order: list[int]
) -> None:
    """More images than rivals are kept of, in blocks of 1 to 12; images 100 to 122 of a split."""
    scores = drawn(seed, captions, ties=ties)
    before = scores.clone()
    counter = RankCounter(range(100, 123), range(500, 500 + sum(captions)), 100 + owners(captions))
    edges = [0, 1, 13, 18, 23]
    for block in order:
        start, stop = edges[block], edges[block + 1]
        counter.add(scores[start:stop], first=100 + start)
    expected = naive_recalls(scores, owners(captions).tolist())
    found = counter.metrics().as_dict()
    assert found.pop("rsum") == pytest.approx(sum(expected.values()))
    assert found == pytest.approx(expected)
    assert torch.equal(scores, before)


def test_a_score_of_a_gallery_is_named_by_its_place_in_the_split() -> None:
    counter = RankCounter(range(100, 103), range(431, 441), 100 + owners([4, 1, 5]))
    scores = torch.zeros(2, 10)
    scores[1, 7] = math.nan
    counter.add(scores, first=101)
    with pytest.raises(DivergedError, match="image 102, caption 438"):
        counter.metrics()


def test_one_ulp_decides() -> None:
    """A rival that is better by the last bit is better; one that is worse by it is not."""
    scores = torch.zeros(2, 10)
    scores[:, :5] = 0.5
    scores[1, :5] = torch.tensor(0.5).nextafter(torch.tensor(-1.0))
    assert (
        retrieval_metrics(scores, owners([5, 5])).text_to_image.r1 == 50
    )  # captions of image 1 tie
    scores[1, :5] = torch.tensor(0.5).nextafter(torch.tensor(1.0))
    assert retrieval_metrics(scores, owners([5, 5])).text_to_image.r1 == 0


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
        retrieval_metrics(scores, owners([5, 5, 5]))


@pytest.mark.parametrize(
    "image_of_caption",
    [[0, 0, 0, 1, 1, 1, 2], [0, 0, 1, 1, 1], [0, 0, 2, 2, 2, 2], [0, 1, 2, 0, 1, 2], [1, 1, 2, 3]],
)
def test_columns_that_do_not_belong_to_the_rows_are_refused(image_of_caption: list[int]) -> None:
    with pytest.raises(DataError, match="3 images by 6 captions"):
        retrieval_metrics(torch.rand(3, 6), torch.tensor(image_of_caption))


def test_metrics_survive_their_dictionary() -> None:
    metrics = retrieval_metrics(torch.rand(7, 35), owners([5] * 7))
    assert RetrievalMetrics.from_dict(metrics.as_dict("val/"), "val/") == metrics
