"""What the page shows, as HTML: cards, captions, and a pair with its regions and words.

Every text that comes from data or from a visitor goes through `escaped`.
"""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from cpfean.analysis.pair_views import PairView, ShownImage
from cpfean.analysis.pictures.pairs import numbered, shade, shade_range, word_colours, word_shades
from cpfean.analysis.pictures.sheet import Box, least_covering
from cpfean.search.hits import Hit, Hits
from cpfean.search.page.photos import Picture

_LABELS = 4  # objects that are named below an image without photograph
_OPEN = 0.1  # gates below this have as good as no part in the score
_BLOWN_UP = 2.5  # at most, of a small photograph
_LARGEST, _SMALLEST = 640, 320  # CSS pixels of a photograph's width; a window may be narrower
# About what a number takes of a photograph.
_TAG = _TAG_WIDTH, _TAG_HEIGHT = 0.065, 0.065
_LONGEST = 400  # characters of a text that are shown
# Gradio's component makes its HTML with templates: none of their signs may come from data.
_SIGNS = str.maketrans({"{": "&#123;", "}": "&#125;", "$": "&#36;", "`": "&#96;", "\\": "&#92;"})


@dataclass(frozen=True, kw_only=True)
class Card:
    """A hit that is an image.

    Attributes:
        rank, score: of the hit.
        shown: the image.
        picture: its photograph; None draws its regions.
    """

    rank: int
    score: float
    shown: ShownImage
    picture: Picture | None


def escaped(text: str) -> str:
    """A text that is nothing but text, in HTML and in its attributes."""
    short = text if len(text) <= _LONGEST else f"{text[:_LONGEST]} ..."
    return html.escape(short, quote=True).translate(_SIGNS)


def told(hits: Hits, *, what: str, before: float = 0.0) -> str:
    """How something was found, in a line or three.

    Args:
        hits: what was found.
        what: "images" or "captions".
        before: seconds that a photograph's regions took.
    """
    if hits.is_exact:
        how = f"All {hits.total:,} {what} scored"
    else:
        how = f"A shortlist of {hits.scored:,} of {hits.total:,} {what} scored, the others were not"
    parts = [f"{how}, in {hits.seconds:.2f} s."]
    if before:
        parts.append(f"Its regions took {before:.1f} s.")
    read = hits.sentence
    if read is not None and read.unknown:
        words = ", ".join(f"<b>{escaped(word)}</b>" for word in read.unknown[:8])
        more = " and others" if len(read.unknown) > 8 else ""
        parts.append(f"Not in the model's vocabulary, and read as one unknown word: {words}{more}.")
    if read is not None and read.is_cut:
        parts.append(f"Only the first {len(read.words)} words were read.")
    return f'<p class="told">{" ".join(parts)}</p>'


def problem(message: str) -> str:
    """Why there is no answer."""
    return f'<p class="problem" role="alert">{escaped(message)}</p>'


def columns(parts: Sequence[str], *, names: Sequence[str], answer: int = 0) -> str:
    """Parts side by side, under the names of their models if there are several.

    Args:
        parts: of each model.
        names: of the models.
        answer: number of the answer that they are, which goes back with a click; 0 for none.
    """
    if len(parts) == 1:
        return f'<div class="search" data-answer="{answer}">{parts[0]}</div>'
    each = "".join(
        f'<section class="model"><h3>{escaped(name)}</h3>{part}</section>'
        for name, part in zip(names, parts, strict=True)
    )
    return f'<div class="search models" data-answer="{answer}">{each}</div>'


def cards(found: Sequence[Card], *, side: int) -> str:
    """Images to be chosen from, as buttons.

    Args:
        found: the best first.
        side: which model found them, from 0.
    """
    return f'<ol class="cards">{"".join(_card(card, side) for card in found)}</ol>'


def caption_list(hits: Hits, *, side: int, image_id: str | None) -> str:
    """Captions to be chosen from, as buttons.

    Args:
        hits: the best first.
        side: which model found them, from 0.
        image_id: the image that they were found for, whose own ones are marked.
    """
    rows = []
    for number, hit in enumerate(hits):
        own = '<span class="own">written for it</span>' if hit.image_id == image_id else ""
        rows.append(
            f'<li><button type="button" data-side="{side}" data-hit="{number}">'
            f'<span class="rank">{hit.rank}</span><span class="text">{escaped(hit.text)}</span>'
            f'{own}<span class="score">{hit.score:.3f}</span></button></li>'
        )
    return f'<ol class="captions">{"".join(rows)}</ol>'


def beside(shown: ShownImage, picture: Picture | None, lists: str) -> str:
    """An image, and what was found for it."""
    frame = _frame(shown.aspect, shown.boxes, picture, name=shown.name, marks="")
    return (
        f'<div class="for-image"><figure>{frame}<figcaption>{escaped(shown.name)}</figcaption>'
        f"</figure><div>{lists}</div></div>"
    )


def image_alone(shown: ShownImage, picture: Picture | None, *, place: str, note: str) -> str:
    """An image with all its regions, where a model has nothing else to show, and why.

    Args:
        shown: the image.
        picture: its photograph.
        place: its place among what was found, as `placed` says it.
        note: why there is no more.
    """
    frame = _frame(shown.aspect, shown.boxes, picture, name=shown.name, marks="")
    return (
        f'<div class="pair"><figure>{frame}<figcaption><b>{escaped(shown.name)}</b><br>'
        f'{place}</figcaption></figure><div class="explained"><p>{escaped(note)}</p></div></div>'
    )


def placed(hit: Hit | None, hits: Hits) -> str:
    """The rank that a model gave, or that it did not find it."""
    if hit is None:
        return f"not among the first {len(hits)}"
    return f"rank {hit.rank} of {hits.total:,}"


def pair(
    view: PairView, picture: Picture | None, *, place: str, unknown: Sequence[str] = ()
) -> str:
    """An image and a caption as the model sees them.

    Args:
        view: of both.
        picture: the photograph; None draws the regions alone.
        place: of the image or caption among what was found, as `placed` says it.
        unknown: words that the vocabulary does not know.
    """
    chosen, (colours,) = numbered(view), word_colours([view])
    marks = [] if view.boxes is None else _marks(view, view.boxes, chosen, colours)
    frame = _frame(view.aspect, view.boxes, picture, name=view.image_id, marks="".join(marks))
    return (
        f'<div class="pair"><figure>{frame}<figcaption><b>{escaped(view.image_id)}</b><br>{place}'
        f"<br>score {view.score:.3f}, of the fragments {view.fragment_score:.3f}</figcaption>"
        "</figure>"
        f'<div class="explained">{_words(view, colours, unknown)}'
        f"{_regions(view, chosen, colours)}{_legend(view, chosen)}</div></div>"
    )


def _card(card: Card, side: int) -> str:
    name = escaped(card.shown.name)
    objects = ""
    if card.picture is not None:
        shape = f'<img src="{card.picture.url}" alt="">'
    else:
        shape = f'<span class="drawn">{_outline(card.shown.boxes)}</span>'
        first = list(dict.fromkeys(label for label in card.shown.labels or () if label))[:_LABELS]
        objects = f'<span class="objects">{escaped(", ".join(first))}</span>' if first else ""
    return (
        f'<li><button type="button" data-side="{side}" data-hit="{card.rank - 1}" '
        f'aria-label="rank {card.rank}, score {card.score:.3f}, {name}" title="{name}">'
        f'<span class="shape">{shape}</span><span class="line"><span class="rank">{card.rank}'
        f'</span><span class="score">{card.score:.3f}</span></span>{objects}</button></li>'
    )


def _frame(
    aspect: float,
    boxes: Float[np.ndarray, "region 4"] | None,
    picture: Picture | None,
    *,
    name: str,
    marks: str,
) -> str:
    """The photograph with boxes over it, no larger than it deserves and the window has room for."""
    width: float = _LARGEST
    if picture is not None:
        aspect = picture.width / picture.height
        width = min(_LARGEST, max(_SMALLEST, _BLOWN_UP * picture.width))
    seen = f'<img src="{picture.url}" alt="{escaped(name)}">' if picture else ""
    drawn = "" if picture else " drawn"
    faint = f'<span class="faint{" over" if picture else ""}">{_outline(boxes)}</span>'
    return (
        f'<div class="frame{drawn}" style="aspect-ratio:{aspect:.4f};'
        f'width:min(100%,{width:.0f}px,calc(70vh*{aspect:.4f}))">{seen}{faint}{marks}</div>'
    )


def _outline(boxes: Float[np.ndarray, "region 4"] | None) -> str:
    """All boxes as thin lines."""
    if boxes is None:
        return '<span class="blank">no photograph and no boxes</span>'
    shapes = "".join(
        f'<rect x="{x1:.4f}" y="{y1:.4f}" width="{x2 - x1:.4f}" height="{y2 - y1:.4f}"/>'
        for x1, y1, x2, y2 in boxes.tolist()
    )
    return (
        '<svg viewBox="0 0 1 1" preserveAspectRatio="none" aria-hidden="true" '
        f'focusable="false">{shapes}</svg>'
    )


def _marks(
    view: PairView,
    boxes: Float[np.ndarray, "region 4"],
    chosen: Sequence[int],
    colours: dict[int, str],
) -> list[str]:
    """The numbered regions' boxes, wide gates on top of others, and their numbers on top of all."""
    marks, tags = [], []
    taken: list[Box] = []
    for number, region in enumerate(chosen, start=1):
        x1, y1, x2, y2 = (float(share) for share in boxes[region])
        gate, colour = float(view.gates[region]), colours[int(view.prominent[region])]
        marks.append(
            f'<span class="mark" data-region="{number}" style="left:{100 * x1:.2f}%;'
            f"top:{100 * y1:.2f}%;width:{100 * (x2 - x1):.2f}%;height:{100 * (y2 - y1):.2f}%;"
            f'border-color:{colour};border-width:{1 + 2 * gate:.1f}px"></span>'
        )
        places = [(x, y) for y in (y1, y2 - _TAG_HEIGHT) for x in (x1, x2 - _TAG_WIDTH)]
        if x2 - x1 < 2 * _TAG_WIDTH or y2 - y1 < 2 * _TAG_HEIGHT:  # it would hide the box
            places = [(x1, y1 - _TAG_HEIGHT), (x1, y2), (x2, y1), (x1 - _TAG_WIDTH, y1), *places]
        at = least_covering(
            [
                Box(min(max(x, 0), 1 - _TAG_WIDTH), min(max(y, 0), 1 - _TAG_HEIGHT), *_TAG)
                for x, y in places
            ],
            taken,
        )
        taken.append(at)
        tags.append(
            f'<b class="tag" style="left:{100 * at.x:.2f}%;top:{100 * at.y:.2f}%;'
            f'{_plate(colour)}">{number}</b>'
        )
    return [*reversed(marks), *tags]


def _words(view: PairView, colours: dict[int, str], unknown: Sequence[str]) -> str:
    """The caption, words the darker the more gates name them, those that regions say underlined."""
    low, high = shade_range([view])
    spans = []
    for number, (word, darkness) in enumerate(
        zip(view.words, word_shades(view, low=low, high=high), strict=True)
    ):
        red, green, blue = (round(255 * part) for part in shade(darkness))
        under = colours.get(number, "transparent")
        kind = ' class="unknown"' if word in unknown else ""
        spans.append(
            f'<span{kind} title="named by {float(view.named[number]):.0%} of the gates" '
            f'style="background:rgb({red},{green},{blue});border-bottom-color:{under}">'
            f"{escaped(word)}</span>"
        )
    return f'<p class="words">{" ".join(spans)}</p>'


def _regions(view: PairView, chosen: Sequence[int], colours: dict[int, str]) -> str:
    rows = []
    for number, region in enumerate(chosen, start=1):
        word, gate = int(view.prominent[region]), float(view.gates[region])
        name = f"region {view.regions[region]}"
        if view.labels is not None:
            name = view.labels[region].split(",")[0]
        rows.append(
            f'<tr data-region="{number}"><td><b class="number" style="{_plate(colours[word])}">'
            f'{number}</b></td><td class="gate"><span style="width:{100 * gate:.0f}%;'
            f'background:{colours[word]}"></span></td><td>{gate:.2f}</td><td>{escaped(name)}</td>'
            f'<td><b style="border-color:{colours[word]}">{escaped(view.words[word])}</b></td></tr>'
        )
    return (
        '<table class="regions"><thead><tr><th></th><th>gate</th><th></th><th>region</th>'
        f"<th>says</th></tr></thead><tbody>{''.join(rows)}</tbody></table>"
    )


def _plate(colour: str) -> str:
    """Of a number on a colour, black or white, whichever is told apart better."""
    red, green, blue = (int(colour[start : start + 2], 16) for start in (1, 3, 5))
    ink = "#111" if 0.299 * red + 0.587 * green + 0.114 * blue > 130 else "#fff"
    return f"background:{colour};color:{ink}"


def _legend(view: PairView, chosen: Sequence[int]) -> str:
    low, high = shade_range([view])
    count = int((view.gates >= _OPEN).sum())
    return (
        f'<p class="legend">{count} of {len(view.gates)} regions have a gate of at least {_OPEN}; '
        f"the {len(chosen)} widest are numbered, in the colour of the word that each says, which "
        f"is underlined. A word is the darker the more open gates name it, from {low:.2f} to "
        f"{high:.2f} times the mean.</p>"
    )
