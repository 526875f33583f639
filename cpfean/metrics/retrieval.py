"""Recall of matches among all candidates of a split, in both directions.

Axes:  image     of a gallery: a whole split, or a fold of it     rival   a wrong image of a caption
       caption   of the gallery: those of its first image first, then those of its second, ...;
                 each image has at least one, and one may have more than another

A rank is a count of better candidates, and counts over shares of the images add up: nothing here
needs the whole score matrix, neither in one place nor at one time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from cpfean.errors import DataError, DivergedError
from cpfean.processes import smallest, summed

_NONE = 2**62  # further than any score is
_DEPTH = 10  # recall is asked for at 1, 5 and 10: whether 10 rivals are better or more is all one


@dataclass(frozen=True, kw_only=True)
class RecallAtK:
    """Share of queries, in percent, with a match among the first 1, 5 and 10."""

    r1: float
    r5: float
    r10: float

    @classmethod
    def from_counts(cls, better: Int[Tensor, "query"]) -> RecallAtK:
        """From the number of candidates that are ranked before each query's best match."""
        r1, r5, r10 = (100.0 * (better < k).double().mean().item() for k in (1, 5, 10))
        return cls(r1=r1, r5=r5, r10=r10)

    @property
    def total(self) -> float:
        """R@1 + R@5 + R@10."""
        return self.r1 + self.r5 + self.r10


@dataclass(frozen=True, kw_only=True)
class RetrievalMetrics:
    """The six recalls, in percent."""

    image_to_text: RecallAtK
    text_to_image: RecallAtK

    @property
    def rsum(self) -> float:
        """The sum of the six recalls, from 0 to 600."""
        return self.image_to_text.total + self.text_to_image.total

    def as_dict(self, prefix: str = "") -> dict[str, float]:
        """Flat, by name: i2t_r1, ..., t2i_r10, rsum."""
        both = (("i2t", self.image_to_text), ("t2i", self.text_to_image))
        recalls = {
            f"{prefix}{direction}_{name}": getattr(recall, name)
            for direction, recall in both
            for name in ("r1", "r5", "r10")
        }
        return recalls | {f"{prefix}rsum": self.rsum}

    @classmethod
    def from_dict(cls, values: dict[str, float], prefix: str = "") -> RetrievalMetrics:
        """Takes back what `as_dict` gave."""
        both = (
            RecallAtK(**{name: values[f"{prefix}{way}_{name}"] for name in ("r1", "r5", "r10")})
            for way in ("i2t", "t2i")
        )
        return cls(image_to_text=next(both), text_to_image=next(both))

    @classmethod
    def mean(cls, folds: list[RetrievalMetrics]) -> RetrievalMetrics:
        """The mean of each recall over folds."""
        dicts = [fold.as_dict() for fold in folds]
        return cls.from_dict({key: sum(d[key] for d in dicts) / len(dicts) for key in dicts[0]})


class RankCounter:
    """Counts, for every query of a gallery, the candidates that are ranked before its match.

    Takes the score matrix a few rows at a time, in any order and on any number of processes, each
    row once. A row tells all about its image. A caption's match may come later than its rivals, so
    their ten best scores are kept and compared with the match at the end: ten numbers a caption,
    whatever the number of images.

    Every pair is thus scored once, and a match is told from its rivals by where it stands: it
    cannot tie with itself, and nothing depends on computing a score twice alike.

    A tie counts against the model: constant scores earn nothing.
    """

    def __init__(
        self,
        gallery: range,
        captions: range,
        image_of_caption: Int[Tensor, "caption"],
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        """Starts with no rows.

        Args:
            gallery: its images, by their positions in the split.
            captions: its captions, likewise.
            image_of_caption: the position in the split of the image that each of these captions
                describes; on the CPU, never falling.
            dtype: of the scores.
            device: of the scores; one that the processes can communicate through.
        """
        self.gallery = gallery
        self.captions = captions
        num_captions = len(captions)
        self._row_of = (image_of_caption - gallery.start).to(device)
        edges = torch.arange(gallery.start, gallery.stop + 1)
        self._edges: list[int] = torch.searchsorted(image_of_caption, edges).tolist()
        self._better_captions = torch.zeros(len(gallery), dtype=torch.int64, device=device)
        self._matches = torch.zeros(num_captions, dtype=dtype, device=device)
        self._rivals = torch.full((_DEPTH, num_captions), -torch.inf, dtype=dtype, device=device)
        # Position of a score; this is none's. On the device, where nobody waits for it.
        self._first_broken = torch.full((), len(gallery) * num_captions, device=device)

    def add(self, scores: Float[Tensor, "image caption"], *, first: int) -> None:
        """Counts some rows of the score matrix.

        Args:
            scores: of images next to each other, with all captions of the gallery.
            first: the first of these images, by its position in the split.
        """
        row = first - self.gallery.start
        num_rows, num_captions = scores.shape
        broken = row * num_captions + _first_not_finite(scores)
        self._first_broken = torch.minimum(self._first_broken, broken)
        own = slice(self._edges[row], self._edges[row + num_rows])
        row_of = self._row_of[own] - row
        matches, better = _better_captions(scores, row_of, first_column=own.start)
        self._better_captions[row : row + num_rows] = better
        self._matches[own] = matches

        rivals = torch.cat([self._rivals, scores])
        columns = torch.arange(own.start, own.stop, device=scores.device)
        rivals[_DEPTH + row_of, columns] = -torch.inf
        self._rivals = rivals.topk(_DEPTH, dim=0, sorted=False).values

    def metrics(self) -> RetrievalMetrics:
        """The recalls, once the processes have together added all rows; the same on each.

        Raises:
            DivergedError: a score is not finite; raised on every process.
        """
        num_captions = len(self._matches)
        broken = int(smallest(self._first_broken.clone()))
        if broken < len(self.gallery) * num_captions:
            image, caption = divmod(broken, num_captions)
            raise _not_finite(self.gallery[image], self.captions[caption])
        # What other processes hold is zero here, so the sum is everybody's.
        matches = summed(self._matches.clone())
        better_images = (self._rivals >= matches).sum(dim=0)
        return RetrievalMetrics(
            image_to_text=RecallAtK.from_counts(summed(self._better_captions.clone())),
            text_to_image=RecallAtK.from_counts(summed(better_images)),
        )


def retrieval_metrics(
    scores: Float[Tensor, "image caption"], image_of_caption: Int[Tensor, "column"]
) -> RetrievalMetrics:
    """The metrics of a complete score matrix, held by one process.

    Args:
        scores: of all images with all captions.
        image_of_caption: the row of each column's own image, never falling.

    Raises:
        DataError: a row has no column of its own, or the columns are not in the rows' order.
        DivergedError: a score is not finite.
    """
    _check_complete(scores, image_of_caption)
    counter = RankCounter(
        range(len(scores)),
        range(scores.shape[1]),
        image_of_caption.cpu(),
        dtype=scores.dtype,
        device=scores.device,
    )
    counter.add(scores, first=0)
    return counter.metrics()


class QueryRanks(NamedTuple):
    """The place of each query's best match among all candidates, from 1.

    Attributes:
        images: of each image's best caption.
        captions: of each caption's image.
    """

    images: Int[Tensor, "image"]
    captions: Int[Tensor, "caption"]

    def metrics(self) -> RetrievalMetrics:
        """The recalls."""
        return RetrievalMetrics(
            image_to_text=RecallAtK.from_counts(self.images - 1),
            text_to_image=RecallAtK.from_counts(self.captions - 1),
        )


def query_ranks(
    scores: Float[Tensor, "image caption"], image_of_caption: Int[Tensor, "column"]
) -> QueryRanks:
    """The rank of every query, for looking at single ones; a tie counts against the model.

    Args:
        scores: the complete matrix, held by one process.
        image_of_caption: the row of each column's own image, never falling.

    Raises:
        DataError: a row has no column of its own, or the columns are not in the rows' order.
        DivergedError: a score is not finite.
    """
    _check_complete(scores, image_of_caption)
    if not bool(scores.isfinite().all()):
        image, caption = (~scores.isfinite()).nonzero()[0].tolist()
        raise _not_finite(image, caption)
    matches, better_captions = _better_captions(
        scores, image_of_caption.to(scores.device), first_column=0
    )
    return QueryRanks(
        images=1 + better_captions,
        # A match is as good as itself: it counts the 1 that ranks begin with.
        captions=(scores >= matches).sum(dim=0),
    )


def _better_captions(
    scores: Float[Tensor, "image caption"], row_of: Int[Tensor, "own"], *, first_column: int
) -> tuple[Float[Tensor, "own"], Int[Tensor, "image"]]:
    """Scores of the matches, and how many captions come before the best match of each image.

    Args:
        scores: of some images with all captions.
        row_of: the row of each of these images' own captions, which lie next to each other.
        first_column: of these captions.
    """
    columns = torch.arange(first_column, first_column + len(row_of), device=scores.device)
    matches = scores[row_of, columns]
    best = matches.new_full((len(scores),), -torch.inf).scatter_reduce(0, row_of, matches, "amax")
    # Of an image's own captions those that are as good as the best are no rivals of it.
    as_good = (matches >= best[row_of]).long()
    own = torch.zeros(len(scores), dtype=torch.int64, device=scores.device)
    return matches, (scores >= best[:, None]).sum(dim=1) - own.index_add(0, row_of, as_good)


def _first_not_finite(scores: Float[Tensor, "image caption"]) -> Int[Tensor, ""]:
    """The position, row by row, of the first score that is not finite; `_NONE` if all are."""
    # Of each row its extremes, and all of it of the first row where one of them is not.
    extremes = torch.stack([scores.amin(dim=1), scores.amax(dim=1)])
    broken = ~extremes.isfinite().all(dim=0)
    row = broken.to(torch.uint8).argmax()
    column = (~scores.index_select(0, row[None]).isfinite()).to(torch.uint8).argmax()
    return torch.where(broken.any(), row * scores.shape[1] + column, _NONE)


def _check_complete(
    scores: Float[Tensor, "image caption"], image_of_caption: Int[Tensor, "column"]
) -> None:
    num_images, num_captions = scores.shape
    expected = torch.arange(num_images, device=image_of_caption.device)
    if (
        num_images == 0
        or len(image_of_caption) != num_captions
        or not torch.equal(image_of_caption.unique_consecutive(), expected)
    ):
        raise DataError(
            f"a score matrix of {num_images} images by {num_captions} captions; expected the "
            f"{len(image_of_caption)} captions of at least one image, each image's own next to "
            "each other, in the images' order, at least one of each."
        )


def _not_finite(image: int, caption: int) -> DivergedError:
    return DivergedError(
        f"the score of image {image}, caption {caption} is not finite: nothing can be ranked. "
        "The training has diverged; try a lower optim.learning_rate."
    )


def folds(num_images: int, *, fold_size: int) -> list[range]:
    """Consecutive images that are ranked by themselves: COCO 1K is five folds of 1000 images.

    Raises:
        DataError: the images do not divide into folds of that size.
    """
    if num_images == 0 or num_images % fold_size:
        raise DataError(
            f"{num_images} images do not divide into folds of {fold_size}; the COCO 1K protocol "
            'takes the 5000 test images, evaluation.protocol = "full" any number.'
        )
    return [range(start, start + fold_size) for start in range(0, num_images, fold_size)]
