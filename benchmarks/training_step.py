"""What does a training step's score and loss cost, forward and backward, in time and in memory?

    python benchmarks/training_step.py

Scores a batch of embeddings against itself and takes the triplet loss back to them; the encoders,
which are the same for every scorer, are left out. Time is taken in turns in one process, memory of
each in a process of its own: its peak above what was held before the step, gradients included.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable

import torch
from measure import in_turns, parser_of, peak_memory, publish, say
from scorers import compared, make_embeddings, peer

from cpfean.losses.triplet import triplet_loss


def main() -> None:
    """Measures and publishes."""
    parser = parser_of(__doc__, "training_step")
    parser.add_argument("--batch", type=int, default=128, help="pairs (128)")
    parser.add_argument("--regions", type=int, default=36, help="of an image (36)")
    parser.add_argument("--dim", type=int, default=1024, help="of the joint space (1024)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these scorers alone")
    parser.add_argument(
        "--peer", type=peer, action="append", default=[], metavar="NAME=PATH", help="scan, saf, sgr"
    )
    parser.add_argument("--memory-of", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.memory_of:
        name, mining = arguments.memory_of
        step_of(name, mining, arguments, batch=4)()  # what compiles at first, compiles here
        print(peak_memory(step_of(name, mining, arguments), device=arguments.device))
        return
    names = arguments.only or [
        name
        for name in compared(dim=8, device="cpu", peers=dict(arguments.peer))
        if name not in ("bare product", "global", "cpfean, bf16 products")
    ]
    cases = [(name, mining) for mining in ("hardest", "all") for name in names]
    steps = {f"{name}|{mining}": step_of(name, mining, arguments) for name, mining in cases}
    timings = in_turns(steps, runs=arguments.runs, device=arguments.device)
    rows = []
    for name, mining in cases:
        say(f"memory of {name}, {mining}")
        reference = timings.get(f"cpfean, naive|{mining}")
        timing = timings[f"{name}|{mining}"]
        rows.append(
            {
                "negatives": mining,
                "scorer": name,
                "s": timing.median,
                "fastest s": timing.fastest,
                "v naive": None if reference is None else reference.median / timing.median,
                "peak MB": memory_of(name, mining, arguments) / 1e6,
            }
        )
    cosines = 4 * arguments.batch**2 * arguments.regions * 12
    publish(
        arguments.output,
        rows,
        device=arguments.device,
        dim=arguments.dim,
        batch=arguments.batch,
        bytes_of_cosines=cosines,
    )
    print(f"\nAll cosines S of the batch, at 12 words a caption, would be {cosines / 1e6:.0f} MB.")


def step_of(
    name: str, mining: str, arguments: argparse.Namespace, *, batch: int | None = None
) -> Callable[[], object]:
    """Score, loss and gradients of a batch."""
    size = batch or arguments.batch
    images, captions = make_embeddings(
        size, size, dim=arguments.dim, num_regions=arguments.regions, device=arguments.device
    )
    scorers = compared(dim=arguments.dim, device=arguments.device, peers=dict(arguments.peer))
    scorer = scorers[name]
    leaves = [images.regions.requires_grad_(), captions.words.requires_grad_()]
    wanted = leaves + [p for p in scorer.module.parameters() if p.requires_grad]
    image_ids = torch.arange(size, device=arguments.device)

    def step() -> object:
        scores = scorer.score(images, captions)
        loss = triplet_loss(scores, image_ids, margin=0.2, mining=mining)
        return torch.autograd.grad(loss, wanted, allow_unused=True)

    return step


def memory_of(name: str, mining: str, arguments: argparse.Namespace) -> int:
    """Bytes, in a process of its own: an allocator does not give back what others have used."""
    command = [sys.executable, __file__, "--memory-of", name, mining]
    for option in ("batch", "regions", "dim", "device"):
        command += [f"--{option}", str(getattr(arguments, option))]
    for peer_name, folder in arguments.peer:
        command += ["--peer", f"{peer_name}={folder}"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return int(done.stdout)


if __name__ == "__main__":
    main()
