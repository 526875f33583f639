"""How many image-caption pairs a second does each scorer manage, and how many could it?

    python benchmarks/pair_scoring.py
    python benchmarks/pair_scoring.py --sizes 1000x5000 5000x25000 --device cuda
    python benchmarks/pair_scoring.py --peer scan=~/SCAN --peer sgr=~/SGRAF

Scores random embeddings, encoders left out. "bare product" is the matrix product alone that every
scorer of fragments has to make, in blocks of the same size, results dropped. All take turns in one
process; what is too slow for a size is timed on fewer captions, and says so. A published scorer is
run from the checkout that its user has.
"""

from __future__ import annotations

import argparse

import numpy as np
import torch
from measure import in_turns, parser_of, publish, say
from scorers import Compared, compared, make_embeddings, peer

from cpfean.model.embeddings import CaptionEmbeddings, ImageEmbeddings


def main() -> None:
    """Measures and publishes."""
    parser = parser_of(__doc__, "pair_scoring")
    parser.add_argument(
        "--sizes",
        nargs="+",
        type=size,
        default=[(100, 500), (300, 1500), (1000, 5000)],
        metavar="IMAGESxCAPTIONS",
        help="(100x500 300x1500 1000x5000)",
    )
    parser.add_argument("--regions", type=int, default=36, help="of an image (36)")
    parser.add_argument("--dim", type=int, default=1024, help="of the joint space (1024)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these scorers alone")
    parser.add_argument(
        "--peer", type=peer, action="append", default=[], metavar="NAME=PATH", help="scan, saf, sgr"
    )
    arguments = parser.parse_args()
    rows = [row for number in arguments.sizes for row in measure(number, arguments)]
    publish(arguments.output, rows, device=arguments.device, dim=arguments.dim, slopes=slopes(rows))
    for name, slope in slopes(rows).items():
        print(f"{name}: seconds grow as pairs to the power of {slope:.3f}")


def size(text: str) -> tuple[int, int]:
    """IMAGESxCAPTIONS of an option."""
    images, _, captions = text.partition("x")
    return int(images), int(captions)


def measure(number: tuple[int, int], arguments: argparse.Namespace) -> list[dict[str, object]]:
    """The rows of one size."""
    num_images, num_captions = number
    say(f"{num_images} images, {num_captions} captions")
    images, captions = make_embeddings(
        num_images,
        num_captions,
        dim=arguments.dim,
        num_regions=arguments.regions,
        device=arguments.device,
    )
    scorers = compared(dim=arguments.dim, device=arguments.device, peers=dict(arguments.peer))
    if arguments.only:
        scorers = {name: scorers[name] for name in ("bare product", *arguments.only)}
    samples = {name: sample(scorer, images, captions) for name, scorer in scorers.items()}

    def call(name: str) -> None:
        with torch.inference_mode():
            scorers[name].score(*samples[name])

    timings = in_turns(
        {name: lambda name=name: call(name) for name in scorers},
        runs=arguments.runs,
        device=arguments.device,
    )
    pairs = {name: len(i.mask) * len(c.mask) for name, (i, c) in samples.items()}
    cost = {name: timing.median / pairs[name] for name, timing in timings.items()}
    naive = cost.get("cpfean, naive")
    return [
        {
            "images": num_images,
            "captions": num_captions,
            "scorer": name,
            "pairs timed": pairs[name],
            "s": timing.median,
            "fastest s": timing.fastest,
            "pairs/s": 1 / cost[name],
            "share of bare product": cost["bare product"] / cost[name],
            "v naive": None if naive is None else naive / cost[name],
        }
        for name, timing in timings.items()
    ]


def sample(
    scorer: Compared, images: ImageEmbeddings, captions: CaptionEmbeddings
) -> tuple[ImageEmbeddings, CaptionEmbeddings]:
    """As many captions as the scorer can be waited for."""
    most = scorer.pairs_at_most // len(images.mask)
    fewer = max(1, int(min(len(captions.mask), most)))
    return images, captions.rows(slice(0, fewer))


def slopes(rows: list[dict[str, object]]) -> dict[str, float]:
    """d log seconds / d log pairs of the scorers that were timed whole at several sizes."""
    found = {}
    for name in {str(row["scorer"]): None for row in rows}:
        mine = [row for row in rows if row["scorer"] == name]
        pairs = [row["pairs timed"] for row in mine]
        if len(set(pairs)) > 1 and pairs == [row["images"] * row["captions"] for row in mine]:
            seconds = [row["s"] for row in mine]
            found[name] = float(np.polyfit(np.log(pairs), np.log(seconds), 1)[0])
    return found


if __name__ == "__main__":
    main()
