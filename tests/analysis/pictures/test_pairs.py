"""What is on a page of pairs before it is a picture: boxes, colours, shades and texts."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.colors import to_hex
from matplotlib.image import imsave
from matplotlib.patches import Rectangle

from cpfean.analysis.colours import COLOURS
from cpfean.analysis.pair_views import PairView
from cpfean.analysis.pictures.pairs import (
    Panel,
    lay_out_panels,
    numbered,
    shade_range,
    word_colours,
    word_shades,
)
from cpfean.analysis.pictures.sheet import Box, Sheet
from cpfean.errors import DataError

WORDS = ["a", "dog", "that", "costs", "$5", "or", "$6"]


def view(**changes: Any) -> PairView:
    """Four regions of a caption of seven words; three gates are open."""
    plain = PairView(
        image=3,
        caption=16,
        image_id="3.jpg",
        is_match=True,
        score=0.4,
        fragment_score=0.3,
        words=WORDS,
        named=np.array([0.1, 0.3, 0.05, 0.05, 0.2, 0.1, 0.2]),
        regions=np.arange(4),
        gates=np.array([0.5, 0.01, 0.9, 0.2]),
        prominent=np.array([1, 0, 1, 4]),
        boxes=np.array([[0, 0, 0.5, 0.5], [0, 0, 1, 1], [0.2, 0.4, 0.9, 0.8], [0.5, 0, 1, 1]]),
        labels=["dog", "sky", "puppy, whelp", "price tag"],
        aspect=1.5,
    )
    return replace(plain, **changes)


def texts(sheet: Sheet) -> list[str]:
    return [text.get_text() for text in sheet.page.texts]


def outlines(sheet: Sheet) -> list[Rectangle]:
    return [p for p in sheet.page.patches if isinstance(p, Rectangle) and not p.get_fill()]


def test_regions_are_numbered_by_their_gates_and_only_if_these_are_open() -> None:
    assert numbered(view()) == [2, 0, 3]
    assert len(numbered(view(gates=np.array([0.5, 0.6, 0.7, 0.8])))) == 4
    many = view(gates=np.linspace(0.5, 1, 30))
    assert numbered(many) == list(range(29, 23, -1))
    assert numbered(view(gates=np.array([0.01, 0.03, 0.02, 0.0]))) == [1]


@given(parts=st.lists(st.floats(0.01, 1), min_size=2, max_size=20))
def test_the_more_gates_name_a_word_the_darker_it_is(parts: list[float]) -> None:
    named = np.array(parts) / sum(parts)
    seen = view(words=["w"] * len(parts), named=named)
    low, high = shade_range([seen])
    shades = word_shades(seen, low=low, high=high)
    assert min(shades) >= 0
    assert max(shades) <= 1
    for (one, part), (other, other_part) in combinations(zip(shades, named, strict=True), 2):
        assert (one > other) == (part > other_part)


def test_words_named_alike_look_alike_in_all_pictures() -> None:
    alike = view(named=np.full(7, 1 / 7))
    shades = word_shades(alike, low=shade_range([alike])[0], high=shade_range([alike])[1])
    assert shades == pytest.approx([1 / 3] * 7)


def test_a_word_has_one_colour_in_all_views_of_a_caption() -> None:
    first, second = view(), view(image=9, prominent=np.array([4, 0, 1, 2]))
    one, other = word_colours([first, second])
    assert set(one) == {1, 4}
    assert set(other) == {1, 4, 2}
    assert (one[1], one[4]) == (other[1], other[4])
    assert len(set(other.values())) == 3
    assert set(one.values()) <= set(COLOURS)
    # Another caption's words have nothing to do with these.
    unrelated = word_colours([first, view(caption=17, prominent=np.array([5, 0, 6, 5]))])[1]
    assert unrelated == {6: COLOURS[0], 5: COLOURS[1]}


def test_colours_start_anew_when_there_are_not_enough() -> None:
    words = [f"w{n}" for n in range(12)]
    gates = np.ones(6)
    views = [
        view(words=words, gates=gates, prominent=np.arange(6) + start, named=np.ones(12) / 12)
        for start in (0, 6)
    ]
    for colours in word_colours(views):
        assert len(set(colours.values())) == 6


def test_the_boxes_drawn_are_the_images_and_as_strong_as_their_gates() -> None:
    seen = view()
    assert seen.boxes is not None
    sheet = lay_out_panels([Panel(title="t", view=seen)], heading="h")
    (frame,) = (p for p in sheet.page.patches if to_hex(p.get_facecolor()) == "#f6f6f6")
    assert frame.get_width() / frame.get_height() == pytest.approx(seen.aspect)
    scale = np.array([frame.get_width(), frame.get_height()])
    drawn = {tuple(np.round(o.get_bbox().extents, 3)): o for o in outlines(sheet)}
    widths = []
    for box in seen.boxes[np.argsort(seen.gates)]:
        corners = np.concatenate([box[:2] * scale, box[2:] * scale]) + [*frame.get_xy()] * 2
        widths.append(drawn[tuple(np.round(corners, 3))].get_linewidth())
    assert len(drawn) == 4
    assert widths == sorted(widths)
    assert len(set(widths)) == 4
    written = texts(sheet)
    assert {"1 puppy", "2 dog", "3 price tag"} <= set(written)
    assert "2 sky" not in written
    assert written.count("says") == 3


def test_the_caption_is_written_in_order_shaded_and_underlined() -> None:
    sheet = lay_out_panels([Panel(title="t", view=view())], heading="h $x$")
    written = texts(sheet)
    start = written.index("a")
    assert written[start : start + 7] == WORDS  # no dollar sign starts a formula
    assert not any(text.get_parse_math() for text in sheet.page.texts)
    plates = [p for p in sheet.page.patches if abs(p.get_height() - 0.25) < 1e-6]
    darkness = [1 - float(np.mean(p.get_facecolor()[:3])) for p in plates]
    assert (
        np.argsort(darkness, kind="stable").tolist()
        == np.argsort(view().named, kind="stable").tolist()
    )
    lines = [p for p in sheet.page.patches if abs(p.get_height() - 0.035) < 1e-6]
    assert [to_hex(p.get_facecolor()).upper() for p in lines] == [COLOURS[0], COLOURS[1]]


def test_nothing_that_is_written_leaves_the_page_or_covers_other_text() -> None:
    long = ["supercalifragilisticexpialidocious" * 3, *("word" for _ in range(40))]
    wide = view(
        words=long,
        named=np.full(41, 1 / 41),
        labels=["a name of many words that go on", "b", "c", "d"],
        image_id="i" * 99,
        prominent=np.array([0, 0, 0, 0]),
    )
    panels = [Panel(title="t" * 99, view=wide), Panel(title="u", view=view())]
    sheet = lay_out_panels(panels, heading="one heading " * 20)
    page = Box(0, 0, sheet.width, sheet.height)
    boxes = []
    for text in sheet.page.texts:
        at = text.get_window_extent().transformed(sheet.page.transData.inverted())
        boxes.append(Box(min(at.x0, at.x1), min(at.y0, at.y1), at.width, abs(at.height)))
    for box, text in zip(boxes, texts(sheet), strict=True):
        assert box.overlap(page) == pytest.approx(box.width * box.height), text
    for (one, a), (other, b) in combinations(zip(boxes, texts(sheet), strict=True), 2):
        assert one.overlap(other) < 0.003, (a, b)


def test_without_boxes_the_gates_are_bars_and_without_labels_regions_are_numbers() -> None:
    bare = view(boxes=None, labels=None, regions=np.array([0, 2, 5, 7]))
    sheet = lay_out_panels([Panel(title="t", view=bare)], heading="h")
    assert {"region 5", "region 0", "region 7"} <= set(texts(sheet))
    assert "region 2" not in texts(sheet)
    bars = [p for p in sheet.page.patches if abs(p.get_width() - 0.76 * 4.4 / 4) < 1e-6]
    heights = np.array([bar.get_height() for bar in bars])
    np.testing.assert_allclose(heights / heights.max(), bare.gates / bare.gates.max())


def test_a_photograph_fills_the_frame_in_its_own_proportions(tmp_path: Path) -> None:
    imsave(tmp_path / "3.png", np.zeros((30, 90, 3)))
    photo = tmp_path / "3.png"
    sheet = lay_out_panels([Panel(title="t", view=view(), photo=photo)], heading="h")
    (image,) = sheet.page.images
    x1, x2, bottom, top = image.get_extent()
    assert (x2 - x1) / (bottom - top) == pytest.approx(3)


def test_a_photograph_that_is_none_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "3.jpg").write_text("no photograph")
    panel = Panel(title="t", view=view(), photo=tmp_path / "3.jpg")
    with pytest.raises(DataError, match=r"3\.jpg: not an image"):
        lay_out_panels([panel], heading="h")


def test_the_same_data_make_the_same_file(tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        lay_out_panels([Panel(title="t", view=view())], heading="h").save(tmp_path / "new" / name)
    files = sorted((tmp_path / "new").iterdir())
    assert [file.name for file in files] == ["a.png", "b.png"]
    assert files[0].read_bytes() == files[1].read_bytes()
