"""How long a sweep takes to its first training step, here and in another checkout.

    python benchmarks/first_step.py                              this checkout
    python benchmarks/first_step.py --against ../before          in turns with another one

`experiments/sweep.py` runs as `make sweep` does, on the generated data, with all processors. The
clock runs from the start of the process until a worker of the first trial has the gradients of its
first batch; then the sweep is told to stop. The generated data is in the cache after a first run
that does not count; with --cold every run makes and checks it anew.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from measure import ROOT, Timing, parser_of, publish, say

_LONGEST = 300.0  # seconds; a sweep that has not begun by then never will
# Read by every Python that finds it on its path: tells when the first gradients are there.
_HOOK = """
import importlib.abc, importlib.machinery, os, sys, time

class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name != "cpfean.training.global_batch":
            return None
        sys.meta_path.remove(self)
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        run = spec.loader.exec_module

        def exec_module(module):
            run(module)
            find = module.find_gradients

            def timed(*words, **named):
                found = find(*words, **named)
                if not os.path.exists(os.environ["FIRST_STEP"]):
                    with open(os.environ["FIRST_STEP"], "x") as file:
                        file.write(str(time.time()))
                return found

            module.find_gradients = timed

        spec.loader.exec_module = exec_module
        return spec

if "FIRST_STEP" in os.environ:
    sys.meta_path.insert(0, Finder())
"""


def main() -> None:
    parser = parser_of(str(__doc__), "first_step")
    parser.add_argument("--against", type=Path, metavar="DIR", help="another checkout, in turns")
    parser.add_argument("--cold", action="store_true", help="make and check the data in every run")
    parser.add_argument(
        "--set", action="append", default=[], metavar="PATH=VALUE", help="for the sweep"
    )
    arguments = parser.parse_args()
    checkouts = {"here": ROOT}
    if arguments.against is not None:
        checkouts["against"] = arguments.against.absolute()
    with tempfile.TemporaryDirectory(prefix="cpfean-benchmark-") as folder:
        seconds = measured(Path(folder), checkouts, arguments)
    rows: list[dict[str, Any]] = []
    for name, times in seconds.items():
        timing = Timing.of(times)
        rows.append(
            {
                "checkout": name,
                "s to the first step": timing.median,
                "fastest s": timing.fastest,
                "slowest s": timing.slowest,
                "v here": timing.median / Timing.of(seconds["here"]).median,
            }
        )
    publish(arguments.output, rows, cold=arguments.cold, seconds=seconds)


def measured(
    folder: Path, checkouts: dict[str, Path], arguments: argparse.Namespace
) -> dict[str, list[float]]:
    """Seconds of every run by checkout; the first run of each does not count."""
    (folder / "hook").mkdir()
    (folder / "hook" / "sitecustomize.py").write_text(_HOOK, encoding="utf-8")
    seconds: dict[str, list[float]] = {name: [] for name in checkouts}
    for run in range(-1, arguments.runs):
        for name, checkout in checkouts.items():
            here = folder / f"{name}-{run}"
            cache = here if arguments.cold else folder / f"cache-{name}"
            taken = to_first_step(checkout, here, cache / "cache", folder / "hook", arguments.set)
            if run >= 0:
                seconds[name].append(taken)
            say(f"  {name}, {f'run {run + 1}' if run >= 0 else 'warm-up'}: {taken:.1f} s")
    return seconds


def to_first_step(
    checkout: Path, folder: Path, cache: Path, hook: Path, settings: list[str]
) -> float:
    """Seconds from the start of a sweep to its first step; ends the sweep."""
    folder.mkdir()
    told = folder / "first-step"
    words = [word for setting in settings for word in ("--set", setting)]
    environment = {
        **os.environ,
        "PYTHONPATH": f"{hook}:{checkout}",
        "FIRST_STEP": str(told),
        "CPFEAN_CACHE": str(cache),
    }
    log = folder / "log"
    with log.open("w", encoding="utf-8") as output:
        began = time.time()
        sweep = subprocess.Popen(
            [
                *(sys.executable, "experiments/sweep.py", "--address", "local", *words),
                *("--output", str(folder), "--name", "sweep"),
            ],
            cwd=checkout,
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        try:
            while not (told.exists() and told.read_text(encoding="utf-8")):
                if sweep.poll() is not None or time.time() - began > _LONGEST:
                    raise SystemExit(f"the sweep did not begin:\n{log.read_text(encoding='utf-8')}")
                time.sleep(0.05)
        finally:
            sweep.send_signal(signal.SIGINT)
            sweep.wait()
    return float(told.read_text(encoding="utf-8")) - began


if __name__ == "__main__":
    main()
