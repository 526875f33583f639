"""What a sweep costs beside training: to its first step, a trial, and in the driver's memory.

    python benchmarks/sweep_overhead.py                  all of it
    python benchmarks/sweep_overhead.py --simulated 0    without the driver's memory

Trials: `experiments/sweep.py` runs as users run it, on generated data so small that a trial takes
seconds. Then this process trains the very same configurations with `cpfean.training.loop.fit`, with
as many threads and without saving anything: the bare loop. As many trials run at a time as sweep.py
finds room for; a trial takes its place from the moment in which the one before it in that place
ended. That time less the bare loop's is what the sweep adds: checkpoints, records, the search, Ray,
and whatever the other trials, the driver and the tracker take of the machine. Both must come to the
same losses and recalls.

Memory: the driver of a sweep of 1,000 trials whose training is trivial: search, scheduler, records,
tracker and Tune are real, but a trial's epochs are made up, in Tune's process.
"""

from __future__ import annotations

import argparse
import itertools
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from measure import ROOT, Timing, parser_of, publish, say

_DATA = {"train_images": 64, "dev_images": 20, "test_images": 20, "num_regions": 12}
_EPOCHS = 3  # so few that no trial is stopped early
_SIMULATED_EPOCHS = 5


def main() -> None:
    parser = parser_of(str(__doc__), "sweep_overhead")
    parser.add_argument("--trials", type=int, default=10, help="of the real sweep (10)")
    parser.add_argument(
        "--set", action="append", default=[], metavar="PATH=VALUE", help="for all real trials"
    )
    parser.add_argument(
        "--simulated", type=int, default=1000, help="trials of the simulated sweep (1000); 0: none"
    )
    parser.add_argument("--every", type=int, default=100, help="trials between two looks (100)")
    parser.add_argument("--driver", type=Path, help=argparse.SUPPRESS)  # to be the simulated one
    arguments = parser.parse_args()
    if arguments.driver is not None:
        simulate(arguments.driver, trials=arguments.simulated)
        return
    with tempfile.TemporaryDirectory(prefix="cpfean-benchmark-") as folder:
        rows, details = real_trials(Path(folder), arguments.trials, arguments.set)
        if arguments.simulated:
            looks = driver_memory(Path(folder), arguments.simulated, every=arguments.every)
            rows += memory_rows(looks)
            details["simulated"] = looks
    publish(arguments.output, rows, **details)


# ------------------------------------------------------------------------------------- real trials


def real_trials(
    folder: Path, trials: int, settings: list[str]
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Rows of the table, and what they were made of."""
    from cpfean.records.run_folder import RunFolder

    chosen = {f"data.synthetic.{name}": str(value) for name, value in _DATA.items()}
    chosen |= {"data.num_regions": str(_DATA["num_regions"]), "optim.epochs": str(_EPOCHS)}
    chosen |= dict(setting.split("=", 1) for setting in settings)
    words = ["--trials", str(trials), "--name", "sweep", "--address", "local"]
    words += [word for path in chosen for word in ("--set", f"{path}={chosen[path]}")]
    environment = {"CPFEAN_CACHE": str(folder / "cache")}
    places, first_epoch, ends = 0, 0.0, {}
    say("the sweep ...")
    started = time.perf_counter()
    for seconds, line, _ in lines_of([ROOT / "experiments/sweep.py", *words], folder, environment):
        if found := re.search(r"(\d+) at a time", line):
            places = int(found[1])
        elif found := re.search(r"trial-(\d+)  epoch (\d+)/", line):
            first_epoch = first_epoch or seconds
            if int(found[2]) == _EPOCHS:
                ends[int(found[1])] = seconds
    whole = time.perf_counter() - started
    records = RunFolder(folder / "runs" / "sweep").records()
    say("the same configurations in this process ...")
    bare = [bare_loop(folder, record) for record in records]
    # A trial begins when a place is free.
    begun = [0.0] * places + sorted(ends.values())
    added = [ends[n] - begun[n] - bare[n] for n in range(trials)]
    # The first line comes when the first epoch is over.
    epoch = min(record.history[0]["train/seconds"] for record in records[:places])
    rows = [
        row("from sweep.py to the first training step, s", Timing.of([first_epoch - epoch])),
        row("first trial in its place, beyond its training, s", Timing.of(added[:places])),
        row("later trial, beyond its training, s", Timing.of(added[places:])),
        row("training of a trial alone, s", Timing.of(bare)),
        row(f"the whole sweep of {trials} trials, s", Timing.of([whole])),
    ]
    return rows, {"at_a_time": places, "alone_seconds": bare, "added_seconds": added}


def bare_loop(folder: Path, record: Any) -> float:
    """Seconds of a trial's training alone; the first one trains once before, to warm up.

    Raises:
        RuntimeError: it comes to other numbers than in the sweep.
    """
    from cpfean.data.sources import resolve_data
    from cpfean.training.loop import fit

    class Silent:
        def report(self, report: Any, checkpoint: Any) -> None: ...

    def train() -> Any:
        return fit(
            record.experiment,
            data_folder=data_folder,
            cache_dir=folder / "cache",
            reporter=Silent(),
            device=torch.device("cuda" if torch.cuda.is_available() else "cpu"),
        )

    torch.set_num_threads(1)
    data_folder = resolve_data(record.experiment.data, cache_dir=folder / "cache")
    if record.number == 0:
        train()
    started = time.perf_counter()
    result = train()
    seconds = time.perf_counter() - started
    here, there = (
        [(r["train/loss"], r["val/rsum"]) for r in history]
        for history in (result.history, record.history)
    )
    if here != there:
        raise RuntimeError(f"{record.name} came to {there} in the sweep and to {here} alone")
    return seconds


# ----------------------------------------------------------------------------- the driver's memory


def driver_memory(folder: Path, trials: int, *, every: int) -> list[dict[str, float]]:
    """Resident megabytes and seconds of a simulated sweep's driver, by finished trials."""
    say(f"a driver of {trials} trials ...")
    looks: dict[int, dict[str, float]] = {}
    words = [__file__, "--simulated", trials, "--driver", folder]
    for seconds, line, driver in lines_of(words, folder, {}):
        found = re.search(r"\[(\d+)/\d+ done", line)
        done = int(found[1]) if found else 0
        if done not in looks and done in {1, trials - 1, *range(every, trials, every)}:
            megabytes = resident(driver) / 2**20
            looks[done] = {"trials": done, "megabytes": megabytes, "seconds": seconds}
            say(f"  {done} trials: {megabytes:.0f} MB, {seconds:.0f} s")
    return list(looks.values())


def memory_rows(looks: list[dict[str, float]]) -> list[dict[str, Any]]:
    """What the driver holds with few and with many trials, and what a trial costs it."""
    first, *_, last = looks
    steps = [
        (after["seconds"] - before["seconds"]) / (after["trials"] - before["trials"])
        for before, after in itertools.pairwise(looks)
    ]
    grown = last["megabytes"] - first["megabytes"]
    rows = [
        row(f"driver with {look['trials']:.0f} finished trials, MB", Timing.of([look["megabytes"]]))
        for look in looks
    ]
    return [
        *rows,
        row(
            f"driver, growth over {last['trials'] - first['trials']:.0f} trials, MB",
            Timing.of([grown]),
        ),
        row("simulated trial, s", Timing.of(steps)),
    ]


def simulate(folder: Path, *, trials: int) -> None:
    """Is the driver of a sweep whose training is trivial."""
    from cpfean.threads import usable_cpus
    from orchestration.settings import Settings, prepare_environment

    prepare_environment()  # before Ray is imported
    from ray import tune

    from cpfean.config import ExperimentConfig
    from cpfean.data.sources import resolve_data
    from experiments.search_spaces import SEARCH_SPACES
    from orchestration.runners.messages import Epoch
    from orchestration.runners.on_ray import OnRay
    from orchestration.runners.trial_process import result_of
    from orchestration.study.plan import StudyPlan
    from orchestration.study.study import run_study

    names = [f"val/{way}_r{k}" for way in ("i2t", "t2i") for k in (1, 5, 10)]

    class Trivial(tune.Trainable):
        """Makes up the numbers of an epoch in each step."""

        def setup(self, config: dict[str, Any], options: Any = None) -> None:
            self.reset_config(config)

        def reset_config(self, new_config: dict[str, Any]) -> bool:
            self.history: list[dict[str, float]] = []
            return True

        def step(self) -> dict[str, Any]:
            epoch = len(self.history) + 1
            best = 100 + self.config["number"] * 37 % 101 + epoch
            row = {"epoch": epoch, "train/loss": 1 / epoch, "train/learning_rate": 1e-3}
            row |= {"train/seconds": 0.0, "train/pairs_per_second": 0.0}
            row |= dict.fromkeys(names, best / 6) | {"val/rsum": best}
            self.history.append(row | {"best/val_rsum": best, "best/epoch": epoch})
            ended = epoch == _SIMULATED_EPOCHS
            saved = f"{folder}/epoch-{epoch:04d}"
            return result_of(Epoch(history=tuple(self.history), checkpoint=saved, ended=ended))

    # Next to nothing, as a study makes sure at its start that the checkpoints of all trials fit.
    base = ExperimentConfig().with_overrides(
        {
            "optim.epochs": _SIMULATED_EPOCHS,
            "model.dim": 16,
            "model.text.scratch_dim": 16,
            "data.num_regions": 24,
            "data.synthetic.train_images": 16,
            "data.synthetic.dev_images": 10,
            "data.synthetic.test_images": 10,
        }
    )
    plan = StudyPlan(
        kind="ablations",  # which tests no model in the end: there is none
        name="simulated",
        base=base,
        trials=trials,
        workers=usable_cpus(),  # one trial at a time: as fast as processes start
        space=SEARCH_SPACES["default"],
        grace=3,
        data_folder=resolve_data(base.data, cache_dir=folder / "cache"),
        data_fingerprint="0",
    )
    settings = Settings.resolve(output=folder, address="local")
    run_study(
        plan,
        settings,
        runner=OnRay(settings, trainable=Trivial),
        resume=False,
        say=lambda line: print(line, flush=True),
    )


# ------------------------------------------------------------------------------------------- both


def lines_of(
    words: list[Any], folder: Path, environment: Mapping[str, str]
) -> Iterator[tuple[float, str, int]]:
    """Runs a Python script; yields seconds since its start, its lines and its process id.

    Raises:
        RuntimeError: it failed; with the end of what it said.
    """
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "MLFLOW_"))}
    started = time.perf_counter()
    with (folder / "errors").open("w+") as errors:
        process = subprocess.Popen(
            [sys.executable, *map(str, words)],
            cwd=folder,
            env=clean | {"PYTHONPATH": str(ROOT)} | dict(environment),
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )
        assert process.stdout is not None
        said = []
        for line in process.stdout:
            said.append(line)
            yield time.perf_counter() - started, line.rstrip(), process.pid
        if process.wait() != 0:
            errors.seek(0)
            raise RuntimeError("".join(said[-5:]) + errors.read()[-4000:])


def resident(process: int) -> int:
    """Bytes of memory that a process has (Linux)."""
    status = Path(f"/proc/{process}/status").read_text(encoding="utf-8")
    return 1024 * int(re.search(r"VmRSS:\s+(\d+)", status)[1])


def row(what: str, timing: Timing) -> dict[str, Any]:
    return {
        "what": what,
        "median": timing.median,
        "least": timing.fastest,
        "most": timing.slowest,
        "n": timing.runs,
    }


if __name__ == "__main__":
    main()
