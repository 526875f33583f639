"""How many steps a second does training at full size take, and how much memory?

    python benchmarks/full_training.py
    python benchmarks/full_training.py --device cpu --runs 1

The whole step: a text encoder of the shape of bert-base with random weights, fine-tuned, 36 regions
of width 2048, joint width 1024, 128 pairs, hardest negatives, clipping and AdamW. Batches come from
the mapped files as in training. On a GPU the precision is
that of `optim.precision = "auto"`.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from measure import in_turns, parser_of, peak_memory, publish, say
from random_data import as_dataset, write_split
from torch import nn

from cpfean.config import ExperimentConfig
from cpfean.data.dataset import BatchRequest, GlobalBatches
from cpfean.training.global_batch import GlobalBatchLoss
from cpfean.training.optimizer import build_optimizer
from cpfean.training.precision import autocast, chosen_precision
from cpfean.training.setup import build_model


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
    split = write_split(
        folder,
        images=max(2, arguments.batch // 2),
        regions=arguments.regions,
        feature_dim=arguments.feature_dim,
    )
    dataset, tokenizer = as_dataset(split)
    config = ExperimentConfig().with_overrides(
        {
            "model.dim": arguments.dim,
            "model.text.scratch_dim": arguments.text_dim,
            "model.text.scratch_layers": arguments.text_layers,
        }
    )
    device = torch.device(arguments.device)
    torch.manual_seed(0)
    model = build_model(config, split=split, tokenizer=tokenizer).to(device)
    step = GlobalBatchLoss(model, margin=config.loss.margin).train()
    optimizer = build_optimizer(model, config.optim)
    precision = chosen_precision(config.optim.precision, device)
    requests = endless(len(dataset), arguments.batch)

    def steps(count: int) -> None:
        for _ in range(count):
            batch = dataset.training_batch(next(requests)).to(device)
            optimizer.zero_grad(set_to_none=True)
            with autocast(precision, device):
                loss = step(batch, "hardest", arguments.batch)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), config.optim.clip_norm)
            optimizer.step()

    peak = peak_memory(lambda: steps(2), device=device.type)
    timing = in_turns(
        {"steps": lambda: steps(arguments.steps)}, runs=arguments.runs, device=device.type
    )["steps"]
    weights = sum(parameter.numel() for parameter in model.parameters())
    row = {
        "device": device.type,
        "parameters": weights,
        "pairs": arguments.batch,
        "steps/s": arguments.steps / timing.median,
        "images/s": arguments.steps * arguments.batch / timing.median,
        "peak MB above the weights": peak / 1e6,
    }
    publish(arguments.output, [row], **{k: v for k, v in vars(arguments).items() if k != "output"})


def endless(num_pairs: int, batch_size: int) -> Iterator[BatchRequest]:
    """Global batches, epoch after epoch."""
    epoch = 0
    while True:
        yield from GlobalBatches(num_pairs, batch_size, seed=0, epoch=epoch)
        epoch += 1


if __name__ == "__main__":
    main()
