"""Draws the ranks of all queries by two models, and names those that changed most."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from cpfean.analysis.colours import BLUE, RED
from cpfean.analysis.pictures.sheet import (
    GAP,
    GREY,
    INK,
    MARGIN,
    PALE,
    PANEL,
    ROW,
    Box,
    Sheet,
    least_covering,
)

_PLOT_SIDE = 3.9  # in inches
_MODEL_COLOURS = (BLUE, RED)  # for what the first and the second model rank better


class NamedQuery(NamedTuple):
    """A query to point at: its ranks by the first and by the second model, and what it is."""

    ranks: tuple[int, int]
    text: str


@dataclass(frozen=True, kw_only=True)
class RankPanel:
    """The queries of one direction.

    Attributes:
        title: which direction.
        ranks: by the first and by the second model, a row a query.
        candidates: how many there are to rank.
        better: by model, the queries to name that it ranks better.
    """

    title: str
    ranks: Int[np.ndarray, "query 2"]
    candidates: int
    better: tuple[Sequence[NamedQuery], Sequence[NamedQuery]] = ((), ())


def lay_out_ranks(panels: Sequence[RankPanel], *, names: tuple[str, str], heading: str) -> Sheet:
    """The ranks by one model against those by another, with a list of what changed most.

    Args:
        panels: one a direction.
        names: of the models.
        heading: above all.
    """
    width = 2 * MARGIN + len(panels) * PANEL + (len(panels) - 1) * GAP
    heads = Sheet(width, 1).wrapped(heading, width - 2 * MARGIN, size=12, bold=True)
    rows = [max(len(panel.better[model]) for panel in panels) for model in (0, 1)]
    lists = [0.34 + count * ROW for count in rows]
    tops = np.cumsum([MARGIN, 0.13 + 0.23 * len(heads), 0.3, _PLOT_SIDE + 0.65, *lists])
    sheet = Sheet(width, tops[-1] + 0.17 + MARGIN)
    sheet.write_lines(heads, tops[0], height=0.23, size=12, bold=True)
    for column, panel in enumerate(panels):
        x = MARGIN + column * (PANEL + GAP)
        title = sheet.shortened(panel.title, PANEL, size=10, bold=True)
        sheet.write(x, tops[1] + 0.1, title, size=10, bold=True)
        _draw_plot(sheet, panel, names, Box(x + 0.6, tops[2], _PLOT_SIDE, _PLOT_SIDE))
        first = 1
        for model, queries in enumerate(panel.better):
            told = sheet.shortened(f"better with {names[model]}", PANEL, size=9, bold=True)
            sheet.write(
                x, tops[3 + model] + 0.1, told, size=9, bold=True, color=_MODEL_COLOURS[model]
            )
            _list_queries(sheet, queries, x, tops[3 + model] + 0.24, first=first, model=model)
            first += len(queries)
    legend = (
        "A larger dot stands for more queries; on the line both models agree. "
        "What changed most is told by the ratio of the ranks."
    )
    sheet.write_lines([legend], tops[-1], height=0.17, size=8, color=GREY)
    return sheet


def _list_queries(
    sheet: Sheet, queries: Sequence[NamedQuery], x: float, top: float, *, first: int, model: int
) -> None:
    changes = [f"{before} \N{RIGHTWARDS ARROW} {after}" for (before, after), _ in queries]
    widest = max((sheet.width_of(change, size=9) for change in changes), default=0.0)
    right = x + 0.34 + max(widest, 0.6)
    for row, (change, query) in enumerate(zip(changes, queries, strict=True)):
        y = top + row * ROW
        tag = Box(x, y + 0.02, 0.24, 0.18)
        sheet.tag(tag, str(first + row), colour=_MODEL_COLOURS[model], size=8)
        sheet.write(right, y + 0.11, change, size=9, ha="right")
        text = sheet.shortened(query.text, x + PANEL - right - 0.1, size=9)
        sheet.write(right + 0.1, y + 0.11, text, size=9, color=GREY)


def _draw_plot(sheet: Sheet, panel: RankPanel, names: tuple[str, str], at: Box) -> None:
    axes = sheet.axes(at)
    (x, y), counts = _distinct(panel.ranks)
    limits = (0.75, panel.candidates * 1.35)
    axes.plot(limits, limits, color=PALE, linewidth=1, zorder=1)
    axes.scatter(x, y, s=5 * np.sqrt(counts), color="#5A5A5A", alpha=0.35, linewidths=0, zorder=2)
    axes.set(xscale="log", yscale="log", xlim=limits, ylim=limits)
    for axis in (axes.xaxis, axes.yaxis):
        ticks = [10**k for k in range(7) if 10**k <= panel.candidates]
        axis.set_ticks(ticks, [f"{tick:,}" for tick in ticks])
    axes.tick_params(labelsize=8, color=PALE, labelcolor=GREY)
    axes.tick_params(which="minor", length=0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(PALE)
    for label, name in ((axes.set_xlabel, names[0]), (axes.set_ylabel, names[1])):
        text = sheet.shortened(f"rank by {name}", at.width, size=9)
        label(text, fontsize=9, color=INK, parse_math=False)

    def fraction(rank: int) -> float:
        return float(np.log(rank / limits[0]) / np.log(limits[1] / limits[0]))

    taken: list[Box] = []
    for ranks, (numbers, model) in _numbers(panel).items():
        axes.scatter(
            *ranks, s=26, color=_MODEL_COLOURS[model], edgecolors="white", linewidths=0.8, zorder=3
        )
        x_on, y_on = (
            at.x + fraction(ranks[0]) * at.width,
            at.y + (1 - fraction(ranks[1])) * at.height,
        )
        taken.append(Box(x_on - 0.06, y_on - 0.06, 0.12, 0.12))
        text = ", ".join(map(str, numbers))
        size = sheet.width_of(text, size=8, bold=True) + 0.04, 0.13
        tag = least_covering(_boxes_around(x_on, y_on, size, inside=at), taken)
        taken.append(tag)
        middle = tag.x + tag.width / 2, tag.y + tag.height / 2
        sheet.write(
            *middle, text, size=8, bold=True, color=_MODEL_COLOURS[model], ha="center", zorder=8
        )


def _distinct(ranks: Int[np.ndarray, "query 2"]) -> tuple[np.ndarray, np.ndarray]:
    """The different pairs of ranks, as two rows, and how many queries have each."""
    pairs, counts = np.unique(ranks, axis=0, return_counts=True)
    return pairs.T, counts


def _numbers(panel: RankPanel) -> dict[tuple[int, int], tuple[list[int], int]]:
    """By ranks, the numbers of the named queries that have them, and which model is better."""
    result: dict[tuple[int, int], tuple[list[int], int]] = {}
    number = 0
    for model, queries in enumerate(panel.better):
        for query in queries:
            number += 1
            result.setdefault(query.ranks, ([], model))[0].append(number)
    return result


def _boxes_around(x: float, y: float, size: tuple[float, float], *, inside: Box) -> Iterable[Box]:
    """Where a text near a point may go, the nearest first, within the axes."""
    width, height = size
    for gap in np.arange(0.07, 0.6, 0.05):
        for angle in np.arange(12) / 12 * 2 * np.pi:
            box = Box(
                x + (gap + width / 2) * np.cos(angle) - width / 2,
                y - (gap + height / 2) * np.sin(angle) - height / 2,
                width,
                height,
            )
            if (
                box.x >= inside.x
                and box.y >= inside.y
                and box.x + width <= inside.x + inside.width
                and box.y + height <= inside.y + inside.height
            ):
                yield box
