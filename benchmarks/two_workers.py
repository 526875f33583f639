"""Do two workers on two cores do twice the work of one?

    python benchmarks/two_workers.py

One process and then two, with one thread each, joined by gloo: training steps of the same global
batch on hardest negatives, each with its own time, and an evaluation of the same images and
captions. In turns; every worker is a fresh process that takes a step before the clock starts.
Random data, frozen text encoder with cached word vectors, everything else trained.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from functools import partial
from pathlib import Path

import torch
from measure import Timing, parser_of, publish, say
from random_data import as_dataset, write_split
from torch import distributed, multiprocessing

from cpfean.config import ExperimentConfig
from cpfean.data.dataset import GlobalBatches
from cpfean.data.split import open_split
from cpfean.training.evaluation import evaluate
from cpfean.training.global_batch import GlobalBatchLoss, data_parallel
from cpfean.training.optimizer import build_optimizer
from cpfean.training.setup import build_model

WORK = ("training", "evaluation")


def main() -> None:
    """Measures and publishes."""
    parser = parser_of(__doc__, "two_workers")
    parser.add_argument("--images", type=int, default=200, help="with five captions each (200)")
    parser.add_argument("--batch", type=int, default=128, help="pairs of a step (128)")
    parser.add_argument("--steps", type=int, default=5, help="a run, each timed (5)")
    parser.add_argument("--dim", type=int, default=1024, help="of the joint space (1024)")
    parser.add_argument("--feature-dim", type=int, default=2048, help="of a region (2048)")
    parser.add_argument("--text-dim", type=int, default=768, help="of a cached word (768)")
    arguments = parser.parse_args()
    seconds: dict[tuple[str, int], list[float]] = {(w, n): [] for w in WORK for n in (1, 2)}
    with tempfile.TemporaryDirectory() as folder:
        write_split(
            Path(folder), images=arguments.images, regions=36, feature_dim=arguments.feature_dim
        )
        for run in range(arguments.runs):
            for workers in (1, 2):
                for work, taken in measure(Path(folder), workers, arguments).items():
                    seconds[work, workers] += taken
            say(f"  run {run + 1} of {arguments.runs}")
    timings = {key: Timing.of(values) for key, values in seconds.items()}
    pairs = {
        "training": arguments.batch**2,
        "evaluation": arguments.images * 5 * arguments.images,
    }
    rows = [
        {
            "work": work,
            "workers": workers,
            "s": timing.median,
            "fastest s": timing.fastest,
            "pairs/s": pairs[work] / timing.median,
            "v one worker": timings[work, 1].median / timing.median,
        }
        for (work, workers), timing in timings.items()
    ]
    publish(arguments.output, rows, **{k: v for k, v in vars(arguments).items() if k != "output"})


def measure(folder: Path, workers: int, arguments: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds of the slowest worker in every step and in the evaluation."""
    context = multiprocessing.get_context("spawn")
    results = context.SimpleQueue()
    rendezvous = folder / f"rendezvous-{workers}-{time.monotonic_ns()}"
    multiprocessing.spawn(
        partial(_worker, workers=workers, folder=folder, arguments=arguments),
        args=(str(rendezvous), results),
        nprocs=workers,
    )
    found = [results.get() for _ in range(workers)]
    return {
        work: [max(times) for times in zip(*(result[work] for result in found), strict=True)]
        for work in WORK
    }


def _worker(
    rank: int,
    rendezvous: str,
    results: multiprocessing.SimpleQueue,
    *,
    workers: int,
    folder: Path,
    arguments: argparse.Namespace,
) -> None:
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    distributed.init_process_group(
        "gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=workers
    )
    # In a function of its own, so that the wrapped step is gone before the group: the other way
    # round, torch now and then waits for itself at the end of the process.
    results.put(_taken(rank, workers=workers, folder=folder, arguments=arguments))
    distributed.barrier()
    distributed.destroy_process_group()


def _taken(
    rank: int, *, workers: int, folder: Path, arguments: argparse.Namespace
) -> dict[str, list[float]]:
    """Seconds of this worker in every step and in the evaluation."""
    split = open_split(folder, "test", num_regions=36)
    dataset, tokenizer = as_dataset(split, text_dim=arguments.text_dim)
    config = ExperimentConfig().with_overrides(
        {"model.dim": arguments.dim, "model.text.scratch_dim": arguments.text_dim}
    )
    torch.manual_seed(0)
    model = build_model(config, split=split, tokenizer=tokenizer)
    model.backbone.requires_grad_(False)
    step = GlobalBatchLoss(model, margin=config.loss.margin).train()
    parallel = data_parallel(step, torch.device("cpu"))
    optimizer = build_optimizer(model, config.optim)
    requests = [
        request
        for epoch in range(1 + arguments.steps)
        for request in GlobalBatches(
            len(dataset), arguments.batch, seed=0, epoch=epoch, rank=rank, world_size=workers
        )
    ]

    def train(number: int) -> float:
        started = time.perf_counter()
        optimizer.zero_grad()
        batch = dataset.training_batch(requests[number])
        (parallel(batch, "hardest", arguments.batch) * workers).backward()
        optimizer.step()
        return time.perf_counter() - started

    train(0)
    distributed.barrier()
    taken = {"training": [train(number) for number in range(1, 1 + arguments.steps)]}
    distributed.barrier()
    started = time.perf_counter()
    evaluate(model, dataset, protocol="full", batch_size=128, device=torch.device("cpu"))
    return taken | {"evaluation": [time.perf_counter() - started]}


if __name__ == "__main__":
    main()
