"""The pretended device refuses, waits and computes as a GPU would."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from tests.pretended_cuda.device import Pretended, pretended

CUDA = torch.device("cuda")
REFUSED: dict[str, Callable[[Tensor], Any]] = {
    "a sum over both devices": lambda x: x + torch.ones(3),
    "a product over both devices": lambda x: torch.ones(2, 2) @ x,
    "a tensor filled from the other device": lambda x: torch.cat([x, torch.zeros(1, 3)]),
    "the host's tensor at the device's places": lambda x: torch.ones(9)[x.long()],
    "numpy": lambda x: x.numpy(),
}
WAITS: dict[str, Callable[[Tensor], Any]] = {
    "item": lambda x: x.sum().item(),
    "a truth value": lambda x: bool((x > 0).any()),
    "a list": lambda x: x.tolist(),
    "a copy to the host": lambda x: x.cpu(),
    "a blocking copy to the device": lambda x: torch.ones(3).to(x.device),
    "a copy of what is not pinned": lambda x: torch.ones(3).to(x.device, non_blocking=True),
    "new_tensor": lambda x: x.new_tensor([1.0]),
    "a tensor of numbers": lambda x: torch.tensor([1.0], device=x.device),
    "a mask as index": lambda x: x[x > 0],
    "writing at a mask": lambda x: x.clone().__setitem__(x > 0, x[0, 0]),
    "the host's index": lambda x: x[torch.tensor([0, 1])],
    "the host's number among the device's": lambda x: torch.where(x > 0, x, torch.tensor(0.0)),
    "different values": lambda x: x.unique(),
    "places of what is not zero": lambda x: x.nonzero(),
    "equality": lambda x: torch.equal(x, x),
}
GOES_ON: dict[str, Callable[[Tensor], Any]] = {
    "a pinned copy": lambda x: torch.ones(3).pin_memory().to(x.device, non_blocking=True),
    "filling": lambda x: x.new_full((), 2.0),
    "masked_fill": lambda x: x.masked_fill(x > 0, 0.0),
    "a number of the host": lambda x: x + 2.0,
    "the device's index": lambda x: x[x.argmax(dim=0) % 2],
    "a slice": lambda x: x[1:, :2],
    "searching": lambda x: torch.searchsorted(x[0], x),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_a_gpu_refuses_is_refused(what: str) -> None:
    with pretended():
        x = torch.zeros(2, 3, device=CUDA)
        with pytest.raises((RuntimeError, TypeError), match="device"):
            REFUSED[what](x)


@pytest.mark.parametrize("what", WAITS)
def test_what_the_host_waits_for_is_recorded_with_its_line(what: str) -> None:
    with pretended() as record:
        x = torch.randn(2, 3, device=CUDA)
        record.clear()
        WAITS[what](x)
    (where,) = record.waits
    assert where.startswith("tests/pretended_cuda/test_device.py:")


@pytest.mark.parametrize("what", GOES_ON)
def test_what_nobody_waits_for_is_not_recorded(what: str) -> None:
    with pretended() as record:
        x = torch.randn(2, 3, device=CUDA)
        GOES_ON[what](x)
    assert record.waits == {}
    assert record.launches


def test_nothing_is_left_behind() -> None:
    with pretended():
        assert torch.zeros(1, device=CUDA).is_cuda
    assert not torch.cuda.is_available()
    with pytest.raises((RuntimeError, AssertionError), match="CUDA"):
        torch.zeros(1, device=CUDA)
    x = torch.ones(2, requires_grad=True)
    x.sum().backward()
    assert x.grad is not None


def test_autocast_has_the_types_of_cuda() -> None:
    with pretended(), torch.autocast("cuda", torch.bfloat16):
        x = torch.ones(2, 3, device=CUDA)
        assert (x @ x.T).dtype == torch.bfloat16
        assert nn.functional.layer_norm(x.bfloat16(), [3]).dtype == torch.float32


def test_a_training_step_is_that_of_a_processor() -> None:
    def steps(device: torch.device) -> list[Tensor]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.ReLU(), nn.Linear(8, 2))
        inputs, wanted = torch.randn(6, 4), torch.randn(6, 2)
        model.to(device)
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        for _ in range(3):
            optimizer.zero_grad()
            (model(inputs.to(device)) - wanted.to(device)).square().sum().backward()
            nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
        assert all(isinstance(p, Pretended) == (device.type == "cuda") for p in model.parameters())
        return [parameter.detach().cpu() for parameter in model.parameters()]

    with pretended():
        found = steps(CUDA)
    torch.testing.assert_close(found, steps(torch.device("cpu")))


def test_a_recurrent_layer_is_that_of_a_processor() -> None:
    torch.manual_seed(0)
    gru = nn.GRU(3, 4, batch_first=True, bidirectional=True).double()
    places = torch.randn(3, 5, 3, dtype=torch.float64)

    def run(device: torch.device) -> list[Tensor]:
        packed = pack_padded_sequence(places.to(device), torch.tensor([5, 3, 1]), batch_first=True)
        hidden, _ = pad_packed_sequence(gru.to(device)(packed)[0], batch_first=True)
        gradients = torch.autograd.grad(hidden.square().sum(), list(gru.parameters()))
        return [hidden.detach().cpu(), *(gradient.cpu() for gradient in gradients)]

    expected = run(torch.device("cpu"))
    with pretended(), pytest.warns(UserWarning, match="cuDNN"):
        found = run(CUDA)
    torch.testing.assert_close(found, expected)
