"""What does an evaluation cost beyond the scoring of its pairs, in time and in memory?

    python benchmarks/evaluation.py

Evaluates an untrained model of full size on random data in the native format, from the mapped files
to the recalls, and in turns with it scores the same embeddings by one call of `Cpfean.score`. The
text encoder is a frozen one whose word vectors are in the cache, as the text cache gives them:
projection and graph convolution of the words are part of the time, the encoder is not.

The parts are timed inside the evaluation; what is left over is waiting for batches and all else.
Memory is the evaluation's peak above what was held before it, mapped features included in what was
held; the captions' embeddings are part of that peak and stated beside it.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from measure import in_turns, parser_of, peak_memory, publish, say
from random_data import as_dataset, write_split

from cpfean.config import ExperimentConfig
from cpfean.data.dataset import RetrievalDataset
from cpfean.data.split import open_split
from cpfean.metrics.retrieval import RankCounter
from cpfean.model.cpfean import Cpfean
from cpfean.model.embeddings import CaptionEmbeddings, ImageEmbeddings
from cpfean.training.evaluation import evaluate
from cpfean.training.setup import build_model

PARTS: dict[str, tuple[type, str]] = {
    "encode captions": (Cpfean, "encode_captions"),
    "encode images": (Cpfean, "encode_images"),
    "score": (Cpfean, "score"),
    "count": (RankCounter, "add"),
}


def main() -> None:
    """Measures and publishes."""
    parser = parser_of(__doc__, "evaluation")
    parser.add_argument("--images", type=int, default=1000, help="with five captions each (1000)")
    parser.add_argument("--regions", type=int, default=36, help="of an image (36)")
    parser.add_argument("--dim", type=int, default=1024, help="of the joint space (1024)")
    parser.add_argument("--feature-dim", type=int, default=2048, help="of a region (2048)")
    parser.add_argument("--text-dim", type=int, default=768, help="of a cached word (768)")
    parser.add_argument("--batch-size", type=int, default=128, help="encoded at a time (128)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        measure(Path(folder), arguments)


def measure(folder: Path, arguments: argparse.Namespace) -> None:
    """Memory first, which the first evaluation of a size has to be measured for; then time."""
    device = torch.device(arguments.device)
    say("writing the data")
    split = write_split(
        folder,
        images=arguments.images,
        regions=arguments.regions,
        feature_dim=arguments.feature_dim,
    )
    dataset, tokenizer = as_dataset(split, text_dim=arguments.text_dim)
    config = ExperimentConfig().with_overrides(
        {"model.dim": arguments.dim, "model.text.scratch_dim": arguments.text_dim}
    )
    torch.manual_seed(0)
    model = build_model(config, split=split, tokenizer=tokenizer).to(device).eval()

    def whole(of: RetrievalDataset = dataset) -> None:
        evaluate(model, of, protocol="full", batch_size=arguments.batch_size, device=device)

    # What compiles when it is first called, compiles on two images.
    few = open_split(folder, "test", num_regions=arguments.regions, num_images=2)
    whole(as_dataset(few, text_dim=arguments.text_dim)[0])
    split.regions.features.max()
    say("measuring memory")
    peak = peak_memory(whole, device=device.type)
    own = 4 * arguments.dim * (int(dataset.tokens.num_words.sum()) + len(dataset))

    images, captions = embeddings(model, dataset, arguments)
    parts: dict[str, list[float]] = {name: [] for name in PARTS}

    def alone() -> None:
        with torch.inference_mode():
            model.score(images, captions)

    def in_parts() -> None:
        with ExitStack() as stack:
            clocks = {
                name: stack.enter_context(clocked(*PARTS[name], device=device)) for name in PARTS
            }
            whole()
        for name, clock in clocks.items():
            parts[name].append(sum(clock))

    say("measuring time")
    calls = {"pair scoring alone": alone, "evaluation": in_parts}
    timings = in_turns(calls, runs=arguments.runs, device=device.type)
    medians = {name: timing.median for name, timing in timings.items()}
    of_parts = {
        f"its part: {name}": statistics.median(seconds[1:])  # without the warm-up
        for name, seconds in parts.items()
    }
    of_parts["its part: all else"] = medians["evaluation"] - sum(of_parts.values())
    publish(
        arguments.output,
        [
            {"what": name, "s": seconds, "v pair scoring": seconds / medians["pair scoring alone"]}
            for name, seconds in (medians | of_parts).items()
        ],
        device=device.type,
        images=arguments.images,
        captions=len(dataset),
        text_encoder="frozen, word vectors cached",
        peak_bytes=peak,
        caption_embedding_bytes=own,
    )
    print(
        f"\n{arguments.images:,} images, {len(dataset):,} captions, {device.type}. Memory: "
        f"{peak / 1e6:,.0f} MB at its peak, {own / 1e6:,.0f} MB of it caption embeddings."
    )


@contextmanager
def clocked(owner: type, method: str, *, device: torch.device) -> Iterator[list[float]]:
    """Seconds of each call of a method, as long as the context lasts."""
    seconds: list[float] = []
    original = getattr(owner, method)

    def timed(*args: Any, **kwargs: Any) -> Any:
        if device.type == "cuda":
            torch.cuda.synchronize()
        started = time.perf_counter()
        result = original(*args, **kwargs)
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
        return result

    with mock.patch.object(owner, method, timed):
        yield seconds


@torch.inference_mode()
def embeddings(
    model: Cpfean, dataset: RetrievalDataset, arguments: argparse.Namespace
) -> tuple[ImageEmbeddings, CaptionEmbeddings]:
    """All images, and all captions padded to the longest."""
    device = torch.device(arguments.device)
    size = arguments.batch_size
    images = [
        model.encode_images(**dataset.image_batch(part).to(device)._asdict())
        for part in parts_of(dataset.split.num_images, size)
    ]
    captions = [
        model.encode_captions(**dataset.caption_batch(part).to(device)._asdict())
        for part in parts_of(len(dataset), size)
    ]
    longest = max(part.words.shape[1] for part in captions)

    def padded(field: torch.Tensor) -> torch.Tensor:
        room = field.new_zeros(field.shape[0], longest, *field.shape[2:])
        room[:, : field.shape[1]] = field
        return room

    return (
        ImageEmbeddings(*(torch.cat(fields) for fields in zip(*images, strict=True))),
        CaptionEmbeddings(
            words=torch.cat([padded(part.words) for part in captions]),
            mask=torch.cat([padded(part.mask) for part in captions]),
            pooled=torch.cat([part.pooled for part in captions]),
            salience=torch.cat([padded(part.salience) for part in captions]),
        ),
    )


def parts_of(total: int, size: int) -> list[range]:
    """0 to `total` in pieces of `size`."""
    return [range(start, min(start + size, total)) for start in range(0, total, size)]


if __name__ == "__main__":
    main()
