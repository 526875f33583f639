"""What a search finds, and how it was found."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from cpfean.analysis.pair_views import ShownImage
from cpfean.errors import ConfigError
from cpfean.model.embeddings import ImageEmbeddings
from cpfean.search.sentences import Sentence


@dataclass(frozen=True, kw_only=True)
class Hit:
    """What was found.

    Attributes:
        rank: from 1.
        score: of the pair, in cosine units.
        position: of the image or caption in the split, from 0.
        text: the image's name, or the caption.
        image_id: the image's name, or that of the image which the caption was written for.
    """

    rank: int
    score: float
    position: int
    text: str
    image_id: str


class Hits(list[Hit]):
    """What was found, the best first, and how.

    Attributes:
        total: images or captions of the gallery.
        scored: those that got the full score: all of them, or the shortlist.
        seconds: from the question to the answer.
        sentence: what the model read, unknown words included; None where an image was asked with.
    """

    def __init__(
        self,
        hits: Iterable[Hit],
        *,
        total: int,
        scored: int,
        seconds: float,
        sentence: Sentence | None = None,
    ) -> None:
        super().__init__(hits)
        self.total = total
        self.scored = scored
        self.seconds = seconds
        self.sentence = sentence

    @property
    def is_exact(self) -> bool:
        """Whether every pair was scored."""
        return self.scored == self.total


@dataclass(frozen=True, kw_only=True)
class EncodedImage:
    """An image that captions can be found for.

    Attributes:
        shown: what a picture of it shows.
        encoded: the one image.
    """

    shown: ShownImage
    encoded: ImageEmbeddings


def check_counts(k: int, shortlist: int | None) -> None:
    """Raises ConfigError if nothing is asked for, or more than a shortlist holds."""
    if k < 1:
        raise ConfigError(f"k must be at least 1; got {k}.")
    if shortlist is not None and shortlist < k:
        raise ConfigError(
            f"a shortlist must hold at least the {k} that are asked for; got {shortlist}."
        )
