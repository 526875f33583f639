"""Do the parts of the model do what they are for? Measured on the synthetic set, over seeds.

    python benchmarks/mechanisms.py --seeds 5

Trains eight small models for each seed, of the data and of the training both, on one CPU core: the
baseline `synthetic` (about two minutes) for the gate and the prominent word, and one for each
setting of `known_truth.py` (about ten seconds each) for the textual prior. Prints the
tables of docs/model.md; what is going on goes to standard error.
"""

from __future__ import annotations

import argparse
import platform
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from known_truth import QUICK, SETTINGS, PriorEffects, train_and_measure, with_seed
from scipy import stats

from experiments.baselines import SYNTHETIC


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--seeds", type=int, default=5, help="how many, from 0 (5)")
    parser.add_argument(
        "--cache", type=Path, default=Path("runs/mechanisms"), help="where the sets are generated"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    configs = {"baseline": SYNTHETIC}
    configs |= {name: QUICK.with_overrides(changes) for name, changes in SETTINGS.items()}
    rows: dict[str, list[dict[str, float]]] = {name: [] for name in configs}
    for seed in range(arguments.seeds):
        for name, config in configs.items():
            seeded = with_seed(config, seed)
            rows[name].append(asdict(train_and_measure(seeded, cache_dir=arguments.cache)))
            print(f"seed {seed}, {name}: {rows[name][-1]}", file=sys.stderr, flush=True)
    effects = [
        PriorEffects({name: rows[name][seed]["rsum"] for name in SETTINGS}.__getitem__)
        for seed in range(arguments.seeds)
    ]
    table = {
        "the prior adds, clear features": [e.gain_clear for e in effects],
        "the prior adds, noisy features": [e.gain_noisy for e in effects],
        "wrong labels cost, with the confidence": [e.harm for e in effects],
        "wrong labels cost, without": [e.harm_without_confidence for e in effects],
        "spared by the confidence": [e.harm_without_confidence - e.harm for e in effects],
    }

    print(f"{arguments.seeds} seeds, mean and 95 % interval; torch {torch.__version__},")
    print(f"Python {platform.python_version()}, one core of {platform.machine()}.\n")
    print("| setting | rSum | gate AUC | word accuracy | by chance |")
    print("| --- | --- | --- | --- | --- |")
    for name, results in rows.items():
        figures = [column(results, key) for key in results[0]]
        cells = [interval(figures[0], 1), *(interval(figure, 3) for figure in figures[1:])]
        print(f"| {name} | {' | '.join(cells)} |")
    print("\n| effect on rSum | by seed | mean |")
    print("| --- | --- | --- |")
    for key, values in table.items():
        listed = ", ".join(f"{value:.0f}" for value in values)
        print(f"| {key} | {listed} | {interval(values, 1)} |")


def column(rows: Sequence[dict[str, float]], key: str) -> list[float]:
    """One figure of every row."""
    return [row[key] for row in rows]


def interval(values: list[float], digits: int) -> str:
    """Mean and half the width of its 95 % interval (Student's t)."""
    mean = f"{np.mean(values):.{digits}f}"
    if len(values) < 2:
        return mean
    half = stats.t.ppf(0.975, len(values) - 1) * stats.sem(values)
    return f"{mean} ± {half:.{digits}f}"


if __name__ == "__main__":
    main()
