"""How fast do batches come, and how much of it does a step notice?

    python benchmarks/data_loading.py

Writes random features of the size of bottom-up attention into a temporary folder, whence the
system keeps them in memory, and gathers from the mapped file: training batches of 128 random
pairs with everything that belongs to them (boxes, overlaps, labels, word pieces), with and without
region dropout, and the consecutive images of an evaluation. Beside each, the same bytes copied with
`numpy.copyto` from consecutive images of the file into memory that is there already.

The second table has a step of a given length, which keeps one core busy with matrix products, and
says how long it waits for its batch: gathered in between, and gathered ahead by a thread.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measure import Timing, in_turns, parser_of, publish, say, table
from random_data import as_dataset, write_split

from cpfean.data.batch import Batch
from cpfean.data.dataset import GlobalBatches, RetrievalDataset
from cpfean.data.prefetch import prefetched

DROPOUT = 0.2


def main() -> None:
    """Measures and publishes."""
    parser = parser_of(__doc__, "data_loading")
    parser.add_argument("--images", type=int, default=1500, help="in the file (1500)")
    parser.add_argument("--regions", type=int, default=36, help="of an image (36)")
    parser.add_argument("--feature-dim", type=int, default=2048, help="of a region (2048)")
    parser.add_argument("--batch-size", type=int, default=128, help="pairs (128)")
    parser.add_argument("--batches", type=int, default=20, help="in a run (20)")
    parser.add_argument("--step", type=float, default=0.05, help="seconds of a step (0.05)")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    waits = []
    for dtype in ("float32", "float16"):
        with tempfile.TemporaryDirectory() as folder:
            say(f"writing {dtype}")
            split = write_split(
                Path(folder),
                images=arguments.images,
                regions=arguments.regions,
                feature_dim=arguments.feature_dim,
                dtype=dtype,
            )
            plain, _ = as_dataset(split)
            dropping, _ = as_dataset(split, region_dropout=DROPOUT)
            rows += rates(plain, dropping, dtype, arguments)
            waits += waiting(dropping, dtype, arguments)
            del split, plain, dropping
    publish(arguments.output, rows, waiting=waits)
    print(f"\n{table(waits)}")


def rates(
    plain: RetrievalDataset, dropping: RetrievalDataset, dtype: str, arguments: argparse.Namespace
) -> list[dict[str, Any]]:
    """Rows of the first table: bytes of features by second."""
    features = plain.split.regions.features
    size = min(arguments.batch_size, len(features))
    kept = dropping.training_batch(next(iter(requests(dropping, arguments)))).images.features
    own = features[:size].nbytes
    into = np.empty_like(features[:size])
    cut = into.reshape(-1)[: kept.numel()]
    flat = features.reshape(-1)
    starts = np.linspace(0, len(features) - size, arguments.batches, dtype=int)
    width = features[0].size

    def copy(target: np.ndarray) -> None:
        for start in starts:
            begin = start * width
            np.copyto(target, flat[begin : begin + len(target)])

    def gather(dataset: RetrievalDataset) -> None:
        for request in requests(dataset, arguments):
            dataset.training_batch(request)

    def read() -> None:
        for start in starts:
            plain.image_batch(range(start, start + size))

    calls: dict[str, tuple[Callable[[], None], int]] = {
        "plain copy": (lambda: copy(into.reshape(-1)), own),
        "training batch": (lambda: gather(plain), own),
        "consecutive images": (read, own),
        f"plain copy of {kept.shape[1]} regions": (lambda: copy(cut), cut.nbytes),
        f"training batch, region dropout {DROPOUT}": (lambda: gather(dropping), cut.nbytes),
    }
    timings = in_turns({name: call for name, (call, _) in calls.items()}, runs=arguments.runs)
    rows = []
    for name, (_, size_of_batch) in calls.items():
        seconds = timings[name].median / arguments.batches
        by_size = {own: "plain copy", cut.nbytes: f"plain copy of {kept.shape[1]} regions"}
        yardstick = timings[by_size[size_of_batch]].median / arguments.batches
        rows.append(
            {
                "features": dtype,
                "what": name,
                "MB a batch": size_of_batch / 1e6,
                "ms a batch": 1e3 * seconds,
                "GB/s": size_of_batch / seconds / 1e9,
                "v plain copy": yardstick / seconds,
            }
        )
    return rows


def waiting(
    dataset: RetrievalDataset, dtype: str, arguments: argparse.Namespace
) -> list[dict[str, Any]]:
    """Rows of the second table: what a step waits for its batch."""
    matrix = torch.randn(512, 512)
    waits: dict[str, list[float]] = {"in between": [], "ahead": []}

    def steps(name: str, batches: Iterable[Batch]) -> None:
        asked = time.perf_counter()
        each = []
        for _ in batches:
            came = time.perf_counter()
            each.append(came - asked)
            while time.perf_counter() - came < arguments.step:
                matrix @ matrix
            asked = time.perf_counter()
        waits[name].append(statistics.median(each))

    def made() -> Iterable[Batch]:
        return map(dataset.training_batch, requests(dataset, arguments))

    def ahead() -> None:
        with prefetched(made(), pin=False) as batches:
            steps("ahead", batches)

    in_turns(
        {"in between": lambda: steps("in between", made()), "ahead": ahead}, runs=arguments.runs
    )
    return [
        {
            "features": dtype,
            "gathered": name,
            "ms of a step": 1e3 * arguments.step,
            "ms waited": 1e3 * Timing.of(values[1:]).median,
        }
        for name, values in waits.items()
    ]


def requests(dataset: RetrievalDataset, arguments: argparse.Namespace) -> Iterable[Any]:
    """So many batches of random pairs, epoch after epoch."""
    left = arguments.batches
    epoch = 0
    while left:
        epoch += 1
        batches = GlobalBatches(len(dataset), arguments.batch_size, seed=0, epoch=epoch)
        for _, request in zip(range(left), batches, strict=False):
            left -= 1
            yield request


if __name__ == "__main__":
    main()
