"""Recalls against those of the PyPI package `fico-itr`, the field's way to count them.

It sorts each query's candidates and looks for the match. Where scores tie the sort decides, which
may put the match first; ours puts it last. So the two agree wherever nothing ties with a match, and
with ties ours are what the package finds once every match is a little worse than its equals.
"""

from __future__ import annotations

import pytest
import torch
from fico_itr import instance_retrieval
from torch import Tensor

from cpfean.metrics.retrieval import retrieval_metrics

UNEVEN = [4, 7, 6, 5, 2, 10] * 5
SIZES = pytest.mark.parametrize("sizes", [[5] * 40, [2] * 30, UNEVEN], ids=["5", "2", "uneven"])


def theirs(scores: Tensor, owners: Tensor) -> dict[str, float]:
    both = instance_retrieval(scores.numpy(), captions_per_image=owners.tolist())
    return {
        f"{way}_r{k}": found[f"R@{k}"]
        for way, found in zip(("i2t", "t2i"), both, strict=True)
        for k in (1, 5, 10)
    }


def ours(scores: Tensor, owners: Tensor) -> dict[str, float]:
    found = retrieval_metrics(scores, owners).as_dict()
    return {name: value for name, value in found.items() if name != "rsum"}


def drawn(seed: int, sizes: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Scores in which matches are somewhat better; the image of each caption; where matches are."""
    owners = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    match = owners == torch.arange(len(sizes))[:, None]
    scores = torch.rand(match.shape, generator=torch.Generator().manual_seed(seed))
    return scores.double() + 0.5 * match, owners, match


@SIZES
@pytest.mark.parametrize("seed", range(5))
def test_without_ties_both_find_the_same(seed: int, sizes: list[int]) -> None:
    scores, owners, _ = drawn(seed, sizes)
    found = ours(scores, owners)
    assert found == pytest.approx(theirs(scores, owners))
    assert 0 < found["t2i_r1"] < 100


@SIZES
@pytest.mark.parametrize("seed", range(5))
def test_with_ties_ours_are_never_above_and_are_theirs_with_every_match_put_last(
    seed: int, sizes: list[int]
) -> None:
    scores, owners, match = drawn(seed, sizes)
    tied = (scores * 8).round()
    found, lenient = ours(tied, owners), theirs(tied, owners)
    assert all(found[name] <= lenient[name] for name in found)
    assert found != pytest.approx(lenient)
    assert found == pytest.approx(theirs(tied - 0.01 * match, owners))


def test_constant_scores_earn_nothing_with_us_and_something_there() -> None:
    _, owners, match = drawn(0, [5] * 40)
    constant = torch.zeros(match.shape)
    assert set(ours(constant, owners).values()) == {0.0}
    assert max(theirs(constant, owners).values()) > 0
