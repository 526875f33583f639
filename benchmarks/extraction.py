"""Photographs a second: the models alone, threads of one process, and Ray Data.

    python benchmarks/extraction.py PHOTOS --detector NAME --backbone NAME

The models alone are the bare loop: photographs that are decoded already, one after the other, on
one thread. The others do all that `extract.py` does but for putting the folder together. Each is
timed from when there are as many batches as workers to the last one, without what starting takes.
All come to the same bytes, which is compared.
"""

from __future__ import annotations

import argparse
import functools
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from measure import parser_of, publish, say

from cpfean.data.convert.photographs import find_photographs
from cpfean.extraction.batches import Batch, Description, one_thread
from cpfean.extraction.in_process import Made, Threads
from cpfean.photographs.decoding import read_photograph
from cpfean.photographs.extractor import RegionExtractor
from cpfean.photographs.settings import ExtractionSettings
from orchestration.extraction import OnRay
from orchestration.settings import Settings

Run = Callable[[Sequence[Batch]], Iterable[Made]]


def main() -> None:
    """Measures and publishes."""
    parser = parser_of(__doc__, "extraction")
    parser.add_argument("photographs", type=Path, help="as extract.py takes them")
    parser.add_argument("--detector", default=ExtractionSettings().detector)
    parser.add_argument("--backbone", default=ExtractionSettings().backbone)
    parser.add_argument("--count", type=int, default=96, help="photographs of each run (96)")
    parser.add_argument("--batch-size", type=int, default=4, help="photographs of a batch (4)")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2], help="(1 2)")
    parser.add_argument("--no-ray", action="store_true", help="leave Ray Data out")
    arguments = parser.parse_args()
    rows, is_same = compared(arguments)
    publish(arguments.output, rows, same_bytes=is_same, photographs=arguments.count)
    if not is_same:
        raise SystemExit("the ways do not come to the same bytes")


def compared(arguments: argparse.Namespace) -> tuple[list[dict[str, Any]], bool]:
    """Every way in turn, and whether all come to the same."""
    settings = ExtractionSettings(
        detector=str(arguments.detector), backbone=str(arguments.backbone), features="backbone"
    )
    found = [one for of in find_photographs(str(arguments.photographs)).values() for one in of]
    paths = [str(Path(one.path).absolute()) for one in found][: arguments.count]
    size = arguments.batch_size
    batches = [
        Batch(number=number, key=f"{number:05d}", paths=tuple(paths[start : start + size]))
        for number, start in enumerate(range(0, len(paths), size))
    ]
    make = functools.partial(made_extractor, settings)
    rates: dict[str, list[float]] = {}
    contents: list[dict[int, bytes]] = []
    for run in range(arguments.runs):
        rates.setdefault("models alone", []).append(models_alone(make, paths))
        for workers in arguments.workers:
            here = Threads(make, workers=workers)
            measured(rates, contents, f"threads, {workers}", here, batches, workers=workers)
            if not arguments.no_ray:
                on_ray(rates, contents, make, batches, workers=workers)
        say(f"  run {run + 1} of {arguments.runs}")
    alone = sorted(rates["models alone"])[len(rates["models alone"]) // 2]
    rows = []
    for way, found_rates in rates.items():
        median = sorted(found_rates)[len(found_rates) // 2]
        rows.append(
            {
                "way, workers": way,
                "photographs a second": median,
                "least": min(found_rates),
                "most": max(found_rates),
                "of the models alone": median / alone,
            }
        )
    return rows, all(content == contents[0] for content in contents)


def made_extractor(settings: ExtractionSettings, device: torch.device) -> RegionExtractor:
    """An extractor, wherever it is made."""
    return RegionExtractor(settings, device=device)


def models_alone(make: Callable[[torch.device], RegionExtractor], paths: Sequence[str]) -> float:
    """Photographs a second of the bare loop."""
    with one_thread():
        extractor = make(torch.device("cpu"))
        photographs = [read_photograph(path) for path in paths]
        extractor(photographs[:1])
        started = time.perf_counter()
        for photograph in photographs:
            extractor([photograph])
        return len(photographs) / (time.perf_counter() - started)


def on_ray(
    rates: dict[str, list[float]],
    contents: list[dict[int, bytes]],
    make: Callable[[torch.device], RegionExtractor],
    batches: Sequence[Batch],
    *,
    workers: int,
) -> None:
    """One run of Ray Data, on a Ray of its own."""
    provenance = Description.of(make(torch.device("cpu"))).provenance()
    with tempfile.TemporaryDirectory() as folder:
        where = Settings.resolve(output=Path(folder), address="local")
        with OnRay(
            where, workers=workers, make_extractor=make, provenance=provenance, say=lambda _: None
        ) as ray:
            measured(rates, contents, f"Ray Data, {workers}", ray, batches, workers=workers)


def measured(
    rates: dict[str, list[float]],
    contents: list[dict[int, bytes]],
    way: str,
    run: Run,
    batches: Sequence[Batch],
    *,
    workers: int,
) -> None:
    """Notes the rate of one run, and what came of it."""
    content: dict[int, bytes] = {}
    done, started = 0, 0.0
    for number, (batch, packed) in enumerate(run(batches), start=1):
        content[batch.number] = packed
        if number > workers:
            done += len(batch.paths)
        elif number == workers:
            started = time.perf_counter()
    rates.setdefault(way, []).append(done / (time.perf_counter() - started))
    contents.append(content)


if __name__ == "__main__":
    main()
