"""What all benchmarks share: the machine, time, memory, a table and a file of results.

Ratios are only as good as the conditions they share. So what is compared is timed in one process,
in turns, and each figure is a median; a neighbour's load then falls on all of them.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from cpfean.threads import usable_cpus

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
_PACKAGES = ("torch", "numpy", "numba", "triton", "ray", "optuna", "mlflow", "transformers")


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Seconds of one thing, measured several times.

    Attributes:
        median: of the runs.
        fastest, slowest: of the runs.
        runs: how many.
    """

    median: float
    fastest: float
    slowest: float
    runs: int

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Timing:
        """From the seconds of each run."""
        return cls(
            median=statistics.median(seconds),
            fastest=min(seconds),
            slowest=max(seconds),
            runs=len(seconds),
        )


def parser_of(description: str, name: str) -> argparse.ArgumentParser:
    """The options that every benchmark has.

    Args:
        description: the script's own documentation; its first line is shown.
        name: of its file of results.
    """
    parser = argparse.ArgumentParser(description=description.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--runs", type=int, default=5, help="of each measurement (5)")
    parser.add_argument(
        "--output",
        type=Path,
        default=RESULTS / f"{name}.json",
        help=f"file of results (benchmarks/results/{name}.json)",
    )
    return parser


def in_turns(
    calls: Mapping[str, Callable[[], object]], *, runs: int, device: str = "cpu", warm_ups: int = 1
) -> dict[str, Timing]:
    """Times the calls in turns: one run of each, then again one of each, and so on.

    Args:
        calls: by name; what they return is dropped.
        runs: of each, after the warm-ups.
        device: "cuda" to wait for the GPU before the clock is read.
        warm_ups: runs that do not count.
    """
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for run in range(-warm_ups, runs):
        for name, call in calls.items():
            gc.collect()
            _wait(device)
            started = time.perf_counter()
            call()
            _wait(device)
            if run >= 0:
                seconds[name].append(time.perf_counter() - started)
        say(f"  run {run + 1} of {runs}" if run >= 0 else "  warm-up")
    return {name: Timing.of(values) for name, values in seconds.items()}


def peak_memory(call: Callable[[], object], *, device: str = "cpu") -> int:
    """Bytes that a call needs at its peak, above what was held before it.

    On a CPU that is resident memory, from the kernel's own high-water mark, so Linux only. The
    allocator keeps what was freed for later, so the first call in a process is the one to measure.
    """
    gc.collect()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    before = _status("VmRSS")
    call()
    return _status("VmHWM") - before


def conditions() -> dict[str, Any]:
    """The machine, the versions and the commit."""
    return {
        "date": time.strftime("%Y-%m-%d"),
        "command": " ".join(["python", *(_shown(argument) for argument in sys.argv)]),
        "commit": _commit(),
        "cpu": _cpu_name(),
        "cores": usable_cpus(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "versions": {name: found for name in _PACKAGES if (found := _version(name))},
    }


def publish(output: Path, rows: Sequence[Mapping[str, Any]], **others: Any) -> None:
    """Prints the rows as a table and writes them, with the conditions, as JSON.

    Args:
        output: file; its folder is made.
        rows: all with the same columns; numbers are written whole and shown with three digits.
        others: whatever else belongs into the file.
    """
    found = conditions()
    result = {**found, **others, "rows": [dict(row) for row in rows]}
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    versions = ", ".join(f"{name} {number}" for name, number in found["versions"].items())
    print(f"{found['date']}, {found['cpu']}, {found['cores']} cores, {found['threads']} threads;")
    print(f"{versions}; commit {found['commit']}\n")
    print(table(rows))


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows in Markdown."""
    names = list(rows[0])
    lines = [f"| {' | '.join(names)} |", f"|{' --- |' * len(names)}"]
    lines += [f"| {' | '.join(_cell(row[name]) for name in names)} |" for row in rows]
    return "\n".join(lines)


def say(text: str) -> None:
    """What is going on, to standard error."""
    print(text, file=sys.stderr, flush=True)


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _status(key: str) -> int:
    """Bytes, from this process's status file."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return 1024 * int(line.split()[1])
    raise RuntimeError(f"/proc/self/status has no {key}: memory is measured on Linux only")


def _shown(argument: str) -> str:
    """An argument of the command line, a path inside the project relative to its root."""
    path = Path(argument)
    if path.is_absolute():
        return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else path.name
    return argument


def _commit() -> str:
    """Short name of the commit, with a plus sign if files differ from it."""
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty=+", "--exclude=*"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip()


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
