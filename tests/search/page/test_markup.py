"""What the page shows: every text is text, every number is where it belongs."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import numpy as np
import pytest

from cpfean.analysis.pair_views import PairView, ShownImage
from cpfean.search.hits import Hit, Hits
from cpfean.search.page import markup
from cpfean.search.page.markup import Card
from cpfean.search.page.photos import Picture
from cpfean.search.searcher import Searcher

NASTY = '"><script>alert(1)</script><img src=x onerror=alert(2)> {{7*7}} ${alert(3)} `\\'
PICTURE = Picture(url="data:image/jpeg;base64,AAAA", width=200, height=100)


class Page(HTMLParser):
    """Elements and texts, as a browser would have them."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [found for name, found in self.elements if name == tag]


def hits(count: int, *, text: str = "a dog", total: int = 50, scored: int = 50) -> Hits:
    found = [
        Hit(rank=place + 1, score=0.5 - place / 100, position=place, text=text, image_id=text)
        for place in range(count)
    ]
    return Hits(found, total=total, scored=scored, seconds=0.123)


def view(text: str = "dog") -> PairView:
    return PairView(
        image=0,
        caption=None,
        image_id=text,
        is_match=None,
        score=0.4,
        fragment_score=0.5,
        words=["a", text],
        named=np.array([0.25, 0.75]),
        regions=np.array([0, 2, 3]),
        gates=np.array([0.95, 0.02, 0.5]),
        prominent=np.array([1, 0, 1]),
        boxes=np.array([[0.1, 0.2, 0.5, 0.6], [0, 0, 1, 1], [0.5, 0.5, 0.75, 1]]),
        labels=[text, "sky", "grass,lawn"],
        aspect=2.0,
    )


def nasty_image() -> ShownImage:
    boxes = np.array([[0.1, 0.2, 0.5, 0.6]])
    return ShownImage(name=NASTY, position=0, boxes=boxes, labels=[NASTY], aspect=1.5)


@pytest.mark.parametrize(
    "html",
    [
        markup.problem(NASTY),
        markup.cards([Card(rank=1, score=0.5, shown=nasty_image(), picture=None)], side=0),
        markup.cards([Card(rank=1, score=0.5, shown=nasty_image(), picture=PICTURE)], side=0),
        markup.caption_list(hits(2, text=NASTY), side=1, image_id=NASTY),
        markup.beside(nasty_image(), PICTURE, ""),
        markup.image_alone(nasty_image(), None, place="", note=NASTY),
        markup.pair(view(NASTY), PICTURE, place="rank 1", unknown=[NASTY]),
        markup.pair(view(NASTY), None, place="rank 1"),
        markup.columns(["", ""], names=[NASTY, "b"]),
    ],
)
def test_texts_of_data_and_visitors_are_nothing_but_text(html: str) -> None:
    page = Page(html)
    assert not page.all("script")
    assert all(
        image.get("src", "").startswith("data:image/jpeg;base64,") for image in page.all("img")
    )
    assert not any(name.startswith("on") for _, attributes in page.elements for name in attributes)
    # Gradio's own templates find nothing to fill in.
    assert not re.search(r"[{}$`\\]", html)
    attributes = [value for _, found in page.elements for value in found.values() if value]
    assert any(NASTY in text for text in [*page.texts, *attributes])


def test_a_long_text_is_cut() -> None:
    (text,) = Page(markup.problem("x" * 10_000)).texts
    assert len(text) < 500


def test_a_card_says_which_hit_of_which_model_it_is() -> None:
    shown = nasty_image()
    found = [Card(rank=rank, score=0.5, shown=shown, picture=PICTURE) for rank in (1, 2, 3)]
    buttons = Page(markup.cards(found, side=1)).all("button")
    assert [(one["data-side"], one["data-hit"]) for one in buttons] == [
        ("1", "0"),
        ("1", "1"),
        ("1", "2"),
    ]
    assert all(one["type"] == "button" and one["aria-label"] for one in buttons)


def test_captions_of_the_image_itself_are_marked() -> None:
    html = markup.caption_list(hits(3, text="a dog"), side=0, image_id="a dog")
    assert html.count("written for it") == 3
    assert "written for it" not in markup.caption_list(hits(3), side=0, image_id=None)


def test_a_pair_shows_the_open_regions_their_gates_and_what_they_say() -> None:
    page = Page(markup.pair(view(), PICTURE, place="rank 3 of 50", unknown=["a"]))
    text = " ".join(page.texts)
    assert "rank 3 of 50" in text
    assert "score 0.400" in text
    rows = [row for row in page.all("tr") if "data-region" in row]
    marks = [mark for mark in page.all("span") if mark.get("class") == "mark"]
    assert len(rows) == len(marks) == 2, "the closed region is not among them"
    assert "0.95" in text
    assert "0.02" not in text
    assert "left:10.00%;top:20.00%;width:40.00%;height:40.00%" in str(marks[-1]["style"])
    assert "grass" in text
    assert "lawn" not in text
    unknown = [span for span in page.all("span") if span.get("class") == "unknown"]
    assert len(unknown) == 1
    assert "2 of 3 regions" in text


def test_a_photograph_keeps_its_shape_and_is_not_blown_up() -> None:
    small = Picture(url="data:image/jpeg;base64,AAAA", width=160, height=80)
    frame = str(Page(markup.pair(view(), small, place="")).all("div")[1]["style"])
    assert "aspect-ratio:2.0000" in frame
    assert "width:min(100%,400px,calc(70vh*2.0000))" in frame
    large = Picture(url="data:image/jpeg;base64,AAAA", width=1024, height=512)
    assert "640px" in str(Page(markup.pair(view(), large, place="")).all("div")[1]["style"])


def test_it_is_told_whether_every_one_was_scored() -> None:
    assert "All 50 images scored, in 0.12 s." in markup.told(hits(3), what="images")
    some = markup.told(hits(3, total=1_000_000, scored=200), what="images")
    assert "A shortlist of 200 of 1,000,000 images" in some


def test_unknown_words_and_what_was_cut_are_told(searcher: Searcher) -> None:
    told = markup.told(searcher.images("a 狗 dog"), what="images")
    assert "<b>狗</b>" in told
    assert "words were read" not in told
    cut = searcher.images("a dog " * 500)
    assert cut.sentence is not None
    assert f"first {len(cut.sentence.words)} words were read" in markup.told(cut, what="images")


def test_the_model_that_did_not_find_it_says_so() -> None:
    found = hits(3)
    assert markup.placed(found[1], found) == "rank 2 of 50"
    assert markup.placed(None, found) == "not among the first 3"
