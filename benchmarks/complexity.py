"""What do the model, its parts and the field's scorers cost, in weights, products, time and memory?

    python benchmarks/complexity.py
    python benchmarks/complexity.py --only full no_fusion scan_on_full_encoder --batch 32

The full model, every ablation and every method that is compared, on random data and untrained. The
text encoder is frozen and its word vectors are given, as from the cache: it is the same for all and
left out, but for one line that says what a bert-base would add to a caption.

    multiply-adds   of matrix products alone, as is usual; counted by torch. Scores are counted as
                    the scorer's `forward` makes them, as torch does not see into the compiled
                    kernel. Gram matrices, made once an image and once a caption, are part of
                    encoding.
    step            a batch of pairs: encoders, score, hardest negatives, backward, clipping, AdamW
    query           one caption, or one image, is encoded and scored with a gallery that is encoded
                    already
    peak            of a step, above what was held before it: weights and AdamW's moments, which are
                    12 bytes a weight, are not part of it, gradients are

Variants are timed in turns, a run of each and then again; each is built anew for its turn, so that
no more than one is held. Memory is measured in a process of its own.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from full_step import take_step
from measure import parser_of, peak_memory, publish, say
from random_data import as_dataset, write_split
from scorers import make_embeddings
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from cpfean.config import AlignmentConfig, ExperimentConfig, Plain
from cpfean.data.dataset import BatchRequest, RetrievalDataset
from cpfean.data.split import open_split
from cpfean.data.tokens import CaptionTokenizer
from cpfean.model.cpfean import Cpfean
from cpfean.model.embeddings import CaptionEmbeddings, ImageEmbeddings
from cpfean.model.scorers.pairs import every_pair
from cpfean.model.scorers.scorer import scorer_class
from cpfean.training.global_batch import GlobalBatchLoss
from cpfean.training.optimizer import build_optimizer
from cpfean.training.precision import LossScale, chosen_precision
from cpfean.training.setup import build_model
from experiments.ablations import ABLATIONS
from experiments.methods import METHODS

FULL = "full"
TIMES = ("step", "text query", "image query")


@dataclass(frozen=True, kw_only=True)
class Variant:
    """A configuration, and all names that it goes by."""

    names: tuple[str, ...]
    overrides: Mapping[str, Plain]


def main() -> None:
    """Counts, measures and publishes."""
    parser = parser_of(__doc__, "complexity")
    parser.add_argument("--batch", type=int, default=128, help="pairs of a step (128)")
    parser.add_argument("--images", type=int, default=1000, help="of a caption's gallery (1000)")
    parser.add_argument("--captions", type=int, default=5000, help="of an image's gallery (5000)")
    parser.add_argument("--regions", type=int, default=36, help="of an image, at most (36)")
    parser.add_argument("--words", type=int, default=12, help="of the caption counted (12)")
    parser.add_argument("--dim", type=int, default=1024, help="of the joint space (1024)")
    parser.add_argument("--feature-dim", type=int, default=2048, help="of a region (2048)")
    parser.add_argument("--text-dim", type=int, default=768, help="of the text encoder (768)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these variants alone")
    parser.add_argument("--memory-of", metavar="NAME", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    variants = chosen(variants_of(), arguments.only)
    if arguments.memory_of:
        (variant,) = chosen(variants, [arguments.memory_of])
        print(peak_of(variant, arguments.folder, arguments))
        return
    with tempfile.TemporaryDirectory() as folder:
        write_split(
            Path(folder),
            images=max(2, arguments.batch),
            regions=arguments.regions,
            feature_dim=arguments.feature_dim,
            dtype="float16",
        )
        measure(variants, Path(folder), arguments)


def variants_of() -> list[Variant]:
    """The full model, the ablations and the methods; the same configuration once.

    The syntax graph is left out: in the model it costs what the window does, and the parser runs
    once for a data set.
    """
    named: list[tuple[str, Mapping[str, Plain]]] = [(FULL, {})]
    named += [(each.name, each.overrides) for each in ABLATIONS]
    named += [(each.name, each.overrides) for each in METHODS]
    variants: dict[str, Variant] = {}
    for name, overrides in named:
        config = ExperimentConfig().with_overrides(overrides)
        if config.model.words.graph == "syntax":
            continue
        known = variants.get(config.fingerprint())
        names = () if known is None else known.names
        if name not in names:
            names = (*names, name)
        variants[config.fingerprint()] = Variant(
            names=names, overrides=overrides if known is None else known.overrides
        )
    return list(variants.values())


def chosen(variants: Sequence[Variant], names: Sequence[str] | None) -> list[Variant]:
    """Those with these names; all without names."""
    if not names:
        return list(variants)
    known = {name for variant in variants for name in variant.names}
    if unknown := set(names) - known:
        raise SystemExit(f"no variant {', '.join(sorted(unknown))}; there are {sorted(known)}")
    return [variant for variant in variants if set(names) & set(variant.names)]


def measure(variants: Sequence[Variant], folder: Path, arguments: argparse.Namespace) -> None:
    """Counts, then time in turns, then memory."""
    counts = [counts_of(variant, folder, arguments) for variant in variants]
    images, captions = make_embeddings(
        arguments.images,
        arguments.captions,
        dim=arguments.dim,
        num_regions=arguments.regions,
        device=arguments.device,
    )
    seconds: list[dict[str, list[float]]] = [{name: [] for name in TIMES} for _ in variants]
    for run in range(arguments.runs):
        for variant, found in zip(variants, seconds, strict=True):
            for name, call in calls_of(variant, folder, images, captions, arguments).items():
                found[name].append(seconds_of(call, device=arguments.device))
        say(f"  run {run + 1} of {arguments.runs}")
    medians = [
        {name: statistics.median(times) for name, times in found.items()} for found in seconds
    ]
    full = next(
        (times for variant, times in zip(variants, medians, strict=True) if FULL in variant.names),
        None,
    )
    rows = []
    for variant, count, times in zip(variants, counts, medians, strict=True):
        say(f"  memory of {variant.names[0]}")
        rows.append(
            {
                "variant": " = ".join(variant.names),
                **count,
                "step s": times["step"],
                "v full": None if full is None else times["step"] / full["step"],
                "text query ms": 1e3 * times["text query"],
                "image query ms": 1e3 * times["image query"],
                "peak MB": memory_of(variant, folder, arguments) / 1e6,
            }
        )
    pieces = arguments.words + 2
    encoder = bert_products(pieces)
    left_out = ("output", "only", "memory_of", "folder")
    publish(
        arguments.output,
        rows,
        **{name: value for name, value in vars(arguments).items() if name not in left_out},
        bert_base_multiply_adds=encoder,
    )
    print(
        f"\n{arguments.regions} regions of width {arguments.feature_dim}, {arguments.words} words, "
        f"width {arguments.dim}; queries among {arguments.images:,} images or "
        f"{arguments.captions:,} captions; {arguments.batch} pairs a step; {arguments.device}.\n"
        f"bert-base would add {encoder / 1e6:,.0f} million multiply-adds to a caption of "
        f"{pieces} pieces."
    )


def counts_of(variant: Variant, folder: Path, arguments: argparse.Namespace) -> dict[str, int]:
    """Weights and multiply-adds; they depend on shapes alone."""
    model, dataset, regions, _ = built(variant, folder, arguments)
    model.eval().cpu()
    num_words = np.asarray(dataset.tokens.num_words)
    caption = int(np.abs(num_words - arguments.words).argmin())
    words = int(num_words[caption])
    alignment = model.config.alignment
    image_batch = dataset.image_batch([0])._asdict()
    caption_batch = dataset.caption_batch([caption])._asdict()
    scores = score_products(alignment, dim=arguments.dim, regions=regions, words=words)
    return {
        "weights": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "image": products(lambda: model.encode_images(**image_batch)) + scores.image,
        "caption": products(lambda: model.encode_captions(**caption_batch)) + scores.caption,
        "pair": scores.pair,
    }


def products(call: Callable[[], object]) -> int:
    """Multiply-adds of the matrix products in a call, as torch counts them.

    Attention is taken apart for it: the counter does not know the fused form for processors.
    """
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
        call()
    return counter.get_total_flops() // 2


class ScoreProducts(NamedTuple):
    """Multiply-adds of the matrix products that scores are made of.

    Sums and other work on the cosines of a pair are left out, as everywhere in such counts.

    Attributes:
        pair: once for each pair.
        image, caption: once for each image and each caption: Gram matrices, where they are needed.
    """

    pair: int
    image: int
    caption: int


def score_products(
    alignment: AlignmentConfig, *, dim: int, regions: int, words: int
) -> ScoreProducts:
    """Counted on one pair, on an image more and on a caption more: n m pair + n image + m caption.

    Args:
        alignment: names the scorer.
        dim: width of the joint space.
        regions, words: of every image, of every caption.
    """
    pooled = dim if alignment.global_weight > 0 else 0
    if alignment.global_weight == 1:
        return ScoreProducts(pooled, 0, 0)
    scorer = scorer_class(alignment.kind).from_config(alignment, dim=dim)

    def count(num_images: int, num_captions: int) -> int:
        images = ImageEmbeddings(
            torch.rand(num_images, regions, dim),
            torch.ones(num_images, regions, dtype=torch.bool),
            torch.rand(num_images, dim),
            torch.zeros(num_images, regions),
        )
        captions = CaptionEmbeddings(
            torch.rand(num_captions, words, dim),
            torch.ones(num_captions, words, dtype=torch.bool),
            torch.rand(num_captions, dim),
            torch.rand(num_captions, words),
        )
        return products(lambda: scorer(every_pair(images, captions)))

    one = count(1, 1)
    pair = (count(2, 2) - 2 * one) // 2
    return ScoreProducts(pair + pooled, count(2, 1) - one - pair, count(1, 2) - one - pair)


def bert_products(pieces: int) -> int:
    """Multiply-adds of bert-base for one caption, without making its weights."""
    from transformers import BertConfig, BertModel

    with torch.device("meta"):
        encoder = BertModel(BertConfig(), add_pooling_layer=False).eval()
        tokens = torch.zeros(1, pieces, dtype=torch.long)
    return products(lambda: encoder(input_ids=tokens))


def built(
    variant: Variant, folder: Path, arguments: argparse.Namespace
) -> tuple[Cpfean, RetrievalDataset, int, ExperimentConfig]:
    """An untrained model with a frozen text encoder, data, and how many regions it takes."""
    config = ExperimentConfig().with_overrides(
        {
            "model.dim": arguments.dim,
            "model.text.scratch_dim": arguments.text_dim,
            **variant.overrides,
        }
    )
    regions = min(config.data.num_regions, arguments.regions)
    dataset, tokenizer = dataset_of(folder, regions, arguments.text_dim)
    torch.manual_seed(0)
    model = build_model(config, split=dataset.split, tokenizer=tokenizer)
    model.backbone.requires_grad_(False)
    return model.to(arguments.device), dataset, regions, config


_datasets: dict[tuple[Path, int, int], tuple[RetrievalDataset, CaptionTokenizer]] = {}


def dataset_of(
    folder: Path, regions: int, text_dim: int
) -> tuple[RetrievalDataset, CaptionTokenizer]:
    """The data with so many regions; made once."""
    key = (folder, regions, text_dim)
    if key not in _datasets:
        split = open_split(folder, "test", num_regions=regions)
        _datasets[key] = as_dataset(split, text_dim=text_dim)
    return _datasets[key]


def calls_of(
    variant: Variant,
    folder: Path,
    images: ImageEmbeddings,
    captions: CaptionEmbeddings,
    arguments: argparse.Namespace,
) -> dict[str, Callable[[], object]]:
    """What is timed."""
    model, dataset, regions, config = built(variant, folder, arguments)
    device = arguments.device
    gallery = ImageEmbeddings(
        images.regions[:, :regions],
        images.mask[:, :regions],
        images.pooled,
        images.thresholds[:, :regions],
    )
    image = dataset.image_batch([0]).to(device)._asdict()
    caption = dataset.caption_batch([0]).to(device)._asdict()

    @torch.inference_mode()
    def text_query() -> object:
        model.eval()
        return model.score(gallery, model.encode_captions(**caption)).argmax()

    @torch.inference_mode()
    def image_query() -> object:
        model.eval()
        return model.score(model.encode_images(**image), captions).argmax()

    step = step_of(model, dataset, config, arguments, batch=arguments.batch)
    return dict(zip(TIMES, (step, text_query, image_query), strict=True))


def step_of(
    model: Cpfean,
    dataset: RetrievalDataset,
    config: ExperimentConfig,
    arguments: argparse.Namespace,
    *,
    batch: int,
) -> Callable[[], object]:
    """A training step on one batch, which is gathered beforehand."""
    loss_of = GlobalBatchLoss(model, margin=config.loss.margin)
    optimizer = build_optimizer(model, config.optim)
    pairs = np.arange(batch) * (len(dataset) // batch)  # each of an image of its own
    request = BatchRequest(epoch=0, step=0, pairs=pairs, start=0, stop=batch)
    given = dataset.training_batch(request).to(arguments.device)
    precision = chosen_precision("auto", torch.device(arguments.device))
    scale = LossScale.to_go_on(precision, LossScale())

    def step() -> None:
        loss_of.train()
        clip_norm = config.optim.clip_norm
        take_step(loss_of, optimizer, given, pairs=batch, clip_norm=clip_norm, scale=scale)

    return step


def seconds_of(call: Callable[[], object], *, device: str) -> float:
    """Of the second call; the first one compiles and allocates."""
    call()
    if device == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    call()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def memory_of(variant: Variant, folder: Path, arguments: argparse.Namespace) -> int:
    """Bytes at the peak of a step, in a process of its own."""
    command = [sys.executable, __file__, "--memory-of", variant.names[0], "--folder", str(folder)]
    for option in ("batch", "regions", "dim", "feature-dim", "text-dim", "device"):
        command += [f"--{option}", str(getattr(arguments, option.replace("-", "_")))]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return int(done.stdout)


def peak_of(variant: Variant, folder: Path, arguments: argparse.Namespace) -> int:
    """Bytes at the peak of the second step, the first one being small."""
    model, dataset, _, config = built(variant, folder, arguments)
    # What compiles, and AdamW's moments, are there before the step that counts.
    step_of(model, dataset, config, arguments, batch=min(4, arguments.batch))()
    step = step_of(model, dataset, config, arguments, batch=arguments.batch)
    return peak_memory(step, device=arguments.device)


if __name__ == "__main__":
    main()
