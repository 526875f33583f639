"""What probing trained models found, as files: numbers, tables and pictures.

A result is one model's recalls under one condition. Models of one name are seeds of one variant:
tables and pictures show their mean and 95 % interval, the CSV files every model by itself.

Markers say once more what colours say.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cpfean.analysis.colours import COLOURS
from cpfean.analysis.statistics import Interval, mean_interval
from cpfean.metrics.retrieval import RetrievalMetrics
from cpfean.writing import write_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Value = str | int | float
_MARKERS = "osD^vPX*"  # one more than colours: the second round looks different
_LINES = ("-", "--", ":", "-.")
_PANEL_SIZE = (3.5, 2.9)  # in inches
_PANELS_ACROSS = 3


@dataclass(frozen=True, kw_only=True)
class ProbeResult:
    """One model under one condition.

    Attributes:
        variant: the name that the seeds of a variant share.
        model: which of them.
        at: the condition, by column; results of one file have the same columns.
        metrics: the recalls.
    """

    variant: str
    model: str
    at: Mapping[str, Value]
    metrics: RetrievalMetrics


@dataclass(frozen=True, kw_only=True)
class CurvePanel:
    """What one panel of curves shows.

    Attributes:
        title, x_label: for people.
        points: x, and the results there.
    """

    title: str
    x_label: str
    points: Sequence[tuple[float, Sequence[ProbeResult]]]


def write_results(results: Sequence[ProbeResult], file: Path) -> Path:
    """Writes a line for each model under each condition."""
    stream = io.StringIO()
    columns = list(results[0].at)
    recalls = list(results[0].metrics.as_dict())
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(["variant", "model", *columns, *recalls])
    for result in results:
        values = result.metrics.as_dict()
        given = [result.at[column] for column in columns]
        shown = [f"{values[name]:.4f}" for name in recalls]
        writer.writerow([result.variant, result.model, *given, *shown])
    file.parent.mkdir(parents=True, exist_ok=True)
    write_text(file, stream.getvalue())
    return file


def variants_of(results: Sequence[ProbeResult]) -> list[str]:
    """The names, in the order of their first results."""
    return list(dict.fromkeys(result.variant for result in results))


def rsum_of(results: Sequence[ProbeResult], variant: str) -> Interval:
    """Mean and interval of the rSum over a variant's models, all under one condition."""
    return mean_interval([each.metrics.rsum for each in results if each.variant == variant])


def rsum_table(
    results: Sequence[ProbeResult], *, rows: Sequence[str], columns: Callable[[ProbeResult], str]
) -> str:
    """Markdown: rSum as mean and 95 % interval, a line for each condition and variant.

    Args:
        results: what to show.
        rows: the columns of a condition that begin a line.
        columns: what heads the column that a result belongs to.
    """
    heads = list(dict.fromkeys(map(columns, results)))
    lines = [
        f"| {' | '.join([*rows, 'variant', *heads])} |",
        f"|{' --- |' * (len(rows) + 1)}{' ---: |' * len(heads)}",
    ]
    for condition in dict.fromkeys(tuple(result.at[row] for row in rows) for result in results):
        there = [result for result in results if tuple(result.at[row] for row in rows) == condition]
        for variant in variants_of(there):
            cells = [*map(str, condition), variant]
            for head in heads:
                group = [
                    each for each in there if each.variant == variant and columns(each) == head
                ]
                cells.append(rsum_of(group, variant).brief if group else "")
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def draw_curves(panels: Sequence[CurvePanel], *, heading: str, file: Path) -> Path:
    """Draws rSum along each kind of disturbance: mean over the seeds, with its 95 % interval."""
    names = variants_of(
        [result for panel in panels for _, group in panel.points for result in group]
    )
    figure, grid = _panels(len(panels), heading)
    for number, (axes, panel) in enumerate(zip(grid, panels, strict=True)):
        for which, name in enumerate(names):
            x, found = [], []
            for at, group in panel.points:
                if any(result.variant == name for result in group):
                    x.append(at)
                    found.append(rsum_of(group, name))
            mean = [interval.mean for interval in found]
            axes.plot(x, mean, label=name.replace("_", " "), zorder=3, **_style(which))
            if all(interval.n > 1 for interval in found):
                low = [interval.mean - interval.half_width for interval in found]
                high = [interval.mean + interval.half_width for interval in found]
                colour = COLOURS[which % len(COLOURS)]
                axes.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)
        axes.set_xticks([at for at, _ in panel.points])
        _label_axes(axes, panel.title, panel.x_label, first=number % _PANELS_ACROSS == 0)
    return _save(figure, grid[0], file)


def draw_objects(
    results: Sequence[ProbeResult], *, titles: Mapping[str, str], heading: str, file: Path
) -> Path:
    """Draws rSum by the number of objects that an image shows, a panel for each way to count.

    Args:
        results: with the columns `counted`, `bin`, `images`.
        titles: of the panels, by `counted`.
        heading: above all.
        file: PNG to write.
    """
    names = variants_of(results)
    figure, grid = _panels(len(titles), heading)
    for column, (axes, (counted, title)) in enumerate(zip(grid, titles.items(), strict=True)):
        there = [result for result in results if result.at["counted"] == counted]
        bins = list(dict.fromkeys((each.at["bin"], each.at["images"]) for each in there))
        for which, name in enumerate(names):
            # Side by side, as intervals of variants would cover each other.
            aside = 0.0 if len(names) == 1 else 0.5 * (which / (len(names) - 1) - 0.5)
            found = [
                rsum_of([each for each in there if each.at["bin"] == label], name)
                for label, _ in bins
            ]
            axes.errorbar(
                [number + aside for number in range(len(bins))],
                [interval.mean for interval in found],
                yerr=[interval.half_width if interval.n > 1 else 0.0 for interval in found],
                label=name.replace("_", " "),
                capsize=2.5,
                **_style(which) | {"linewidth": 1.0},
            )
        axes.set_xticks(range(len(bins)), [f"{label}\nn = {images}" for label, images in bins])
        axes.set_xlim(-0.5, len(bins) - 0.5)
        _label_axes(axes, title, "in an image; n images", first=column % _PANELS_ACROSS == 0)
        axes.grid(axis="x", visible=False)
    return _save(figure, grid[0], file)


def _panels(number: int, heading: str) -> tuple[Figure, list[Axes]]:
    """Panels of equal height, three in a row, with one scale of rSum."""
    from matplotlib.figure import Figure

    across = min(_PANELS_ACROSS, number)
    down = -(-number // across)
    # As wide as two panels at least: the heading and the legend need it.
    size = (max(2, across) * _PANEL_SIZE[0], down * _PANEL_SIZE[1] + 0.9)
    figure = Figure(figsize=size, layout="constrained")
    figure.suptitle(heading, fontsize=11)
    grid = figure.subplots(down, across, sharey=True, squeeze=False).ravel().tolist()
    for axes in grid[number:]:
        axes.set_visible(False)
    return figure, grid[:number]


def _style(which: int) -> dict[str, Any]:
    return {
        "color": COLOURS[which % len(COLOURS)],
        "marker": _MARKERS[which % len(_MARKERS)],
        "linestyle": _LINES[which // len(COLOURS) % len(_LINES)],
        "markersize": 4.5,
        "linewidth": 1.6,
    }


def _label_axes(axes: Axes, title: str, x_label: str, *, first: bool) -> None:
    axes.set_title(title, fontsize=10, loc="left")
    axes.set_xlabel(x_label, fontsize=9)
    if first:
        axes.set_ylabel("rSum", fontsize=9)
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def _save(figure: Figure, axes: Axes, file: Path) -> Path:
    handles, labels = axes.get_legend_handles_labels()
    columns = min(4, len(labels))
    figure.legend(
        handles, labels, loc="outside lower center", ncols=columns, frameon=False, fontsize=9
    )
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.name}")
    figure.savefig(temporary, dpi=150, format="png", metadata={"Software": None})
    temporary.replace(file)
    return file
