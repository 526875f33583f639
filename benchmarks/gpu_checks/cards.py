"""Two processes, each with its own card, against one; and one whose partner is killed."""

from __future__ import annotations

import os
import signal
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Literal

import torch
from torch import distributed, multiprocessing

from cpfean.data.dataset import GlobalBatches
from cpfean.training.global_batch import GlobalBatchLoss, data_parallel, find_gradients
from cpfean.training.optimizer import build_optimizer
from cpfean.training.setup import open_experiment
from gpu_checks.made_up import make_up
from gpu_checks.report import Check, Given

_STEPS = 4
_LOSS = 1e-3
# Seconds that a process may wait for a partner, and within which it has to have ended.
_TIMEOUT, _ENDED = 20, 60


def several_processes(given: Given) -> list[Check]:
    """Losses of a few steps of two processes, and the end of one that lost its partner."""
    if given.on_card and torch.cuda.device_count() < 2:
        return [Check.left_out("processes", "needs two cards")]
    make_up(given.folder)
    alone = _started(given, workers=1, sharding="none")
    checks = []
    shardings: tuple[Literal["none", "full"], ...] = ("none", "full")
    for sharding in shardings:
        found = _started(given, workers=2, sharding=sharding)
        error = max(abs(a - b) / abs(a) for a, b in zip(alone, found, strict=True))
        what = f"two processes, sharding {sharding}: losses of {_STEPS} steps"
        checks.append(Check.at_most("processes", what, error, _LOSS, note="relative to one"))
    return [*checks, _partner_killed(given)]


def _started(given: Given, *, workers: int, sharding: Literal["none", "full"]) -> list[float]:
    """The losses of the first steps, of all processes together."""
    context = multiprocessing.get_context("spawn")
    results = context.SimpleQueue()
    meeting = given.folder / f"meeting-{workers}-{sharding}"
    arguments = (given.device.type, meeting, workers, given.folder, sharding)
    processes = [
        context.Process(target=_train, args=(rank, *arguments, results)) for rank in range(workers)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        if process.exitcode != 0:
            raise RuntimeError(f"a process of {workers} ended with {process.exitcode}")
    shares = [results.get() for _ in range(workers)]
    return [sum(losses) for losses in zip(*shares, strict=True)]


def _train(
    rank: int,
    device_type: str,
    meeting: Path,
    workers: int,
    folder: Path,
    sharding: Literal["none", "full"],
    results: multiprocessing.SimpleQueue,
) -> None:
    device = _meet(rank, device_type, meeting, workers)
    # In a function of its own, so that the wrapped step is gone before the group.
    results.put(_losses(rank, device, workers, folder, sharding))
    if workers > 1:
        distributed.barrier()
        distributed.destroy_process_group()


def _meet(rank: int, device_type: str, meeting: Path, workers: int) -> torch.device:
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    device = torch.device(device_type, rank) if device_type == "cuda" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if workers > 1:
        distributed.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            init_method=f"file://{meeting}",
            rank=rank,
            world_size=workers,
            timeout=timedelta(seconds=_TIMEOUT),
        )
    return device


def _losses(
    rank: int,
    device: torch.device,
    workers: int,
    folder: Path,
    sharding: Literal["none", "full"],
) -> list[float]:
    made_up = make_up(folder)
    config = made_up.config.with_overrides({"optim.sharding": sharding})
    experiment = open_experiment(
        config, data_folder=made_up.data, cache_dir=folder / "cache", device=device
    )
    step = GlobalBatchLoss(experiment.model, margin=config.loss.margin).train()
    parallel = data_parallel(step, device, sharding=sharding)
    optimizer = build_optimizer(experiment.model, config.optim)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    batches = GlobalBatches(
        len(experiment.train),
        config.optim.batch_size,
        seed=0,
        epoch=1,
        rank=rank,
        world_size=workers,
    )
    found = []
    for _, request in zip(range(_STEPS), batches, strict=False):
        optimizer.zero_grad(set_to_none=True)
        batch = experiment.train.training_batch(request).to(device)
        loss = parallel(batch, "hardest", config.optim.batch_size)
        find_gradients(parallel, loss, parameters, clip_norm=config.optim.clip_norm)
        optimizer.step()
        found.append(float(loss.detach()))
    return found


def _partner_killed(given: Given) -> Check:
    """Seconds until a process ends whose partner was killed before a collective."""
    context = multiprocessing.get_context("spawn")
    meeting = given.folder / "meeting-killed"
    processes = [
        context.Process(target=_lose_or_be_lost, args=(rank, given.device.type, meeting))
        for rank in range(2)
    ]
    for process in processes:
        process.start()
    processes[1].join()
    killed = time.monotonic()
    processes[0].join(timeout=_ENDED)
    waited = time.monotonic() - killed
    left_alive = processes[0].exitcode is None
    if left_alive:
        processes[0].kill()
    ended_well = processes[0].exitcode == 0
    return Check.at_most(
        "processes",
        "a partner is killed: the other one ends",
        float("inf") if left_alive or ended_well else waited,
        _ENDED,
        unit="s after",
        note=f"exit codes {processes[0].exitcode} and {processes[1].exitcode}",
    )


def _lose_or_be_lost(rank: int, device_type: str, meeting: Path) -> None:
    device = _meet(rank, device_type, meeting, 2)
    distributed.all_reduce(torch.ones(1, device=device))
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    try:
        for _ in range(10):
            distributed.all_reduce(torch.ones(1, device=device))
            if device.type == "cuda":
                torch.cuda.synchronize()
            time.sleep(0.2)
    except RuntimeError:  # what gloo raises; under NCCL the watchdog ends the process
        sys.exit(1)
