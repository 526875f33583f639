"""What is counted for a card that is not here: products, bytes, and the time that they take."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from cpfean.config import ExperimentConfig
from cpfean.training.counting import Counter, Rates
from cpfean.training.timing import Counted, count_training

RATES = Rates(products=1e12, memory=1e11)


def counted_product(rates: Rates = RATES) -> Counter:
    left, right = torch.ones(20, 30), torch.ones(30, 40)
    with Counter(rates) as counter:
        left @ right
    return counter


def test_a_product_is_its_multiplications_and_additions() -> None:
    counter = counted_product()
    assert counter.flops == 2 * 20 * 30 * 40
    assert counter.bytes == (20 * 30 + 30 * 40 + 20 * 40) * 4


def test_an_operation_takes_the_longer_of_computing_and_moving() -> None:
    moving = counted_product(Rates(products=1e12, memory=1e11)).seconds
    computing = counted_product(Rates(products=1e11, memory=1e11)).seconds
    assert moving == pytest.approx(10400 / 0.8e11)
    assert computing == pytest.approx(48000 / 0.4e11)


def test_the_way_back_of_a_layer_is_counted_too() -> None:
    layer, rows = nn.Linear(30, 40), torch.ones(20, 30, requires_grad=True)
    with Counter(RATES) as counter:
        layer(rows).sum().backward()
    assert counter.flops == 3 * 2 * 20 * 30 * 40


@pytest.mark.parametrize("with_gradients", [True, False])
def test_attention_is_four_products_of_queries_and_keys(with_gradients: bool) -> None:
    queries, keys = torch.ones(2, 3, 5, 8), torch.ones(2, 3, 7, 8)
    queries.requires_grad_(with_gradients)
    with torch.set_grad_enabled(with_gradients), Counter(RATES) as counter:
        found = nn.functional.scaled_dot_product_attention(queries, keys, keys)
    forwards = 2 * 2 * (2 * 3) * 5 * 7 * 8
    assert counter.flops == forwards
    if with_gradients:
        with Counter(RATES) as back:
            found.sum().backward()
        assert back.flops == 2.5 * forwards


def test_views_are_free_and_what_is_looked_up_costs_what_it_gives() -> None:
    table, rows = torch.ones(1000, 8), torch.tensor([1, 2])
    with Counter(RATES) as counter:
        table.T[:, :5].reshape(8, 5)[None].expand(3, 8, 5)
    views = counter.bytes
    with Counter(RATES) as counter:
        nn.functional.embedding(rows, table)
    assert views in (0, 2 * 8 * 5 * 4)  # the copy that `reshape` may make
    assert counter.bytes == 2 * 2 * 8 * 4 + 2 * 8


def test_without_gradients_the_same_is_counted() -> None:
    layer, rows = nn.Linear(30, 40), torch.ones(20, 30)
    counts = []
    for guard in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        with guard(), Counter(RATES) as counter:
            layer(rows)
        counts.append((counter.flops, counter.bytes))
    assert len(set(counts)) == 1
    assert counts[0][0] == 2 * 20 * 30 * 40


def test_a_training_is_counted_by_its_size_and_timed_by_the_card(
    tmp_path: Path, data_folder: Path, tiny_config: ExperimentConfig
) -> None:
    def count(overrides: dict[str, object], *, workers: int = 1, speed: float = 1.0) -> Counted:
        return count_training(
            tiny_config.with_overrides(overrides),
            data_folder=data_folder,
            cache_dir=tmp_path,
            workers=workers,
            in_step=Rates(products=4e12 * speed, memory=1e11 * speed),
            in_validation=Rates(products=1e12 * speed, memory=1e11 * speed),
        )

    one, fast = count({}), count({}, speed=2.0)
    assert one.steps == 16 * 5 // tiny_config.optim.batch_size
    assert one.flops > 0
    assert one.bytes > 0
    # What is drawn differs by the step alone, so the counts are the same.
    assert (fast.flops, fast.bytes) == (one.flops, one.bytes)
    assert fast.step_seconds == pytest.approx(one.step_seconds / 2)
    assert fast.validation_seconds == pytest.approx(one.validation_seconds / 2)
    assert count({}, workers=2).flops == pytest.approx(one.flops / 2, rel=0.1)
    assert count({"model.dim": 64}).flops > one.flops
