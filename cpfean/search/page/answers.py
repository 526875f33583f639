"""What the page answers: a question in, HTML out, and what was found kept for the next click.

Nothing here knows of Gradio. What a visitor sends is a text, a photograph's bytes, or a number
that counts among what the same visitor was shown last.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import itertools
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cpfean.errors import ConfigError, CpfeanError
from cpfean.photographs.decoding import decode_photograph
from cpfean.search.hits import EncodedImage, Hits
from cpfean.search.page import markup
from cpfean.search.page.markup import Card
from cpfean.search.page.photos import LARGE, THUMBNAIL, Photos, Picture, as_picture
from cpfean.search.searcher import Searcher

LARGEST_UPLOAD = 20 * 2**20  # bytes of a photograph


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What a visitor was shown last; the hits are those of each model.

    Attributes:
        sentence: that images were found for; None where an image was asked with.
        images: the one that captions were found for, as each model has it.
        picture: its photograph.
        hits: of each model.
        number: of the answer; a click on an older one that is still shown has another.
    """

    hits: tuple[Hits, ...]
    number: int
    sentence: str | None = None
    images: tuple[EncodedImage, ...] = ()
    picture: Picture | None = None


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What the page shows.

    Attributes:
        told: how it was found, or why not.
        found: what can be chosen from; empty where there is nothing.
        asked: what the next click is about; None where there is nothing to click.
    """

    told: str
    found: str = ""
    asked: Asked | None = None


class Answers:
    """One or two models over the same gallery, and its photographs.

    One question is answered at a time: a search has all cores to itself.

    Args:
        searchers: of the models.
        names: to call them by.
        photos: of the gallery.
        count: images or captions to find.
        shortlist: as in `Searcher.images`.

    Raises:
        ConfigError: two models over different galleries.
    """

    def __init__(
        self,
        searchers: Sequence[Searcher],
        *,
        names: Sequence[str],
        photos: Photos,
        count: int,
        shortlist: int | None,
    ) -> None:
        self.searchers = searchers
        self.names = names
        self.photos = photos
        self._count = count
        self._shortlist = shortlist
        self._alone = threading.Lock()
        self._answers = itertools.count(1)
        first, *others = (searcher.split for searcher in searchers)
        for other in others:
            if other.image_ids != first.image_ids or other.captions != first.captions:
                raise ConfigError(
                    f"the models must look at the same images and captions; {first.name} and "
                    f"{other.name} are not the same."
                )

    @property
    def has_captions(self) -> bool:
        """Whether an image can find captions."""
        return bool(self.searchers[0].split.num_captions)

    def prepare(self) -> None:
        """Does what only the first question waits for, before it is asked.

        Raises:
            CpfeanError: as the search for captions, which are encoded here.
        """
        for searcher in self.searchers:
            sentence = "a"
            if self.has_captions:
                sentence = searcher.split.captions[0]
                searcher.captions(searcher.image_at(0), k=1)
            with contextlib.suppress(CpfeanError):  # of a vocabulary that does not know it
                searcher.images(sentence, k=1, shortlist=1)

    def why_no_upload(self) -> str | None:
        """Why no photograph of one's own can be taken; None if it can."""
        try:
            for searcher in self.searchers:
                searcher.extractor  # noqa: B018, it is opened here
        except CpfeanError as error:
            return str(error)
        return None

    def images(self, sentence: str) -> Answer:
        """The images that a sentence finds."""
        try:
            with self._alone:
                hits = tuple(
                    searcher.images(sentence, k=self._count, shortlist=self._shortlist)
                    for searcher in self.searchers
                )
        except CpfeanError as error:
            return Answer(told=markup.problem(str(error)))
        parts = []
        for side, (searcher, found) in enumerate(zip(self.searchers, hits, strict=True)):
            cards = [
                Card(
                    rank=hit.rank,
                    score=hit.score,
                    shown=searcher.image_at(hit.position).shown,
                    picture=self.photos.picture(hit.image_id, side=THUMBNAIL),
                )
                for hit in found
            ]
            parts.append(markup.told(found, what="images") + markup.cards(cards, side=side))
        number = next(self._answers)
        return Answer(
            told="",
            found=markup.columns(parts, names=self.names, answer=number),
            asked=Asked(hits=hits, sentence=sentence, number=number),
        )

    def captions_of(self, name: str) -> Answer:
        """The captions that an image of the gallery finds."""
        try:
            images = tuple(searcher.image_named(name.strip()) for searcher in self.searchers)
            return self._captions(images, self.photos.picture(images[0].shown.name, side=LARGE))
        except CpfeanError as error:
            return Answer(told=markup.problem(str(error)))

    def captions_for(self, told: Any) -> Answer:
        """The captions that one's own photograph finds.

        Args:
            told: what came with it: a file's `name`, and its `content` in base64.
        """
        try:
            name, content = _file(told)
        except ConfigError as error:
            return Answer(told=markup.problem(str(error)))
        try:
            pixels = decode_photograph(content)
            with self._alone:
                started = time.perf_counter()
                images = tuple(
                    searcher.photograph(pixels, name=name) for searcher in self.searchers
                )
                took = time.perf_counter() - started
            return self._captions(images, as_picture(pixels, side=LARGE), before=took)
        except CpfeanError as error:
            return Answer(told=markup.problem(f"{name}: {error}"))

    def random_image(self) -> str:
        """The name of any image of the gallery."""
        names = self.searchers[0].split.image_ids
        return names[int(np.random.default_rng().integers(len(names)))]

    def chosen(self, asked: Asked | None, choice: Any) -> str:
        """The pair that a click asks for, by every model.

        Args:
            asked: what the visitor was shown.
            choice: what came with the click: which hit of which model in which answer, by their
                numbers.
        """
        try:
            side, chosen = _numbers(asked, choice)
            assert asked is not None
            hit = asked.hits[side][chosen]
            parts = []
            for number, searcher in enumerate(self.searchers):
                if asked.sentence is not None:
                    text, image = asked.sentence, searcher.image_at(hit.position)
                    picture = self.photos.picture(hit.image_id, side=LARGE)
                else:
                    text, image, picture = hit.text, asked.images[number], asked.picture
                hits = asked.hits[number]
                own = next((one for one in hits if one.position == hit.position), None)
                parts.append(self._pair(searcher, text, image, picture, markup.placed(own, hits)))
        except CpfeanError as error:
            return markup.problem(str(error))
        heading = f'<h3 class="asked" tabindex="-1">{markup.escaped(text)}</h3>'
        return heading + markup.columns(parts, names=self.names)

    def name_of(self, asked: Asked | None, choice: Any) -> str | None:
        """The name of the image that was clicked; None if captions were."""
        side, number = _numbers(asked, choice)
        assert asked is not None
        return None if asked.sentence is None else asked.hits[side][number].image_id

    def _captions(
        self, images: tuple[EncodedImage, ...], picture: Picture | None, *, before: float = 0.0
    ) -> Answer:
        with self._alone:
            hits = tuple(
                searcher.captions(image, k=self._count, shortlist=self._shortlist)
                for searcher, image in zip(self.searchers, images, strict=True)
            )
        own = images[0].shown.name if images[0].shown.position is not None else None
        lists = [
            markup.told(found, what="captions", before=before)
            + markup.caption_list(found, side=side, image_id=own)
            for side, found in enumerate(hits)
        ]
        number = next(self._answers)
        found = markup.columns(lists, names=self.names, answer=number)
        return Answer(
            told="",
            found=markup.beside(images[0].shown, picture, found),
            asked=Asked(hits=hits, images=images, picture=picture, number=number),
        )

    def _pair(
        self,
        searcher: Searcher,
        text: str,
        image: EncodedImage,
        picture: Picture | None,
        place: str,
    ) -> str:
        if not searcher.has_gates:
            alignment = searcher.trained.model.config.alignment
            how = "pooled vectors alone" if alignment.global_weight == 1 else alignment.kind
            note = f"This model scores by {how}, which has no gates and no words to show."
            return markup.image_alone(image.shown, picture, place=place, note=note)
        with self._alone:
            view = searcher.view(text, image)
            unknown = searcher.trained.tokenizer.unknown_words(text)
        return markup.pair(view, picture, place=place, unknown=unknown)


def _numbers(asked: Asked | None, choice: Any) -> tuple[int, int]:
    """The model and the hit that were clicked.

    Raises:
        ConfigError: there is no such one among what was shown.
    """
    told = choice if isinstance(choice, dict) else {}
    side, number = told.get("side"), told.get("hit")
    if (
        asked is None
        or told.get("answer") != asked.number
        or not isinstance(side, int)
        or not isinstance(number, int)
        or not 0 <= side < len(asked.hits)
        or not 0 <= number < len(asked.hits[side])
    ):
        raise ConfigError("what was chosen is not among what was found last; search again.")
    return side, number


def _file(told: Any) -> tuple[str, bytes]:
    """The name and the content of a file that was dropped in.

    Raises:
        ConfigError: it is none, or too large.
    """
    plain = told if isinstance(told, dict) else {}
    name, content = plain.get("name"), plain.get("content")
    if not isinstance(name, str) or not isinstance(content, str):
        raise ConfigError("expected a photograph, found none.")
    try:
        data = base64.b64decode(content, validate=True)
    except (binascii.Error, ValueError):
        raise ConfigError("the photograph did not arrive as a whole; drop it in again.") from None
    if len(data) > LARGEST_UPLOAD:
        raise ConfigError(
            f"expected a photograph of at most {LARGEST_UPLOAD:,} bytes, found {len(data):,}."
        )
    return name, data


def model_names(paths: Sequence[Path]) -> list[str]:
    """What to call models: their runs' names, or their paths where those are alike."""
    short = [
        path.parent.name if path.name in ("best_model", "best") else path.name for path in paths
    ]
    return short if len(set(short)) == len(short) else [str(path) for path in paths]
