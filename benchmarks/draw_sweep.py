"""Draw a sweep: rSum on dev by epoch, a line for each trial.

python benchmarks/draw_sweep.py runs/NAME docs/images/sweep.png
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib.pyplot as plt

from cpfean.records.run_folder import RunFolder

_LINES = {"finished": "-", "pruned": "--", "failed": ":"}


def main() -> None:
    """Reads the records of the run and writes the picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("run", type=Path, help="folder of the sweep")
    parser.add_argument("picture", type=Path, help="PNG to write")
    arguments = parser.parse_args()
    figure, axis = plt.subplots(figsize=(7, 3.6), layout="constrained")
    for record in RunFolder(arguments.run).records():
        flat = record.experiment.flat()
        gate, margin = flat["model.alignment.gate"], flat["loss.margin"]
        axis.plot(
            [row["epoch"] for row in record.history],
            [row["val/rsum"] for row in record.history],
            _LINES.get(record.state, ":"),
            marker="o",
            markersize=3,
            label=f"{record.name}: {gate} gate, margin {margin}, {record.state}",
        )
    axis.set(xlabel="epoch", ylabel="rSum on dev (0 to 600)", title=arguments.run.name)
    axis.legend(fontsize=7, frameon=False)
    axis.spines[["top", "right"]].set_visible(False)
    arguments.picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(arguments.picture, dpi=110)


if __name__ == "__main__":
    main()
