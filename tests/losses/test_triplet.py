"""The triplet loss against a loop over pairs, and what it must not depend on."""

from __future__ import annotations

from typing import Literal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from cpfean.losses.triplet import triplet_loss

MINING = ["hardest", "all"]


def make_batch(seed: int, pairs: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(pairs, pairs, generator=generator, dtype=torch.float64)
    image_ids = torch.randint(0, pairs, (pairs,), generator=generator)
    return scores, image_ids


def naive_loss(scores: Tensor, image_ids: Tensor, margin: float, mining: str) -> Tensor:
    """The definition, one query at a time."""
    total = scores.new_zeros(())
    for matrix in (scores, scores.T):
        for k in range(len(matrix)):
            costs = [
                (margin + matrix[k, c] - matrix[k, k]).clamp(min=0)
                for c in range(len(matrix))
                if image_ids[c] != image_ids[k]
            ]
            if costs:
                total = total + (max(costs) if mining == "hardest" else sum(costs))
    return total


@pytest.mark.parametrize("mining", MINING)
@given(seed=st.integers(0, 2**16), pairs=st.integers(2, 8), margin=st.floats(0.05, 1.0))
def test_loss_and_gradient_equal_the_definition(
    mining: Literal["hardest", "all"], seed: int, pairs: int, margin: float
) -> None:
    scores, image_ids = make_batch(seed, pairs)
    scores.requires_grad_()
    fast = triplet_loss(scores, image_ids, margin=margin, mining=mining)
    slow = naive_loss(scores, image_ids, margin, mining)
    torch.testing.assert_close(fast, slow, atol=1e-12, rtol=0)
    (of_fast,) = torch.autograd.grad(fast, scores)
    if slow.requires_grad:
        (of_slow,) = torch.autograd.grad(slow, scores)
        torch.testing.assert_close(of_fast, of_slow, atol=1e-12, rtol=0)


@pytest.mark.parametrize("mining", MINING)
@given(seed=st.integers(0, 2**16), pairs=st.integers(2, 8))
def test_loss_does_not_depend_on_the_order_of_the_pairs(
    mining: Literal["hardest", "all"], seed: int, pairs: int
) -> None:
    scores, image_ids = make_batch(seed, pairs)
    order = torch.randperm(pairs, generator=torch.Generator().manual_seed(seed))
    loss = triplet_loss(scores, image_ids, margin=0.2, mining=mining)
    permuted = triplet_loss(scores[order][:, order], image_ids[order], margin=0.2, mining=mining)
    torch.testing.assert_close(permuted, loss)


def test_loss_is_zero_once_every_match_wins_by_the_margin() -> None:
    identity, different = torch.eye(4), torch.arange(4)
    assert triplet_loss(identity, different, margin=1.0, mining="hardest") == 0.0
    assert triplet_loss(identity, different, margin=1.5, mining="hardest") == 4 * 2 * 0.5
    assert triplet_loss(identity, different, margin=1.5, mining="all") == 4 * 2 * 3 * 0.5


@pytest.mark.parametrize("mining", MINING)
def test_a_batch_of_one_image_has_no_negatives(mining: Literal["hardest", "all"]) -> None:
    scores = torch.rand(3, 3, dtype=torch.float64, requires_grad=True)
    loss = triplet_loss(scores, torch.zeros(3, dtype=torch.long), margin=0.2, mining=mining)
    loss.backward()
    assert loss == 0
    assert scores.grad is not None
    assert (scores.grad == 0).all()


def test_equal_scores_cost_twice_the_margin_a_pair() -> None:
    loss = triplet_loss(torch.zeros(6, 6), torch.arange(6), margin=0.2, mining="hardest")
    torch.testing.assert_close(loss, torch.tensor(2 * 0.2 * 6))
