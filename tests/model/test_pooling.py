"""VSE-inf's generalized pooling, row by row, against its definition."""

from __future__ import annotations

import math
import typing

import pytest
import torch
from torch import Tensor

from cpfean.config import ExperimentConfig, field_types
from cpfean.model.embeddings import masked_mean
from cpfean.model.pooling import POOLINGS, GeneralizedPooling

COUNTS = (3, 1, 5, 3)
DIM = 7


def pool_one(pooling: GeneralizedPooling, fragments: Tensor) -> Tensor:
    """One set of fragments, none padded: positions, GRU, softmax, sorted values."""
    places = torch.zeros(len(fragments), 32, dtype=torch.float64)
    for place in range(len(fragments)):
        for pair in range(16):
            angle = place / 10000 ** (2 * pair / 32)
            places[place, 2 * pair] = math.sin(angle)
            places[place, 2 * pair + 1] = math.cos(angle)
    hidden = pooling.gru(places[None])[0][0]
    scores = torch.stack([(h[:32] + h[32:]) / 2 @ pooling.score.weight[0] for h in hidden])
    weights = (scores / 0.1).softmax(dim=0)
    columns = [sorted(column, reverse=True) for column in fragments.unbind(dim=1)]
    return torch.stack(
        [sum(w * v for w, v in zip(weights, column, strict=True)) for column in columns]
    )


@pytest.fixture
def pooling() -> GeneralizedPooling:
    torch.manual_seed(0)
    return GeneralizedPooling().double()


def sets(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    fragments = torch.randn(len(COUNTS), max(COUNTS), DIM, generator=generator).double()
    mask = torch.arange(max(COUNTS))[None] < torch.tensor(COUNTS)[:, None]
    return fragments.requires_grad_(), mask


def test_it_is_the_published_pooling_with_gradients(pooling: GeneralizedPooling) -> None:
    fragments, mask = sets(1)
    pooled = pooling(fragments, mask)
    naive = torch.stack(
        [pool_one(pooling, rows[:n]) for rows, n in zip(fragments, COUNTS, strict=True)]
    )
    torch.testing.assert_close(pooled, naive, atol=1e-12, rtol=0)
    leaves = [fragments, *pooling.parameters()]
    upstream = torch.randn_like(pooled)
    for of_pooled, of_naive in zip(
        torch.autograd.grad(pooled, leaves, upstream),
        torch.autograd.grad(naive, leaves, upstream),
        strict=True,
    ):
        torch.testing.assert_close(of_pooled, of_naive, atol=1e-10, rtol=0)


def test_neither_order_nor_padding_has_a_say(pooling: GeneralizedPooling) -> None:
    fragments, mask = sets(2)
    pooled = pooling(fragments, mask)
    order = torch.randperm(max(COUNTS))
    torch.testing.assert_close(pooling(fragments[:, order], mask[:, order]), pooled)
    noisy = torch.where(mask[..., None], fragments, 1e3)
    torch.testing.assert_close(pooling(noisy, mask), pooled)


@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16, torch.float16])
def test_mixed_precision_loses_nothing(given: torch.dtype) -> None:
    torch.manual_seed(0)
    pooling = GeneralizedPooling()
    fragments, mask = sets(4)
    fragments = fragments.detach().to(given)
    expected = pooling(fragments.float(), mask)
    for kind in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", kind):
            found = pooling(fragments, mask)
        assert torch.equal(found, expected)
        found.sum().backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in pooling.parameters())


def test_equal_weights_are_the_mean(pooling: GeneralizedPooling) -> None:
    torch.nn.init.zeros_(pooling.score.weight)
    fragments, mask = sets(3)
    torch.testing.assert_close(pooling(fragments, mask), masked_mean(fragments, mask))


def test_there_is_a_pooling_for_every_choice_of_the_configuration() -> None:
    choices = dict(field_types(ExperimentConfig))["model.alignment.pooling"]
    assert set(typing.get_args(choices)) == POOLINGS.keys()
