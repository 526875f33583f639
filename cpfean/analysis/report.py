"""A comparison as files: tables for reading and for papers, numbers, and two pictures."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from cpfean.analysis.colours import COLOURS
from cpfean.analysis.statistics import (
    FULL,
    AblationResult,
    Interval,
    SeedRun,
    compare,
    mean_interval,
)
from cpfean.writing import write_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_RECALLS = ("i2t_r1", "i2t_r5", "i2t_r10", "t2i_r1", "t2i_r5", "t2i_r10")


def write_report(runs: Sequence[SeedRun], folder: Path) -> list[Path]:
    """Writes table.md, table.tex, table.csv, runs.csv, differences.png and epochs.png.

    Args:
        runs: of all variants.
        folder: is made; files of these names in it are replaced.

    Returns:
        The files.
    """
    folder.mkdir(parents=True, exist_ok=True)
    results = compare(runs)
    texts = {
        "table.md": markdown_table(results),
        "table.tex": latex_table(results),
        "table.csv": csv_table(results),
        "runs.csv": csv_runs(runs),
    }
    for name, text in texts.items():
        write_text(folder / name, text)
    figures = {}
    if any(result.difference is not None for result in results):
        figures["differences.png"] = difference_plot(results)
    if any(run.dev_rsums for run in runs):
        figures["epochs.png"] = epoch_plot(runs)
    for name, figure in figures.items():
        figure.savefig(folder / name, dpi=150)
    return [folder / name for name in (*texts, *figures)]


def markdown_table(results: Sequence[AblationResult]) -> str:
    """Test rSum as mean and 95 % interval, and the paired difference from the full model."""
    lines = [
        "| variant | n | test rSum, 95 % | difference from full, 95 % | p (Holm) | |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for result in results:
        name = result.name.replace("_", " ")
        said = ", ".join(filter(None, [result.verdict, _failures(result)]))
        cells = [f"**{name}**" if result.name == FULL else name, str(len(result.rsums))]
        cells += [_brief(result.rsum), _signed(result.difference), _p(result.p), said]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def latex_table(results: Sequence[AblationResult]) -> str:
    r"""The same for a paper; needs the package booktabs."""
    lines = [
        r"\begin{tabular}{lrrrr}",
        r"\toprule",
        r"variant & $n$ & test rSum & difference from full & $p$ (Holm) \\",
        r"\midrule",
    ]
    for result in results:
        name = result.name.replace("_", " ")
        cells = [rf"\textbf{{{name}}}" if result.name == FULL else name, str(len(result.rsums))]
        for cell in (_brief(result.rsum), _signed(result.difference), _p(result.p)):
            cell = cell.replace("±", r"\pm").replace("<", "< ")
            cells.append(f"${cell}$" if cell else "")
        lines.append(" & ".join(cells) + r" \\")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}"]) + "\n"


def csv_table(results: Sequence[AblationResult]) -> str:
    """The same as numbers."""
    header = ["variant", "n", "failed", "rsum", "rsum_95", "difference", "difference_95"]
    rows: list[list[object]] = [[*header, "p_holm", "verdict", "seconds"]]
    for result in results:
        rows.append(
            [
                result.name,
                len(result.rsums),
                result.failed,
                *_numbers(result.rsum),
                *_numbers(result.difference),
                "" if result.p is None else f"{result.p:.6g}",
                result.verdict,
                f"{result.seconds:.1f}",
            ]
        )
    return _csv(rows)


def csv_runs(runs: Sequence[SeedRun]) -> str:
    """One line a run: seed, recalls on test, best on dev, and rSum on dev by epoch."""
    header = ["variant", "seed", "state", "test_rsum", *(f"test_{name}" for name in _RECALLS)]
    rows: list[list[object]] = [[*header, "dev_rsum", "seconds", "dev_rsum_by_epoch"]]
    for run in runs:
        tested = [
            f"{run.test[name]:.2f}" if name in run.test else "" for name in ("rsum", *_RECALLS)
        ]
        by_epoch = " ".join(f"{rsum:.2f}" for rsum in run.dev_rsums)
        best = f"{run.best_dev_rsum:.2f}" if run.dev_rsums else ""
        rows.append(
            [run.variant, run.seed, run.state, *tested, best, f"{run.seconds:.1f}", by_epoch]
        )
    return _csv(rows)


def difference_plot(results: Sequence[AblationResult]) -> Figure:
    """A forest plot: each variant's paired difference from the full model, a dot for each seed."""
    from matplotlib.figure import Figure

    full = next((result for result in results if result.name == FULL), None)
    shown = sorted(
        (result for result in results if result.difference is not None),
        key=lambda result: result.difference.mean if result.difference else 0.0,
    )
    figure = Figure(figsize=(7.5, 1.3 + 0.38 * len(shown)), layout="constrained")
    axes = figure.subplots()
    axes.axvline(0, color="black", linewidth=1)
    for row, result in enumerate(shown):
        assert result.difference is not None
        certain = result.p is not None and result.verdict != "not distinguishable from full"
        colour = COLOURS[0] if certain else "#888888"
        pairs = [
            value - full.rsums[seed]
            for seed, value in result.rsums.items()
            if full is not None and seed in full.rsums
        ]
        axes.plot(pairs, [row] * len(pairs), ".", color=colour, alpha=0.35, markersize=6)
        width = result.difference.half_width if result.difference.n > 1 else 0
        axes.errorbar(
            result.difference.mean, row, xerr=width, fmt="o", color=colour, capsize=3, markersize=5
        )
        axes.annotate(
            _signed(result.difference),
            (1.01, row),
            xycoords=("axes fraction", "data"),
            va="center",
            fontsize=8,
        )
    axes.set_yticks(range(len(shown)), [result.name.replace("_", " ") for result in shown])
    axes.set_ylim(-0.6, len(shown) - 0.4)
    mean = "" if full is None or full.rsum is None else f" ({full.rsum.brief}, n = {full.rsum.n})"
    axes.set_xlabel(f"test rSum minus that of the full model{mean}\n95 % interval, paired by seed")
    axes.grid(axis="x", alpha=0.3)
    axes.spines[["top", "right", "left"]].set_visible(False)
    return figure


def epoch_plot(runs: Sequence[SeedRun]) -> Figure:
    """rSum on dev by epoch: mean over the seeds, and their range."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    curves: dict[str, list[Sequence[float]]] = {}
    for run in runs:
        if run.dev_rsums:
            curves.setdefault(run.variant, []).append(run.dev_rsums)
    figure = Figure(figsize=(7.5, 4.2), layout="constrained")
    axes = figure.subplots()
    ends = []
    for index, (name, of_variant) in enumerate(curves.items()):
        length = min(map(len, of_variant))
        epochs = range(1, length + 1)
        columns = [[curve[epoch] for curve in of_variant] for epoch in range(length)]
        mean = [mean_interval(column).mean for column in columns]
        style = "-" if index < len(COLOURS) else "--"
        colour = COLOURS[index % len(COLOURS)]
        axes.plot(epochs, mean, style, marker=".", color=colour, label=name.replace("_", " "))
        low, high = [min(column) for column in columns], [max(column) for column in columns]
        axes.fill_between(epochs, low, high, color=colour, alpha=0.12, linewidth=0)
        ends += [*mean[1:], mean[-1]]
    axes.set_ylim(bottom=min(ends) - 10)  # the first epoch would flatten all others
    axes.set_xlabel("epoch")
    axes.set_ylabel("rSum on dev (mean and range over seeds)")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def _brief(interval: Interval | None) -> str:
    return "" if interval is None else interval.brief


def _signed(interval: Interval | None) -> str:
    if interval is None:
        return ""
    sign = "+" if interval.mean > 0 else "-"
    return sign + replace(interval, mean=abs(interval.mean)).brief


def _p(p: float | None) -> str:
    if p is None:
        return ""
    return "<0.001" if p < 0.001 else f"{p:.3f}"


def _numbers(interval: Interval | None) -> list[str]:
    if interval is None:
        return ["", ""]
    return [f"{interval.mean:.3f}", f"{interval.half_width:.3f}" if interval.n > 1 else ""]


def _failures(result: AblationResult) -> str:
    return f"{result.failed} failed" if result.failed else ""


def _csv(rows: Sequence[Sequence[object]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()
