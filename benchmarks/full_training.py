"""How many steps a second does training at full size take, and how much memory?

    python benchmarks/full_training.py
    python benchmarks/full_training.py --device cpu --runs 1

The whole step: a text encoder of the shape of bert-base with random weights, fine-tuned, 36 regions
of width 2048, joint width 1024, 128 pairs, hardest negatives, clipping and AdamW. Batches come from
the mapped files as in training. The precision is that of `optim.precision = "auto"`.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from full_step import FullStep
from measure import in_turns, parser_of, peak_memory, publish, say


def main() -> None:
    """Measures and publishes."""
    parser = parser_of(__doc__, "full_training")
    parser.add_argument("--batch", type=int, default=128, help="pairs (128)")
    parser.add_argument("--regions", type=int, default=36, help="of an image (36)")
    parser.add_argument("--dim", type=int, default=1024, help="of the joint space (1024)")
    parser.add_argument("--feature-dim", type=int, default=2048, help="of a region (2048)")
    parser.add_argument("--text-dim", type=int, default=768, help="of the text encoder (768)")
    parser.add_argument("--text-layers", type=int, default=12, help="of the text encoder (12)")
    parser.add_argument("--steps", type=int, default=10, help="of a run (10)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        measure(Path(folder), arguments)


def measure(folder: Path, arguments: argparse.Namespace) -> None:
    """Memory of the first steps, then time."""
    say("building data and model")
    device = torch.device(arguments.device)
    step = FullStep(
        folder,
        device,
        pairs=arguments.batch,
        dim=arguments.dim,
        feature_dim=arguments.feature_dim,
        text_dim=arguments.text_dim,
        text_layers=arguments.text_layers,
        regions=arguments.regions,
    )

    def steps(count: int) -> None:
        for _ in range(count):
            step.whole(step.batch())

    peak = peak_memory(lambda: steps(2), device=device.type)
    timing = in_turns(
        {"steps": lambda: steps(arguments.steps)}, runs=arguments.runs, device=device.type
    )["steps"]
    weights = sum(parameter.numel() for parameter in step.model.parameters())
    row = {
        "device": device.type,
        "parameters": weights,
        "pairs": arguments.batch,
        "steps/s": arguments.steps / timing.median,
        "images/s": arguments.steps * arguments.batch / timing.median,
        "peak MB above the weights": peak / 1e6,
    }
    publish(arguments.output, [row], **{k: v for k, v in vars(arguments).items() if k != "output"})


if __name__ == "__main__":
    main()
