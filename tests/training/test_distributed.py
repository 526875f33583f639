"""Several processes take the very step, and find the very ranks, that one process does."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import distributed, multiprocessing
from torch.nn.parallel import DistributedDataParallel

from cpfean.config import ExperimentConfig
from cpfean.data.dataset import GlobalBatches
from cpfean.losses.triplet import triplet_loss
from cpfean.processes import place
from cpfean.training.global_batch import GlobalBatchLoss
from cpfean.training.setup import open_experiment
from tests.training.test_evaluation import evaluations, refusals
from tests.training.tiny import tiny_experiment

CPU = torch.device("cpu")


def one_step(
    config: ExperimentConfig, folder: Path, cache: Path, mining: Literal["hardest", "all"]
) -> tuple[float, dict[str, torch.Tensor]]:
    """This process's share of a step's loss, and the gradients of the whole."""
    rank, world_size = place()
    experiment = open_experiment(config, data_folder=folder, cache_dir=cache, device=CPU)
    # Without dropout: what processes draw inside the model is their own.
    model = experiment.model.double().eval()
    step: torch.nn.Module = GlobalBatchLoss(model, margin=config.loss.margin)
    if world_size > 1:
        step = DistributedDataParallel(step, broadcast_buffers=False)
    batches = GlobalBatches(
        len(experiment.train),
        config.optim.batch_size,
        seed=0,
        epoch=1,
        rank=rank,
        world_size=world_size,
    )
    loss = step(
        experiment.train.training_batch(next(iter(batches))), mining, config.optim.batch_size
    )
    (loss * world_size).backward()
    gradients = {
        name: parameter.grad
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }
    return loss.item(), gradients


def everything(config: ExperimentConfig, folder: Path, cache: Path) -> dict[str, Any]:
    """All that is compared; in one go, because starting processes takes the most time."""
    return {
        "hardest": one_step(config, folder, cache, "hardest"),
        "all": one_step(config, folder, cache, "all"),
        "evaluations": evaluations(config, folder, cache),
        "refusals": refusals(config, folder, cache),
    }


def in_worker(
    rank: int, world_size: int, meeting: str, config: dict[str, Any], folder: Path, cache: Path
) -> None:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"file://{meeting}", rank=rank, world_size=world_size
    )
    found = everything(ExperimentConfig.from_dict(config), folder, cache)
    torch.save(found, f"{meeting}.{rank}")
    distributed.destroy_process_group()


Found = tuple[dict[str, Any], list[dict[str, Any]]]


@pytest.fixture(scope="module", params=[2, 3], ids=["2 processes", "3 processes"])
def alone_and_shared(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, data_folder: Path
) -> Found:
    """What one process finds, and what each of several does. Ten pairs do not divide by three."""
    world_size, tmp_path = request.param, tmp_path_factory.mktemp("meeting")
    arguments = (tiny_experiment().to_dict(), data_folder, tmp_path)
    meeting = str(tmp_path / "meeting")
    multiprocessing.spawn(in_worker, (world_size, meeting, *arguments), nprocs=world_size)
    shared = [torch.load(f"{meeting}.{rank}", weights_only=True) for rank in range(world_size)]
    return everything(tiny_experiment(), data_folder, tmp_path), shared


@pytest.mark.parametrize("mining", ["hardest", "all"])
def test_shared_step_equals_one_process(alone_and_shared: Found, mining: str) -> None:
    alone, shared = alone_and_shared
    loss, gradients = alone[mining]
    assert loss > 0
    assert sum(found[mining][0] for found in shared) == pytest.approx(loss, abs=1e-8)
    for found in shared:
        _, of_shared = found[mining]
        assert of_shared.keys() == gradients.keys()
        for name, gradient in gradients.items():
            torch.testing.assert_close(of_shared[name], gradient, atol=1e-8, rtol=0)
    assert max(float(gradient.abs().max()) for gradient in gradients.values()) > 1e-3


def test_shared_evaluation_equals_one_process(alone_and_shared: Found) -> None:
    alone, shared = alone_and_shared
    assert [found["evaluations"] for found in shared] == [alone["evaluations"]] * len(shared)


def test_every_process_refuses_what_one_of_them_cannot_rank(alone_and_shared: Found) -> None:
    alone, shared = alone_and_shared
    assert [found["refusals"] for found in shared] == [alone["refusals"]] * len(shared)


def test_sparse_gradient_of_the_hardest_equals_the_dense_one(
    data_folder: Path, tmp_path: Path
) -> None:
    config = tiny_experiment()
    _, sparse = one_step(config, data_folder, tmp_path, "hardest")
    experiment = open_experiment(config, data_folder=data_folder, cache_dir=tmp_path, device=CPU)
    model = experiment.model.double().eval()
    request = next(iter(GlobalBatches(len(experiment.train), 10, seed=0, epoch=1)))
    batch = experiment.train.training_batch(request)
    scores = model(batch.images._asdict(), batch.captions._asdict())
    triplet_loss(scores, batch.image_ids, margin=config.loss.margin, mining="hardest").backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(sparse[name], parameter.grad, atol=1e-10, rtol=0)
