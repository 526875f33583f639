"""Which numbers a step computes in, by the card's capability; and what float16 asks for."""

from __future__ import annotations

import math
import os
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from torch import distributed, multiprocessing, nn

from cpfean.config import ExperimentConfig
from cpfean.errors import DivergedError, StoppedError
from cpfean.training.checkpoint import read_state
from cpfean.training.precision import (
    AskedPrecision,
    LossScale,
    autocast,
    chosen_precision,
    least_capability,
    precision_of,
    significand_bits,
)
from tests.training.test_loop import Notified, fit, timeless, train

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("card", "capability", "precision"),
    [
        ("GTX 1080", (6, 1), "fp32"),
        ("V100", (7, 0), "fp16"),
        ("T4", (7, 5), "fp16"),
        ("A100", (8, 0), "bf16"),
        ("A10G", (8, 6), "bf16"),
        ("L4", (8, 9), "bf16"),
        ("H100", (9, 0), "bf16"),
        ("B200", (10, 0), "bf16"),
        ("no card", None, "fp32"),
    ],
)
def test_auto_is_what_the_card_is_fast_at(
    card: str, capability: tuple[int, int] | None, precision: str
) -> None:
    assert precision_of("auto", capability) == precision


@pytest.mark.parametrize("asked", ["fp32", "bf16", "fp16"])
def test_what_is_asked_for_by_name_is_taken(asked: AskedPrecision) -> None:
    for capability in (None, (7, 5), (9, 0)):
        assert precision_of(asked, capability) == asked
    assert chosen_precision(asked, CPU) == asked
    assert chosen_precision("auto", CPU) == "fp32"


def in_worker(rank: int, meeting: str, capabilities: list[list[tuple[int, int]]]) -> None:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    distributed.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    torch.save([least_capability(each[rank], CPU) for each in capabilities], f"{meeting}.{rank}")
    distributed.destroy_process_group()


@pytest.mark.slow
def test_the_weakest_card_decides_for_all(tmp_path: Path) -> None:
    assert least_capability((8, 9), CPU) == (8, 9)
    cards = [[(8, 9), (7, 5)], [(9, 0), (10, 0)], [(8, 6), (8, 6)]]
    meeting = str(tmp_path / "meeting")
    multiprocessing.set_forkserver_preload([__name__])
    multiprocessing.start_processes(
        in_worker, (meeting, cards), nprocs=2, start_method="forkserver"
    )
    for rank in range(2):
        found = torch.load(f"{meeting}.{rank}", weights_only=True)
        assert found == [min(each) for each in cards]


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_products_are_made_in_the_precision_and_its_bits_are_told(
    precision: AskedPrecision,
) -> None:
    chosen = chosen_precision(precision, CPU)
    with autocast(chosen, CPU):
        product = torch.ones(2, 3) @ torch.ones(3, 2)
    # The smallest step above 1 is 2^(1 - bits).
    assert torch.finfo(product.dtype).eps == 2.0 ** (1 - significand_bits(chosen))


def one_weight(gradient: float) -> tuple[nn.Parameter, torch.optim.SGD, torch.Tensor]:
    weight = nn.Parameter(torch.zeros(1))
    weight.grad = torch.tensor([gradient])
    return weight, torch.optim.SGD([weight], lr=1.0), weight.grad.norm()


def test_a_step_in_float16_undoes_the_scale() -> None:
    scale = LossScale.to_go_on("fp16", LossScale())
    weight, optimizer, norm = one_weight(-3.0 * scale.value)
    assert scale.step(optimizer, [weight], norm) == 3.0
    assert weight.item() == 3.0
    assert scale.steps == 1


@pytest.mark.parametrize("gradient", [math.inf, math.nan])
def test_a_step_that_overflows_is_left_out_and_halves_the_scale(gradient: float) -> None:
    scale = LossScale(precision="fp16", value=4.0, steps=7)
    weight, optimizer, norm = one_weight(gradient)
    scale.step(optimizer, [weight], norm)
    assert weight.item() == 0.0
    assert (scale.value, scale.steps) == (2.0, 0)
    scale.step(optimizer, [weight], norm)
    with pytest.raises(DivergedError, match=r"optim\.precision"):
        scale.step(optimizer, [weight], norm)


def test_a_scale_that_fits_is_doubled_up_to_a_limit() -> None:
    scale = LossScale(precision="fp16", value=2.0**23, steps=1999)
    weight, optimizer, norm = one_weight(1.0)
    scale.step(optimizer, [weight], norm)
    assert (scale.value, scale.steps) == (2.0**24, 0)
    scale.steps = 1999
    scale.step(optimizer, [weight], norm)
    assert (scale.value, scale.steps) == (2.0**24, 0)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_without_float16_there_is_no_scale(precision: AskedPrecision) -> None:
    chosen = chosen_precision(precision, CPU)
    scale = LossScale.to_go_on(chosen, LossScale(precision="fp16", value=8.0))
    assert scale.value == 1.0
    weight, optimizer, norm = one_weight(math.inf)
    scale.step(optimizer, [weight], norm)  # as ever: the next look finds it
    assert weight.item() == -math.inf


def test_a_scale_goes_on_in_its_own_precision_alone() -> None:
    before = LossScale(precision="fp16", value=8.0, steps=3)
    assert LossScale.to_go_on("fp16", before) == before
    assert LossScale.to_go_on("fp16", LossScale(precision="bf16")).value == 2.0**12


def test_float16_with_a_scale_learns_what_float32_learns(
    tmp_path: Path, data_folder: Path, tiny_config: ExperimentConfig
) -> None:
    losses = {}
    for precision in ("fp32", "fp16"):
        config = tiny_config.with_overrides({"optim.precision": precision, "optim.epochs": 2})
        result, recorder = train(config, data_folder, tmp_path / precision)
        losses[precision] = [row["train/loss"] for row in result.history]
        bits = {row["train/significand_bits"] for row in result.history}
        assert bits == {24 if precision == "fp32" else 11}
        scale = read_state(recorder.folder / "epoch-2").loss_scale
        assert scale.precision == precision
        assert (scale.value > 1) == (precision == "fp16")
    assert losses["fp16"] == pytest.approx(losses["fp32"], rel=0.005)
    assert losses["fp16"] != losses["fp32"]


def test_stopped_in_an_epoch_in_float16_and_resumed_equals_uninterrupted(
    tmp_path: Path, data_folder: Path, tiny_config: ExperimentConfig
) -> None:
    config = tiny_config.with_overrides({"optim.precision": "fp16", "optim.epochs": 2})
    whole, recorder = train(config, data_folder, tmp_path / "whole")
    stopped = Notified(tmp_path / "before", asked=2)
    with pytest.raises(StoppedError):
        fit(
            config,
            data_folder=data_folder,
            cache_dir=tmp_path / "cache",
            reporter=stopped,
            device=CPU,
            notice=stopped,
        )
    resumed, again = train(config, data_folder, tmp_path / "after", stopped.folder / "stopped")
    assert timeless(resumed.history) == timeless(whole.history)
    ends = [read_state(of.folder / "epoch-2").loss_scale for of in (recorder, again)]
    assert asdict(ends[0]) == asdict(ends[1])


@pytest.mark.parametrize(
    "spoilt",
    [
        {"value": 0.0},
        {"value": "much"},
        {"value": 1e9},
        {"steps": -1},
        {"precision": "fp8"},
        {"of": 1},
    ],
)
def test_a_scale_that_no_training_has_written_is_refused(spoilt: dict[str, object]) -> None:
    with pytest.raises((TypeError, ValueError)):
        LossScale(**spoilt)  # type: ignore[arg-type]
