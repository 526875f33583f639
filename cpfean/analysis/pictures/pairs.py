"""Draws an image and a caption as the alignment sees them: boxes by gates, words as named."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cpfean.analysis.colours import COLOURS
from cpfean.analysis.pair_views import PairView
from cpfean.analysis.pictures.sheet import (
    GAP,
    GREY,
    MARGIN,
    PALE,
    PANEL,
    ROW,
    Box,
    Sheet,
    least_covering,
    read_photo,
)

_MOST_NAMED = 6  # regions of an image; more are a thicket
_LEAST_OPEN = 0.1  # gates below this have as good as no part in the score
_IMAGE_HEIGHT = 4.7  # at most; in inches, as all lengths
_BARS_HEIGHT = 1.7  # of the gates as bars
_LINE_HEIGHT = 0.29  # of words


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One column of a picture.

    Attributes:
        title: what the pair is.
        view: the pair.
        photo: the image's file; None draws an empty frame.
    """

    title: str
    view: PairView
    photo: Path | None = None


def lay_out_panels(panels: Sequence[Panel], *, heading: str) -> Sheet:
    """Pairs side by side: image, caption, and the regions whose gates are widest.

    Args:
        panels: at least one.
        heading: a line above all.

    Raises:
        DataError: a photograph that cannot be read.
    """
    width = 2 * MARGIN + len(panels) * PANEL + (len(panels) - 1) * GAP
    ruler = Sheet(width, 1)
    views = [panel.view for panel in panels]
    words = [_word_boxes(ruler, view.words) for view in views]
    photos = [None if panel.photo is None else read_photo(panel.photo) for panel in panels]
    frames = [_image_frame(view, photo) for view, photo in zip(views, photos, strict=True)]
    heads = ruler.wrapped(heading, width - 2 * MARGIN, size=12, bold=True)
    legend = ruler.wrapped(_legend(views), width - 2 * MARGIN, size=8)
    heights = (
        0.13 + 0.23 * len(heads),
        0.56,
        0.14 + max(frame.height for frame in frames),
        0.1 + max(boxes[-1].y for boxes in words) + _LINE_HEIGHT,
        0.12 + ROW * max(len(numbered(view)) for view in views),
    )
    tops = np.cumsum([MARGIN, *heights])

    sheet = Sheet(width, tops[-1] + 0.17 * len(legend) + MARGIN)
    sheet.write_lines(heads, tops[0], height=0.23, size=12, bold=True)
    sheet.write_lines(legend, tops[-1], height=0.17, size=8, color=GREY)
    low, high = shade_range(views)
    for column, (panel, colours) in enumerate(zip(panels, word_colours(views), strict=True)):
        view, x = panel.view, MARGIN + column * (PANEL + GAP)
        _write_title(sheet, panel, x, tops[1])
        frame = frames[column].moved(x, tops[2])
        if view.boxes is None:
            _draw_bars(sheet, view, colours, frame)
        else:
            _draw_boxes(sheet, view, colours, frame, photo=photos[column])
        shades = word_shades(view, low=low, high=high)
        boxes = [box.moved(x, tops[3]) for box in words[column]]
        _write_words(sheet, view, boxes, shades, colours)
        _list_regions(sheet, view, colours, x, tops[4])
    return sheet


def numbered(view: PairView) -> list[int]:
    """Positions of the regions that a picture names: those with the widest gates that are open."""
    widest = view.widest(_MOST_NAMED)
    return [region for region in widest if view.gates[region] >= _LEAST_OPEN] or widest[:1]


def word_colours(views: Sequence[PairView]) -> list[dict[int, str]]:
    """For each view the colours of the words that its numbered regions say.

    A word has one colour in all views of one caption, as long as there are enough.
    """
    result: list[dict[int, str]] = []
    shared: dict[int, str] = {}
    for number, view in enumerate(views):
        said = list(dict.fromkeys(int(view.prominent[region]) for region in numbered(view)))
        other_caption = number > 0 and view.caption != views[number - 1].caption
        if other_caption or len({*shared, *said}) > len(COLOURS):
            shared = {}
        for word in said:
            shared.setdefault(word, COLOURS[len(shared)])
        result.append({word: shared[word] for word in said})
    return result


def shade_range(views: Sequence[PairView]) -> tuple[float, float]:
    """What is palest and what is darkest, as multiples of a caption's mean.

    At least from 0.75 to 1.5: words named all but alike must not look different.
    """
    relative = np.concatenate([view.named * len(view.words) for view in views])
    return min(0.75, float(relative.min())), max(1.5, float(relative.max()))


def word_shades(view: PairView, *, low: float, high: float) -> list[float]:
    """How dark each word is, from 0 to 1, for what is named in that range."""
    relative = view.named * len(view.words)
    return [float(value) for value in (relative - low) / (high - low)]


def shade(darkness: float) -> tuple[float, float, float]:
    """The colour behind a word, from almost white to orange: as even to the eye as black allows."""
    return (1 - 0.02 * darkness, 0.975 - 0.375 * darkness, 0.94 - 0.74 * darkness)


def _write_title(sheet: Sheet, panel: Panel, x: float, top: float) -> None:
    view = panel.view
    title = sheet.shortened(panel.title, PANEL, size=10, bold=True)
    sheet.write(x, top + 0.1, title, size=10, bold=True)
    scores = f"score {view.score:.3f} (of the fragments {view.fragment_score:.3f})"
    sheet.write(x + PANEL, top + 0.32, scores, size=9, color=GREY, ha="right")
    left = PANEL - 0.15 - sheet.width_of(scores, size=9)
    name = sheet.shortened(view.image_id, left, size=9)
    sheet.write(x, top + 0.32, name, size=9, color=GREY)


def _write_words(
    sheet: Sheet,
    view: PairView,
    boxes: Sequence[Box],
    shades: Sequence[float],
    colours: dict[int, str],
) -> None:
    """The caption; what the numbered regions say is underlined."""
    for word, at in enumerate(boxes):
        sheet.rectangle(at, facecolor=shade(shades[word]), linewidth=0)
        text = sheet.shortened(view.words[word], PANEL - 0.1, size=10)
        sheet.write(at.x + at.width / 2, at.y + 0.11, text, size=10, ha="center")
        if word in colours:
            under = Box(at.x, at.y + at.height - 0.035, at.width, 0.035)
            sheet.rectangle(under, facecolor=colours[word], linewidth=0)


def _word_boxes(sheet: Sheet, words: Sequence[str]) -> list[Box]:
    """Where the words of a caption go, in lines as wide as a panel."""
    x, y, boxes = 0.0, 0.0, []
    for word in words:
        width = min(PANEL, sheet.width_of(word, size=10) + 0.1)
        if x and x + width > PANEL:
            x, y = 0.0, y + _LINE_HEIGHT
        boxes.append(Box(x, y, width, _LINE_HEIGHT - 0.04))
        x += width + 0.05
    return boxes


def _image_frame(view: PairView, photo: np.ndarray | None) -> Box:
    """Where the image goes; boxes are fractions of it, so a photograph keeps its proportions."""
    if view.boxes is None:
        return Box(0, 0, PANEL, _BARS_HEIGHT)
    aspect = view.aspect if photo is None else photo.shape[1] / photo.shape[0]
    width = min(PANEL, _IMAGE_HEIGHT * aspect)
    return Box(0, 0, width, width / aspect)


def _draw_boxes(
    sheet: Sheet,
    view: PairView,
    colours: dict[int, str],
    frame: Box,
    *,
    photo: np.ndarray | None,
) -> None:
    """Boxes, wide gates last; the widest are numbered and named, where there is room."""
    from matplotlib.patheffects import withStroke

    assert view.boxes is not None
    sheet.rectangle(frame, facecolor="#F6F6F6", edgecolor=PALE, linewidth=0.8, zorder=0)
    if photo is not None:
        sheet.photograph(photo, frame)
    chosen = numbered(view)
    on_sheet = [_on_sheet(box, frame) for box in view.boxes]
    for region in reversed(view.widest(len(view.gates))):
        gate, at = float(view.gates[region]), on_sheet[region]
        named = region in chosen
        colour = "#8C8C8C" if photo is None else "white"
        if named:
            colour = colours[int(view.prominent[region])]
        if named:
            sheet.rectangle(at, facecolor=colour, alpha=0.11 * gate, linewidth=0, zorder=2)
        width = 0.5 + 2.3 * gate if named else 0.4 + 0.6 * gate
        halo = [withStroke(linewidth=width + 1.6, foreground="white", alpha=0.7)]
        sheet.rectangle(
            at,
            fill=False,
            edgecolor=colour,
            linewidth=width,
            alpha=0.25 + 0.75 * gate if named else 0.15 + 0.35 * gate,
            zorder=4 if named else 3,
            path_effects=halo if named and photo is not None else None,
        )
    taken: list[Box] = []
    for number, region in enumerate(chosen, start=1):
        names = [str(number)]
        if view.labels is not None:
            names.insert(0, f"{number} {view.labels[region].split(',')[0]}")
        for name in names:
            width = sheet.width_of(name, size=8, bold=True) + 0.1
            candidates = _tag_boxes(on_sheet[region], width, 0.17, inside=frame)
            at = least_covering(candidates, taken)
            if not any(at.overlap(other) for other in taken):
                break
        taken.append(at)
        sheet.tag(at, name, colour=colours[int(view.prominent[region])], size=8)


def _on_sheet(box: np.ndarray, frame: Box) -> Box:
    """A region's box, whose corners are fractions of the frame, in inches."""
    x1, y1, x2, y2 = (float(fraction) for fraction in box)
    return Box(
        frame.x + x1 * frame.width,
        frame.y + y1 * frame.height,
        (x2 - x1) * frame.width,
        (y2 - y1) * frame.height,
    )


def _tag_boxes(box: Box, width: float, height: float, *, inside: Box) -> Iterable[Box]:
    """Where a tag on a box may go: its corners, then along its edges, all within the frame."""
    right, bottom = box.x + box.width - width, box.y + box.height - height
    corners = [(box.x, box.y), (right, box.y), (box.x, bottom), (right, bottom)]
    steps = np.linspace(0, 1, 9)[1:-1]
    along = [(box.x + s * (right - box.x), y) for s in steps for y in (box.y, bottom)]
    along += [(x, box.y + s * (bottom - box.y)) for s in steps for x in (box.x, right)]
    for x, y in (*corners, *along):
        yield Box(
            min(max(x, inside.x), inside.x + inside.width - width),
            min(max(y, inside.y), inside.y + inside.height - height),
            width,
            height,
        )


def _draw_bars(sheet: Sheet, view: PairView, colours: dict[int, str], frame: Box) -> None:
    """The gates as bars in the order of the regions, for images whose boxes are not known."""
    chosen = numbered(view)
    left, bottom, tall = frame.x + 0.3, frame.y + frame.height - 0.2, frame.height - 0.45
    step = (frame.x + frame.width - left) / len(view.gates)
    for gate in (0.0, 0.5, 1.0):
        y = bottom - gate * tall
        line = Box(left, y, frame.x + frame.width - left, 0.0)
        sheet.rectangle(line, edgecolor="#DDDDDD", linewidth=0.7, zorder=0)
        sheet.write(left - 0.06, y, f"{gate:g}", size=8, color=GREY, ha="right")
    for region, gate in enumerate(view.gates):
        at = Box(
            left + (region + 0.12) * step, bottom - float(gate) * tall, 0.76 * step, gate * tall
        )
        named = region in chosen
        colour = colours[int(view.prominent[region])] if named else PALE
        sheet.rectangle(at, facecolor=colour, linewidth=0)
        if named:
            number = str(chosen.index(region) + 1)
            middle = at.x + at.width / 2
            sheet.write(middle, at.y - 0.09, number, size=8, bold=True, color=colour, ha="center")
    told = f"gates of regions {view.regions[0]} to {view.regions[-1]}"
    sheet.write(left, bottom + 0.12, told, size=8, color=GREY)


def _list_regions(
    sheet: Sheet, view: PairView, colours: dict[int, str], x: float, top: float
) -> None:
    """The numbered regions: gate, label, and the word each says."""
    for number, region in enumerate(numbered(view)):
        y, word = top + number * ROW, int(view.prominent[region])
        gate, colour = float(view.gates[region]), colours[word]
        sheet.tag(Box(x, y + 0.02, 0.19, 0.18), str(number + 1), colour=colour, size=8)
        sheet.rectangle(Box(x + 0.27, y + 0.06, 0.75, 0.1), facecolor="#EBEBEB", linewidth=0)
        sheet.rectangle(Box(x + 0.27, y + 0.06, 0.75 * gate, 0.1), facecolor=colour, linewidth=0)
        middle = y + 0.11
        sheet.write(x + 1.09, middle, f"{gate:.2f}", size=9, color=GREY)
        name = f"region {view.regions[region]}" if view.labels is None else view.labels[region]
        said = sheet.shortened(view.words[word], 1.5, size=9, bold=True)
        left = PANEL - 2.0 - sheet.width_of(said, size=9, bold=True)
        name = sheet.shortened(name.split(",")[0], left, size=9)
        sheet.write(x + 1.45, middle, name, size=9)
        end = x + 1.45 + sheet.width_of(name, size=9) + 0.1
        sheet.write(end, middle, "says", size=9, color=GREY)
        end += sheet.width_of("says", size=9) + 0.07
        sheet.write(end, middle, said, size=9, bold=True, color=colour)


def _legend(views: Sequence[PairView]) -> str:
    low, high = shade_range(views)
    boxes = views[0].boxes is not None
    shown = "A box is as strong as its gate is open" if boxes else "A bar is as high as its gate"
    return (
        f"{shown}; the widest, {_MOST_NAMED} at most, are numbered, in the colour of the word that "
        f"the region says, which is underlined. A word is the darker "
        f"the more open gates name it, from {low:.2f} to {high:.2f} times the mean of its caption."
    )
