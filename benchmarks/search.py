"""Latency of a search, what a shortlist loses, and what galleries of up to a million images need.

    python benchmarks/search.py
    python benchmarks/search.py --model runs/NAME --data DIR
    python benchmarks/search.py --images 1000 31000          (a minute, and 2 GB of disk)

With a trained model, its captions ask for the images of the test split: the median time of an exact
search and of those from shortlists, and how many of the exact ten best are in the ten that a
shortlist gives. The generated galleries are embeddings that are drawn, in the width of the
configuration "small": what they find means nothing, what they cost is what others of the size do.
They are written to --scratch and removed. Beyond 100,000 images the regions are kept in half
precision and only the shortlist is timed; a million images take 20 GB of disk for a while.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measure import parser_of, peak_memory, publish, say, table

from cpfean.config import ExperimentConfig, SyntheticConfig
from cpfean.data.synthetic import write_synthetic
from cpfean.search.array_folders import kept_arrays
from cpfean.search.kept import KeptImages
from cpfean.search.matching import find_images
from cpfean.search.searcher import Searcher
from cpfean.search.sentences import read_sentence
from cpfean.training.setup import TrainedModel, open_experiment
from experiments.baselines import BASELINES

BEST = 10
HALF_FROM = 100_000  # images
BANK = 2**16  # unit vectors that the regions of generated galleries are drawn from
TOGETHER = 2000  # images written at a time
SENTENCES = (
    "a dog runs through the snow",
    "two children play with a ball on the grass in front of a white house",
    "a man",
    "a woman in a red dress rides a bicycle down the street",
    "three people sit at a table",
)


def main() -> None:
    """Measures and publishes."""
    parser = parser_of(__doc__, "search")
    parser.add_argument("--model", type=Path, help="folder of a trained model, for real searches")
    parser.add_argument("--data", help="its data (default: what it was trained on)")
    parser.add_argument(
        "--lengths",
        type=int,
        nargs="+",
        default=[50, 100, 200, 500],
        help="of the shortlists of real searches (50 100 200 500)",
    )
    parser.add_argument("--questions", type=int, default=500, help="captions that ask (500)")
    parser.add_argument(
        "--images",
        type=int,
        nargs="+",
        default=[1000, 31_000, 1_000_000],
        help="of the generated galleries (1000 31000 1000000)",
    )
    parser.add_argument("--shortlist", type=int, default=200, help="of generated galleries (200)")
    parser.add_argument("--config", choices=sorted(BASELINES), default="small")
    parser.add_argument("--threads", type=int, default=2, help="of torch (2)")
    parser.add_argument("--scratch", type=Path, help="folder on a disk with room")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    real: dict[str, Any] = {}
    if arguments.model is not None:
        real = searched(arguments)
        print(table(real["shortlists"]) + "\n")
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as scratch:
        trained = untrained(BASELINES[arguments.config], Path(scratch) / "model")
        dim = trained.model.config.dim
        few = drawn(Path(scratch) / "few", 64, 8, dim=dim, half=False)
        median_seconds(few, trained, shortlist=None, runs=1)  # compiles what is to be compiled
        rows = [generated(n, trained, Path(scratch), arguments) for n in arguments.images]
    publish(arguments.output, rows, real=real, config=arguments.config)


def searched(arguments: argparse.Namespace) -> dict[str, Any]:
    """Captions of a real split ask for its images, by a trained model."""
    searcher = Searcher.from_pretrained(arguments.model, data=arguments.data, device="cpu")
    captions = searcher.split.captions
    step = max(1, len(captions) // arguments.questions)
    questions = captions[::step][: arguments.questions]
    say(f"{len(questions)} captions ask for {searcher.split.num_images} images")
    searcher.images(questions[0], k=BEST)  # compiles what is to be compiled
    exact = [searcher.images(question, k=BEST) for question in questions]
    rows = []
    for length in (None, *arguments.lengths):
        if length is not None and length >= searcher.split.num_images:
            continue  # it would be exact
        found = [searcher.images(question, k=BEST, shortlist=length) for question in questions]
        kept = [
            len({hit.position for hit in some} & {hit.position for hit in best}) / len(best)
            for some, best in zip(found, exact, strict=True)
        ]
        rows.append(
            {
                "shortlist": "every image" if length is None else length,
                "share of the exact 10 best": float(np.mean(kept)),
                "first one the same": float(
                    np.mean([a[0] == b[0] for a, b in zip(found, exact, strict=True)])
                ),
                "median s": float(np.median([hits.seconds for hits in found])),
            }
        )
    return {"images": searcher.split.num_images, "questions": len(questions), "shortlists": rows}


def generated(
    num_images: int, trained: TrainedModel, scratch: Path, arguments: argparse.Namespace
) -> dict[str, Any]:
    """Latency before a gallery of drawn embeddings, and what it takes."""
    is_large = num_images > HALF_FROM
    regions = trained.dataset.split.regions.num_regions
    folder = scratch / f"gallery-{num_images}"
    say(f"drawing {num_images:,} images")
    images = drawn(folder, num_images, regions, dim=trained.model.config.dim, half=is_large)
    length = min(arguments.shortlist, num_images)
    row: dict[str, Any] = {
        "images": num_images,
        "regions": "float16" if is_large else "float32",
        "disk GB": sum(file.stat().st_size for file in folder.iterdir()) / 1e9,
    }
    # Before anything of this gallery is in memory: what is mapped counts as soon as it is read.
    caption = read_sentence(SENTENCES[0], trained).encoded
    peak = peak_memory(
        lambda: find_images(trained.model, images, caption, k=BEST, shortlist=length)
    )
    row["exact s"] = None
    if not is_large:
        row["exact s"] = median_seconds(images, trained, shortlist=None, runs=arguments.runs)
    row[f"shortlist of {arguments.shortlist} s"] = median_seconds(
        images, trained, shortlist=length, runs=arguments.runs
    )
    row["peak MB of a search from it"] = peak / 1e6
    del images
    shutil.rmtree(folder)
    return row


def median_seconds(
    images: KeptImages, trained: TrainedModel, *, shortlist: int | None, runs: int
) -> float:
    """From a sentence as text to the ten best, over all sentences, so many times."""
    seconds = []
    for run in range(-1, runs):  # the first time reads what the system will hold, and compiles
        for sentence in SENTENCES:
            started = time.perf_counter()
            caption = read_sentence(sentence, trained).encoded
            find_images(trained.model, images, caption, k=BEST, shortlist=shortlist)
            if run >= 0:
                seconds.append(time.perf_counter() - started)
    return float(np.median(seconds))


def drawn(folder: Path, num_images: int, regions: int, *, dim: int, half: bool) -> KeptImages:
    """A gallery on disk as `Searcher` keeps it: unit vectors, and their pools."""
    generator = torch.Generator().manual_seed(0)
    bank = torch.nn.functional.normalize(torch.randn(BANK, dim, generator=generator), dim=1)
    kind = "<f2" if half else "<f4"
    shapes = {
        "pooled": ((num_images, dim), "<f4"),
        "regions": ((num_images, regions, dim), kind),
        "mask": ((num_images, regions), "|b1"),
        "thresholds": ((num_images, regions), "<f4"),
    }

    def batches() -> Iterator[tuple[int, dict[str, torch.Tensor]]]:
        for start in range(0, num_images, TOGETHER):
            count = min(TOGETHER, num_images - start)
            chosen = bank[torch.randint(0, BANK, (count, regions), generator=generator)]
            yield (
                start + count,
                {
                    "pooled": torch.nn.functional.normalize(chosen.mean(dim=1), dim=1),
                    "regions": chosen,
                    "mask": torch.ones(count, regions, dtype=torch.bool),
                    "thresholds": torch.zeros(count, regions),
                },
            )

    arrays = kept_arrays(
        folder, shapes, batches, what="drawing images", total=num_images, about={"drawn": True}
    )
    return KeptImages(**arrays)


def untrained(config: ExperimentConfig, folder: Path) -> TrainedModel:
    """A model of that configuration with fresh weights, and a vocabulary of generated captions."""
    sizes = dict.fromkeys(("train_images", "dev_images", "test_images"), 64)
    scenes = SyntheticConfig(**sizes, num_regions=config.data.num_regions)
    write_synthetic(folder, scenes)
    opened = open_experiment(
        config.with_overrides({"data.path": str(folder)}),
        data_folder=folder,
        cache_dir=folder / "cache",
        device=torch.device("cpu"),
    )
    return TrainedModel(model=opened.model.eval(), tokenizer=opened.tokenizer, dataset=opened.dev)


if __name__ == "__main__":
    main()
