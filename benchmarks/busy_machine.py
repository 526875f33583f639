"""How much longer does an epoch take where others use the processors too?

    python benchmarks/busy_machine.py

An epoch of training steps on the built-in data, quiet and beside four processes that never rest:
with two threads, and with as many as the rule of `cpfean.threads` gives. In turns, each in a fresh
process that has trained a little before the clock starts. An epoch that takes more than --seconds
is cut off; its steps so far then stand for all. So a run takes at most four times that, and the
start of four processes. The last column is the time beside others over that of the same threads
quiet.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from measure import ROOT, Timing, parser_of, publish, say

from cpfean.config import ExperimentConfig
from cpfean.data.sources import resolve_data
from cpfean.errors import StoppedError
from cpfean.training.checkpoint import Checkpoint
from cpfean.training.loop import EpochReport, fit
from experiments.baselines import BASELINES

# What the environment says of threads; nothing leaves the number to the rule.
WAYS = {"two threads": {"OMP_NUM_THREADS": "2"}, "as many as a step needs": {}}
_WARM_UP = {f"data.synthetic.{split}_images": 8 for split in ("train", "dev", "test")}


def main() -> None:
    """Measures and publishes; or trains an epoch, as one of the processes that are measured."""
    parser = parser_of(__doc__, "busy_machine")
    parser.add_argument("--images", type=int, default=800, help="to train on (800)")
    parser.add_argument("--busy", type=int, default=4, help="processes beside it (4)")
    parser.add_argument("--seconds", type=float, default=60.0, help="of an epoch at most (60)")
    parser.add_argument("--epoch-in", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.epoch_in is not None:
        print(json.dumps(an_epoch(arguments.epoch_in, arguments)))
        return
    found: dict[tuple[str, int], list[dict[str, Any]]] = {
        (way, busy): [] for way in WAYS for busy in (0, arguments.busy)
    }
    with tempfile.TemporaryDirectory() as folder:
        resolve_data(config_of(arguments).data, cache_dir=Path(folder))
        for run in range(arguments.runs):
            for (way, busy), taken in found.items():
                with others_at_work(busy):
                    taken.append(measured(Path(folder), WAYS[way], arguments))
            say(f"  run {run + 1} of {arguments.runs}")
    timings = {key: Timing.of([one["seconds"] for one in found[key]]) for key in found}
    rows = [
        {
            "threads": way,
            "so many": " or ".join(sorted({str(one["threads"]) for one in found[way, busy]})),
            "beside": busy,
            "epoch, s": timing.median,
            "fastest s": timing.fastest,
            "slowest s": timing.slowest,
            "cut off": sum(one["cut_off"] for one in found[way, busy]),
            "v quiet": timing.median / timings[way, 0].median,
        }
        for (way, busy), timing in timings.items()
    ]
    publish(arguments.output, rows, images=arguments.images, seconds=arguments.seconds)


def config_of(arguments: argparse.Namespace) -> ExperimentConfig:
    """One epoch on the built-in data."""
    changes = {"data.synthetic.train_images": arguments.images, "optim.epochs": 1}
    return BASELINES["synthetic"].with_overrides(changes)


@contextmanager
def others_at_work(number: int) -> Iterator[None]:
    """So many processes, each of which would take a whole processor."""
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(number)]
    try:
        yield
    finally:
        for one in others:
            one.kill()
            one.wait()


def measured(
    cache: Path, variables: dict[str, str], arguments: argparse.Namespace
) -> dict[str, Any]:
    """What `an_epoch` finds in a process of its own, with these variables."""
    environment = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"} | variables
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), environment.get("PYTHONPATH", "")])
    words = [f"--epoch-in={cache}", f"--images={arguments.images}"]
    done = subprocess.run(
        [sys.executable, __file__, *words, f"--seconds={arguments.seconds}"],
        env=environment,
        stdout=subprocess.PIPE,
        check=True,
        text=True,
    )
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def an_epoch(cache: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Seconds of the training steps of an epoch, whether it was cut off, and the threads."""
    config = config_of(arguments)
    train(config.with_overrides(_WARM_UP), cache, Clock(pairs=0, seconds=float("inf")))
    pairs = 5 * arguments.images
    # What is left over of the last batch is not trained on.
    clock = Clock(pairs=pairs - pairs % config.optim.batch_size, seconds=arguments.seconds)
    train(config, cache, clock)
    return {"seconds": clock.epoch, "cut_off": clock.cut_off, "threads": clock.threads}


def train(config: ExperimentConfig, cache: Path, clock: Clock) -> None:
    """Trains until the clock says to stop."""
    with suppress(StoppedError):
        fit(
            config,
            data_folder=resolve_data(config.data, cache_dir=cache),
            cache_dir=cache,
            reporter=clock,
            device=torch.device("cpu"),
            notice=clock,
        )


class Clock:
    """Ends a training after some seconds, and knows how long its epoch takes.

    Attributes:
        epoch: seconds of its training steps.
        cut_off: whether the epoch was not waited for.
        threads: that it was trained with.
    """

    def __init__(self, *, pairs: int, seconds: float) -> None:
        self.epoch = 0.0
        self.cut_off = False
        self.threads = 0
        self._pairs = pairs
        self._end = time.monotonic() + seconds

    def report(self, report: EpochReport, checkpoint: Checkpoint | None) -> None:
        """Takes note of a whole epoch."""
        self.epoch = self._pairs / report.pairs_per_second
        self.threads = report.threads

    def given(self) -> bool:
        """Whether the time is over."""
        self.threads = torch.get_num_threads()
        return time.monotonic() > self._end

    def save(self, checkpoint: Checkpoint | None) -> None:
        """Takes note of the steps that were done."""
        assert checkpoint is not None
        state = checkpoint.state
        done = state.underway.steps * state.config.optim.batch_size
        self.epoch, self.cut_off = state.underway.seconds * self._pairs / done, True


if __name__ == "__main__":
    main()
