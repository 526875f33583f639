"""The triplet loss against a loop over pairs, and what it must not depend on."""

from __future__ import annotations

import os
from itertools import product
from pathlib import Path
from typing import Literal, get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, distributed, multiprocessing

from cpfean.losses.triplet import triplet_loss
from cpfean.processes import share

Mining = Literal["hardest", "all"]
MINING: tuple[Mining, ...] = get_args(Mining)
WORKERS = 3


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
    mining: Mining, seed: int, pairs: int, margin: float
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
    mining: Mining, seed: int, pairs: int
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
def test_a_batch_of_one_image_has_no_negatives(mining: Mining) -> None:
    scores = torch.rand(3, 3, dtype=torch.float64, requires_grad=True)
    loss = triplet_loss(scores, torch.zeros(3, dtype=torch.long), margin=0.2, mining=mining)
    loss.backward()
    assert loss == 0
    assert scores.grad is not None
    assert (scores.grad == 0).all()


def test_equal_scores_cost_twice_the_margin_a_pair() -> None:
    loss = triplet_loss(torch.zeros(6, 6), torch.arange(6), margin=0.2, mining="hardest")
    torch.testing.assert_close(loss, torch.tensor(2 * 0.2 * 6))


def shared_batches() -> list[tuple[Tensor, Tensor]]:
    """Batches that do not divide by the workers; in every other one many scores are equal."""
    batches = [make_batch(seed, pairs) for seed, pairs in product(range(8), (4, 7, 11))]
    coarse = [((scores * 4).round() / 4, image_ids) for scores, image_ids in batches[::2]]
    return batches[1::2] + coarse


def shares_of(rank: int, meeting: str) -> None:
    """Writes this worker's share of the loss of every batch, and of its gradient."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"file://{meeting}", rank=rank, world_size=WORKERS
    )
    found = []
    for (scores, image_ids), mining in product(shared_batches(), MINING):
        first, stop = share(len(scores), rank=rank, world_size=WORKERS)
        own = scores[first:stop].clone().requires_grad_()
        loss = triplet_loss(own, image_ids, margin=0.3, mining=mining, first=first)
        loss.backward()
        found.append((loss.detach(), own.grad))
    torch.save(found, f"{meeting}.{rank}")
    distributed.destroy_process_group()


def test_shares_of_several_workers_add_up_to_the_definition(tmp_path: Path) -> None:
    meeting = str(tmp_path / "meeting")
    multiprocessing.set_forkserver_preload([__name__])
    multiprocessing.start_processes(
        shares_of, (meeting,), nprocs=WORKERS, start_method="forkserver"
    )
    shared = [torch.load(f"{meeting}.{rank}", weights_only=True) for rank in range(WORKERS)]
    cases = product(shared_batches(), MINING)
    for ((scores, image_ids), mining), *shares in zip(cases, *shared, strict=True):
        scores.requires_grad_()
        whole = naive_loss(scores, image_ids, 0.3, mining)
        torch.testing.assert_close(sum(loss for loss, _ in shares), whole, atol=1e-12, rtol=0)
        alone = scores.detach().clone().requires_grad_()
        triplet_loss(alone, image_ids, margin=0.3, mining=mining).backward()
        gradient = torch.cat([gradient for _, gradient in shares])
        # Of a caption's equally hard images one worker counts its own; their sum is one anyway.
        torch.testing.assert_close(gradient.sum(dim=0), alone.grad.sum(dim=0), atol=1e-12, rtol=0)
        if scores.unique().numel() == scores.numel():
            (of_whole,) = torch.autograd.grad(whole, scores)
            torch.testing.assert_close(gradient, of_whole, atol=1e-12, rtol=0)
