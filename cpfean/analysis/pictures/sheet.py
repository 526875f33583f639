"""A page to draw on: text, boxes and photographs, laid out so that nothing overlaps.

A sheet is measured in inches from its upper left corner, downwards. matplotlib is loaded when the
first one is made: it takes a second, and most runs draw nothing.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from cpfean.errors import DataError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

INK, GREY, PALE = "#222222", "#767676", "#BDBDBD"

MARGIN = 0.18  # around a page
PANEL, GAP = 4.7, 0.35  # of pages in columns: their width, and what is between two
ROW = 0.225  # height of a line in a list


class Box(NamedTuple):
    """A rectangle on a sheet."""

    x: float
    y: float
    width: float
    height: float

    def moved(self, x: float, y: float) -> Box:
        """The box, so much further right and down."""
        return self._replace(x=self.x + x, y=self.y + y)

    def overlap(self, other: Box) -> float:
        """The area that both cover."""
        across = min(self.x + self.width, other.x + other.width) - max(self.x, other.x)
        down = min(self.y + self.height, other.y + other.height) - max(self.y, other.y)
        return max(0.0, across) * max(0.0, down)


class Sheet:
    """A white page.

    Args:
        width, height: in inches.
    """

    def __init__(self, width: float, height: float) -> None:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        # Not pyplot, whose figures are shared by the whole process.
        self.figure = Figure(figsize=(width, height), dpi=100, facecolor="white")
        self._renderer = FigureCanvasAgg(self.figure).get_renderer()
        self.width, self.height = width, height
        self.page = self.figure.add_axes((0, 0, 1, 1))
        self._fix_limits()
        self.page.axis("off")
        self.page.set_zorder(1)  # what is written on it lies over other axes

    def axes(self, at: Box) -> Axes:
        """Ordinary axes on a part of the page."""
        top = 1 - (at.y + at.height) / self.height
        size = at.width / self.width, at.height / self.height
        return self.figure.add_axes((at.x / self.width, top, *size))

    def width_of(self, text: str, *, size: float, bold: bool = False) -> float:
        """The width of a text, in inches."""
        from matplotlib.font_manager import FontProperties

        font = FontProperties(size=size, weight="bold" if bold else "normal")
        with _quiet():
            pixels, _, _ = self._renderer.get_text_width_height_descent(text, font, ismath=False)
        return pixels / self.figure.dpi

    def shortened(self, text: str, width: float, *, size: float, bold: bool = False) -> str:
        """The text, cut so that it is no wider than that."""
        if self.width_of(text, size=size, bold=bold) <= width:
            return text
        while text and self.width_of(f"{text} ...", size=size, bold=bold) > width:
            text = text[:-1].rstrip()
        return f"{text} ..."

    def wrapped(self, text: str, width: float, *, size: float, bold: bool = False) -> list[str]:
        """The text in lines no wider than that, but for words that are."""
        lines = [""]
        for word in text.split():
            longer = f"{lines[-1]} {word}".strip()
            if lines[-1] and self.width_of(longer, size=size, bold=bold) > width:
                lines.append(word)
            else:
                lines[-1] = longer
        return lines

    def write_lines(
        self, lines: Sequence[str], top: float, *, height: float, size: float, **style: Any
    ) -> None:
        """Writes lines of that height at the left margin."""
        for number, line in enumerate(lines):
            self.write(MARGIN, top + height * (number + 0.5), line, size=size, **style)

    def write(
        self, x: float, y: float, text: str, *, size: float, bold: bool = False, **style: Any
    ) -> None:
        """Writes a line whose middle is at this height; dollar signs are dollar signs."""
        style = {"color": INK, "va": "center_baseline"} | style
        weight = "bold" if bold else "normal"
        self.page.text(x, y, text, fontsize=size, weight=weight, parse_math=False, **style)

    def rectangle(self, at: Box, **style: Any) -> None:
        from matplotlib.patches import Rectangle

        self.page.add_patch(Rectangle((at.x, at.y), at.width, at.height, **style))

    def tag(self, at: Box, text: str, *, colour: str, size: float) -> None:
        """White text on a coloured plate."""
        self.rectangle(at, facecolor=colour, edgecolor="white", linewidth=0.8, zorder=6)
        middle = at.x + at.width / 2, at.y + at.height / 2
        self.write(*middle, text, size=size, bold=True, color="white", ha="center", zorder=7)

    def photograph(self, pixels: np.ndarray, at: Box) -> None:
        """Shows an image, stretched to the box."""
        extent = (at.x, at.x + at.width, at.y + at.height, at.y)
        self.page.imshow(pixels, extent=extent, aspect="auto", cmap="gray", zorder=1)
        self._fix_limits()

    def save(self, file: Path) -> Path:
        """Writes a PNG that is there whole or not at all, the same for the same contents."""
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary = file.with_name(f".{file.stem}.{os.getpid()}.png")
        with _quiet():
            self.figure.savefig(temporary, metadata={"Software": None})
        temporary.replace(file)
        return file

    def _fix_limits(self) -> None:
        self.page.set_xlim(0, self.width)
        self.page.set_ylim(self.height, 0)


def read_photo(file: Path) -> np.ndarray:
    """An image file's pixels, a row of them a line.

    Raises:
        DataError: it cannot be read.
    """
    from matplotlib.image import imread

    try:
        return imread(file)
    except (OSError, ValueError, SyntaxError) as error:  # the last is how Pillow puts it
        raise DataError(f"{file}: not an image that can be shown: {error}") from None


def least_covering(candidates: Iterable[Box], taken: Sequence[Box]) -> Box:
    """The first box that is free of those that are taken, or else the one that covers the least.

    Args:
        candidates: at least one, the best first.
        taken: what should not be covered.
    """
    best, least = None, np.inf
    for box in candidates:
        covered = sum(box.overlap(other) for other in taken)
        if covered < least:
            best, least = box, covered
        if not covered:
            break
    assert best is not None
    return best


def _quiet() -> warnings.catch_warnings[None]:
    """Without a warning for each character that the font lacks; it is drawn as a small box."""
    return warnings.catch_warnings(action="ignore", category=UserWarning)
