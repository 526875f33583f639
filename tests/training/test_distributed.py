"""Several processes take the very step, and find the very ranks, that one process does."""

from __future__ import annotations

import importlib
import os
import shutil
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from torch import distributed, multiprocessing
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cpfean.config import ExperimentConfig
from cpfean.data.dataset import GlobalBatches
from cpfean.errors import DivergedError, StoppedError
from cpfean.losses.triplet import triplet_loss
from cpfean.model.cpfean import Cpfean
from cpfean.processes import place
from cpfean.training.checkpoint import Checkpoint
from cpfean.training.global_batch import GlobalBatchLoss, data_parallel, find_gradients
from cpfean.training.loop import EpochReport, Notice, fit
from cpfean.training.setup import open_experiment
from cpfean.training.sharding import whole
from tests.model.encoders import write_encoder
from tests.training.test_evaluation import evaluations, refusals
from tests.training.tiny import tiny_experiment

CPU = torch.device("cpu")


def one_step(
    config: ExperimentConfig,
    folder: Path,
    cache: Path,
    mining: Literal["hardest", "all"],
    *,
    clip_norm: float = 1e9,
) -> tuple[float, float, dict[str, torch.Tensor]]:
    """This process's share of a step's loss, norm and gradients of the whole."""
    rank, world_size = place()
    experiment = open_experiment(config, data_folder=folder, cache_dir=cache, device=CPU)
    # Without dropout: what processes draw inside the model is their own.
    model = experiment.model.double().eval()
    step = data_parallel(
        GlobalBatchLoss(model, margin=config.loss.margin), CPU, sharding=config.optim.sharding
    )
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
    norm = find_gradients(step, loss, model.parameters(), clip_norm=clip_norm)
    gradients = {
        name: whole(parameter.grad)
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }
    return loss.item(), norm.item(), gradients


def weights_held(config: ExperimentConfig, folder: Path, cache: Path) -> tuple[int, int]:
    """Numbers that this process holds of a sharded model, outside of steps, and all there are."""
    experiment = open_experiment(config, data_folder=folder, cache_dir=cache, device=CPU)
    model = experiment.model
    total = sum(parameter.numel() for parameter in model.parameters())
    data_parallel(GlobalBatchLoss(model, margin=0.2), CPU, sharding="full")
    own = [p.to_local() if isinstance(p, DTensor) else p for p in model.parameters()]
    return sum(parameter.numel() for parameter in own), total


def everything(config: ExperimentConfig, folder: Path, cache: Path) -> dict[str, Any]:
    """All that is compared; in one go, because starting processes takes the most time."""
    sharded = config.with_overrides({"optim.sharding": "full"})
    return {
        "hardest": one_step(config, folder, cache, "hardest"),
        "all": one_step(config, folder, cache, "all"),
        "hardest, sharded": one_step(sharded, folder, cache, "hardest"),
        "hardest, clipped": one_step(config, folder, cache, "hardest", clip_norm=0.01),
        "hardest, sharded, clipped": one_step(sharded, folder, cache, "hardest", clip_norm=0.01),
        "weights": weights_held(config, folder, cache),
        "evaluations": evaluations(config, folder, cache),
        "refusals": refusals(config, folder, cache),
    }


class Keeper:
    """Keeps the checkpoint of every epoch."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def report(self, report: EpochReport, checkpoint: Checkpoint | None) -> None:
        assert (checkpoint is not None) == (place()[0] == 0)
        if checkpoint is not None:
            checkpoint.save(self.folder / f"epoch-{report.epoch}")


def train(
    config: ExperimentConfig,
    data: Path,
    out: Path,
    *,
    resume_from: Path | None = None,
    notice: Notice | None = None,
) -> list[tuple[float, float]]:
    """Loss and rSum of each epoch, without dropout.

    In double precision, but for a frozen encoder, which is in single precision always: what is
    sharded together has to be of one type.
    """
    with pytest.MonkeyPatch.context() as patch:
        still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        # Not the name `transformers`, which may stand for the module as it was before it loaded.
        encoders = importlib.import_module("transformers")
        patch.setattr(encoders, "BertConfig", partial(encoders.BertConfig, **still))
        if config.model.text.trainable:
            torch.set_default_dtype(torch.float64)
        try:
            result = fit(
                config,
                data_folder=data,
                cache_dir=out / "cache",
                reporter=Keeper(out),
                device=CPU,
                resume_from=resume_from,
                notice=notice,
            )
        finally:
            torch.set_default_dtype(torch.float32)
    return [(row["train/loss"], row["val/rsum"]) for row in result.history]


def trainings(folder: Path, out: Path) -> dict[str, Any]:
    """What several processes make of trainings that one has begun; and the other way round."""
    found: dict[str, Any] = {}
    for kind, config in training_configs(out).items():
        here = out / kind
        found[kind] = {}
        for sharding in ("none", "full"):
            one = config.with_overrides({"optim.sharding": sharding})
            found[kind][sharding] = train(
                one, folder, here / sharding, resume_from=here / "alone" / "epoch-1"
            )
        sharded = config.with_overrides({"optim.sharding": "full"})
        train(sharded.with_overrides({"optim.epochs": 1}), folder, here / "begun")
        if config.model.text.trainable:
            stopped = here / "stopped"
            with pytest.raises(StoppedError):
                train(sharded, folder, here, notice=OnOneProcess(stopped))
            found[kind]["in mid-epoch"] = train(sharded, folder, here, resume_from=stopped)
    return found


class OnOneProcess:
    """Word to stop, which the last process alone is given: after the first step.

    How many steps come before the next look depends on how long a step takes.
    """

    def __init__(self, folder: Path) -> None:
        self.looks = 0
        self._folder = folder

    def given(self) -> bool:
        rank, world_size = place()
        self.looks += 1
        return rank == world_size - 1 and self.looks > 1

    def save(self, checkpoint: Checkpoint | None) -> None:
        assert (checkpoint is not None) == (place()[0] == 0)
        if checkpoint is not None:
            checkpoint.save(self._folder)
        distributed.barrier()  # the others read it next


class Collectives(TorchDispatchMode):
    """Lists what this process asks of the others: each kind, with shapes and types."""

    def __init__(self) -> None:
        super().__init__()
        self.begun: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # what it does with its shares comes here again
        if "c10d" in func.namespace:
            tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
            described = [f"{tuple(x.shape)} {x.dtype} {x.device.type}" for x in tensors]
            self.begun.append(f"{func} {', '.join(described)}")
        return func(*args, **(kwargs or {}))


def endings(config: ExperimentConfig, folder: Path, out: Path) -> list[tuple[str, list[str]]]:
    """How trainings end of which one process alone meets with the reason, and all collectives."""
    spoilt = out / f"spoilt-{place()[0]}"
    shutil.copytree(folder, spoilt)
    features = np.load(spoilt / "train_ims.npy")
    features[3] = np.inf
    np.save(spoilt / "train_ims.npy", features)
    found = []
    for sharding in ("none", "full"):
        one = config.with_overrides({"optim.sharding": sharding, "optim.epochs": 1})
        for data, notice in ((folder, OnOneProcess(out / "noticed")), (spoilt, None)):
            collectives = Collectives()
            with collectives, pytest.raises((StoppedError, DivergedError)) as caught:
                fit(
                    one,
                    data_folder=data,
                    cache_dir=out / "cache",
                    reporter=Keeper(out / "ended"),
                    device=CPU,
                    notice=notice,
                )
            said = f"{type(caught.value).__name__}: {caught.value}"
            found.append((said, collectives.begun))
    return found


def in_worker(
    rank: int, world_size: int, meeting: str, config: dict[str, Any], folder: Path, out: Path
) -> None:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"file://{meeting}", rank=rank, world_size=world_size
    )
    found = everything(ExperimentConfig.from_dict(config), folder, out)
    found["trainings"] = trainings(folder, out)
    found["endings"] = endings(tiny_experiment(), folder, out)
    torch.save(found, f"{meeting}.{rank}")
    distributed.destroy_process_group()


# How the text encoder is treated; one that is frozen runs once, or in every step.
KINDS = ["trained", "frozen", "frozen, in every step"]


def training_configs(out: Path) -> dict[str, ExperimentConfig]:
    """The trainings that are compared, by kind; the frozen encoder is a folder in `out`."""
    base = tiny_experiment().with_overrides(
        {
            "model.regions.dropout": 0.0,
            "model.text.scratch_layers": 2,
            "optim.decay_epoch": 1,
            "optim.clip_norm": 0.5,
        }
    )
    frozen = {
        "model.text.encoder": str(out / "encoder"),
        "model.text.trainable": False,
        "optim.epochs": 2,
    }
    changes: list[dict[str, Any]] = [
        {"optim.epochs": 3},
        frozen | {"data.word_noise": 0.0},
        frozen | {"data.word_noise": 0.2},
    ]
    return {
        kind: base.with_overrides(changed) for kind, changed in zip(KINDS, changes, strict=True)
    }


Found = tuple[dict[str, Any], list[dict[str, Any]]]


@pytest.fixture(
    scope="module",
    params=[pytest.param(2, marks=pytest.mark.long), 3],
    ids=["2 processes", "3 processes"],
)
def alone_and_shared(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, data_folder: Path
) -> Found:
    """What one process finds, and what each of several does. Ten pairs do not divide by three."""
    world_size, tmp_path = request.param, tmp_path_factory.mktemp("meeting")
    arguments = (tiny_experiment().to_dict(), data_folder, tmp_path)
    meeting = str(tmp_path / "meeting")
    write_encoder(tmp_path / "encoder")
    configs = training_configs(tmp_path)
    trained = {
        kind: {"uninterrupted": train(config, data_folder, tmp_path / kind / "alone")}
        for kind, config in configs.items()
    }
    # Forks of a process that has all imports behind it, and no threads as this one has.
    multiprocessing.set_forkserver_preload([__name__, "torch.distributed.fsdp", "transformers"])
    multiprocessing.start_processes(
        in_worker,
        (world_size, meeting, *arguments),
        nprocs=world_size,
        start_method="forkserver",
    )
    shared = [torch.load(f"{meeting}.{rank}", weights_only=True) for rank in range(world_size)]
    for kind, config in configs.items():
        begun = tmp_path / kind / "begun" / "epoch-1"
        trained[kind]["resumed"] = train(config, data_folder, tmp_path / "on", resume_from=begun)
        if not config.model.text.trainable:
            Cpfean.from_pretrained(begun / "best")  # refuses another encoder
    alone = everything(tiny_experiment(), data_folder, tmp_path)
    return alone | {"trainings": trained}, shared


@pytest.mark.parametrize(
    "step", ["hardest", "all", "hardest, sharded", "hardest, clipped", "hardest, sharded, clipped"]
)
def test_shared_step_equals_one_process(alone_and_shared: Found, step: str) -> None:
    alone, shared = alone_and_shared
    loss, norm, gradients = alone[step]
    assert loss > 0
    assert sum(found[step][0] for found in shared) == pytest.approx(loss, abs=1e-8)
    for found in shared:
        _, of_shared_norm, of_shared = found[step]
        assert of_shared_norm == pytest.approx(norm, abs=1e-8)
        assert of_shared.keys() == gradients.keys()
        for name, gradient in gradients.items():
            torch.testing.assert_close(of_shared[name], gradient, atol=1e-8, rtol=0)
    assert max(float(gradient.abs().max()) for gradient in gradients.values()) > 1e-4


def test_a_sharded_model_is_spread_over_the_processes(alone_and_shared: Found) -> None:
    _, shared = alone_and_shared
    (_, total), *_ = [found["weights"] for found in shared]
    for found in shared:
        assert found["weights"][0] < 1.1 * total / len(shared)
    assert sum(found["weights"][0] for found in shared) >= total


@pytest.mark.parametrize("kind", KINDS)
def test_training_goes_on_the_same_with_another_number_of_processes(
    alone_and_shared: Found, kind: str
) -> None:
    alone, shared = alone_and_shared
    expected = alone["trainings"][kind]["uninterrupted"]
    tolerance = 1e-7 if kind == "trained" else 1e-4
    assert len({loss for loss, _ in expected}) == len(expected) > 1
    found = [history for of in shared for history in of["trainings"][kind].values()]
    assert len(found) == len(shared) * (3 if kind == "trained" else 2)
    for history in [*found, alone["trainings"][kind]["resumed"]]:
        for (loss, rsum), (of_alone, rsum_alone) in zip(history, expected, strict=True):
            assert loss == pytest.approx(of_alone, abs=tolerance)
            assert rsum == pytest.approx(rsum_alone, abs=1e-7)


def test_what_one_process_alone_meets_with_ends_all_of_them_at_the_same_collective(
    alone_and_shared: Found,
) -> None:
    _, shared = alone_and_shared
    first = shared[0]["endings"]
    said = [line for line, _ in first]
    assert [line.split(":")[0] for line in said] == ["StoppedError", "DivergedError"] * 2
    assert all(" of epoch 1" in line for line in said)
    for _, collectives in first:
        assert len(collectives) > 10
    assert any("reduce_scatter" in each for each in first[2][1])  # of sharded gradients
    assert [found["endings"] for found in shared] == [first] * len(shared)


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
    _, _, sparse = one_step(config, data_folder, tmp_path, "hardest")
    experiment = open_experiment(config, data_folder=data_folder, cache_dir=tmp_path, device=CPU)
    model = experiment.model.double().eval()
    request = next(iter(GlobalBatches(len(experiment.train), 10, seed=0, epoch=1)))
    batch = experiment.train.training_batch(request)
    scores = model(batch.images._asdict(), batch.captions._asdict())
    triplet_loss(scores, batch.image_ids, margin=config.loss.margin, mining="hardest").backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(sparse[name], parameter.grad, atol=1e-10, rtol=0)
