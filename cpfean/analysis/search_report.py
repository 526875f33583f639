"""A search over settings as files: how much each setting mattered, and a picture of each."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cpfean.analysis.colours import BLUE, RED
from cpfean.analysis.importance import Importance
from cpfean.analysis.statistics import LEVEL, holm
from cpfean.config import Plain
from cpfean.writing import write_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_STATES = {"finished": ("finished", "o", BLUE), "pruned": ("stopped early", "x", RED)}
_STRIP = 0.5  # width of the strip of a choice; they are 1 apart


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """What was searched.

    Attributes:
        path: dotted, as `--set` takes it.
        choices: its values if they have no order; else empty.
        low, high: the ends of its range, if it is a number.
        log: drawn evenly on the logarithm.
    """

    path: str
    choices: tuple[Plain, ...] = ()
    low: float = 0.0
    high: float = 0.0
    log: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class SearchedTrial:
    """A trial that has an rSum.

    Attributes:
        state: "finished", or "pruned": stopped early, behind the others.
        rsum: the best on dev.
        values: of the settings by path; without those that were not searched beside the others.
    """

    state: str
    rsum: float
    values: Mapping[str, Plain]


def write_search_report(
    trials: Sequence[SearchedTrial],
    settings: Sequence[Setting],
    importance: Mapping[str, Importance],
    folder: Path,
    *,
    needed: int,
) -> list[Path]:
    """Writes importance.md, importance.csv and a slice-PATH.png for each setting that was tried.

    Args:
        importance: by path, the greatest first; empty if the trials are too few to tell.
        folder: is made; files of these names in it are replaced.
        needed: how many trials would have been enough.

    Returns:
        The files.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rows = _rows(trials, settings, importance)
    texts = {
        "importance.md": _markdown(trials, rows, needed),
        "importance.csv": _csv(rows),
    }
    for name, text in texts.items():
        write_text(folder / name, text)
    pictures = []
    for setting in settings:
        if any(setting.path in trial.values for trial in trials):
            pictures.append(folder / f"slice-{setting.path}.png")
            slice_plot(trials, setting).savefig(pictures[-1], dpi=150)
    return [*(folder / name for name in texts), *pictures]


def slice_plot(trials: Sequence[SearchedTrial], setting: Setting) -> Figure:
    """rSum on dev against the setting's value, a point for each trial that searched it.

    The axis is the whole range, also where nothing was tried; choices are strips.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullLocator

    shown = [trial for trial in trials if setting.path in trial.values]
    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axes = figure.subplots()
    low, high = setting.low, setting.high
    if setting.choices:
        axes.set_xticks(range(len(setting.choices)), [str(value) for value in setting.choices])
        low, high = -_STRIP / 2, len(setting.choices) - 1 + _STRIP / 2
    if setting.log:
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 3)))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter("{x:g}")
    for state, (told, marker, colour) in _STATES.items():
        points = [
            (_place(setting, trial, number / max(1, len(shown) - 1)), trial.rsum)
            for number, trial in enumerate(shown)
            if trial.state == state
        ]
        if points:
            x, y = zip(*points, strict=True)
            axes.plot(x, y, marker, color=colour, alpha=0.7, label=f"{told} ({len(points)})")
    axes.update_datalim([(low, shown[0].rsum), (high, shown[0].rsum)])
    axes.autoscale_view()
    axes.set_xlabel(setting.path)
    axes.set_ylabel("rSum on dev, best epoch")
    axes.grid(axis="y" if setting.choices else "both", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper right", ncols=2, frameon=False, fontsize=8)
    return figure


def _place(setting: Setting, trial: SearchedTrial, part: float) -> float:
    """Where on the axis a trial is; within the strip of a choice, by how far the search had got."""
    value = trial.values[setting.path]
    if setting.choices:
        return setting.choices.index(value) + (part - 0.5) * _STRIP
    return float(value)


def _rows(
    trials: Sequence[SearchedTrial],
    settings: Sequence[Setting],
    importance: Mapping[str, Importance],
) -> list[list[str]]:
    """Setting, trials that searched it, share, p after Holm's correction; most important first."""
    corrected = dict(zip(importance, holm([one.p for one in importance.values()]), strict=True))
    paths = [*importance, *(one.path for one in settings if one.path not in importance)]
    return [
        [
            path,
            str(sum(path in trial.values for trial in trials)),
            f"{importance[path].share:.3f}" if path in importance else "",
            f"{corrected[path]:.3f}" if path in importance else "",
        ]
        for path in paths
    ]


def _markdown(trials: Sequence[SearchedTrial], rows: Sequence[Sequence[str]], needed: int) -> str:
    """The table with what it means; where there is none, why."""
    stopped = sum(trial.state == "pruned" for trial in trials)
    number = f"{len(trials)} trials ({stopped} stopped early)"
    if not any(share for _, _, share, _ in rows):
        return f"""\
No importance is given: {number} are too few to tell what mattered; it takes {needed}.
The pictures show what was tried.
"""
    table = [["setting", "trials", "importance", "p (Holm)"], ["---"] * 4, *rows]
    lines = "\n".join("| " + " | ".join(row) + " |" for row in table)
    return f"""\
What mattered for being among the best by rSum on dev, by PED-ANOVA over {number}:
how far a setting's values in the best trials are from those in all. A value that is merely bad, and
was soon left by the search, counts little; the pictures show it. The shares add up to 1 also where
nothing matters. p tells how often rSums that are shuffled among the trials give as much; above
{LEVEL} the share tells nothing.

{lines}
"""


def _csv(rows: Sequence[Sequence[str]]) -> str:
    text = io.StringIO()
    header = ["setting", "trials", "importance", "p_holm"]
    csv.writer(text, lineterminator="\n").writerows([header, *rows])
    return text.getvalue()
