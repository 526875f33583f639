"""Recall of matches among all candidates of a split, in both directions.

Axes:  image     rows of the score matrix: all of a split, or a contiguous share of it
       caption   its columns: those of image 0 first, then those of image 1, ...

A rank is a count of better candidates, and counts over shares of the images add up: nothing here
needs the whole score matrix in one place.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from cpfean.errors import DataError, DivergedError


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


def match_scores(
    scores: Float[Tensor, "image caption"], *, first: int, captions_per_image: int
) -> Float[Tensor, "image match"]:
    """The scores of each image's own captions.

    Args:
        scores: rows `first`, `first + 1`, ... of the score matrix, all its columns.
        first: which image row 0 is.
        captions_per_image: captions of an image, next to each other.
    """
    image = torch.arange(first, first + scores.shape[0], device=scores.device)
    own = torch.arange(captions_per_image, device=scores.device)
    return scores.gather(1, image[:, None] * captions_per_image + own)


def better_captions(
    scores: Float[Tensor, "image caption"], *, first: int, captions_per_image: int
) -> Int[Tensor, "image"]:
    """For each image, how many wrong captions score at least as high as its best own caption.

    A tie counts against the model: constant scores earn nothing.

    Raises:
        DivergedError: a score is not finite.
    """
    _check_finite(scores)
    own = match_scores(scores, first=first, captions_per_image=captions_per_image)
    best = own.amax(dim=1, keepdim=True)
    return (scores >= best).sum(dim=1) - (own >= best).sum(dim=1)


def better_images(
    scores: Float[Tensor, "image caption"],
    matches: Float[Tensor, "caption"],
    *,
    first: int,
    captions_per_image: int,
) -> Int[Tensor, "caption"]:
    """For each caption, how many of these rows' wrong images score at least as high as its own.

    Args:
        scores: a share of the rows; the counts of all shares add up.
        matches: the score of each caption with its own image, which may be in another share.
        first: which image row 0 is.
        captions_per_image: captions of an image, next to each other.

    Raises:
        DivergedError: a score is not finite.
    """
    _check_finite(scores)
    last = first + scores.shape[0]
    count = (scores >= matches).sum(dim=0)
    count[first * captions_per_image : last * captions_per_image] -= 1  # its own image
    return count


def retrieval_metrics(
    scores: Float[Tensor, "image caption"], *, captions_per_image: int = 5
) -> RetrievalMetrics:
    """The metrics of a complete score matrix.

    Raises:
        DataError: the columns are not `captions_per_image` for each row.
        DivergedError: a score is not finite.
    """
    num_images, num_captions = scores.shape
    if num_images == 0 or num_captions != num_images * captions_per_image:
        raise DataError(
            f"a score matrix of {num_images} images by {num_captions} captions; expected "
            f"{captions_per_image} captions for each of at least one image."
        )
    layout = {"first": 0, "captions_per_image": captions_per_image}
    matches = match_scores(scores, **layout).flatten()
    return RetrievalMetrics(
        image_to_text=RecallAtK.from_counts(better_captions(scores, **layout)),
        text_to_image=RecallAtK.from_counts(better_images(scores, matches, **layout)),
    )


def fold_slices(
    num_images: int, *, fold_size: int, captions_per_image: int = 5
) -> list[tuple[slice, slice]]:
    """Rows and columns of consecutive folds: the diagonal blocks of the score matrix.

    Raises:
        DataError: the images do not divide into folds of that size.
    """
    if num_images == 0 or num_images % fold_size:
        raise DataError(
            f"{num_images} images do not divide into folds of {fold_size}; the COCO 1K protocol "
            'takes the 5000 test images, evaluation.protocol = "full" any number.'
        )
    starts = range(0, num_images, fold_size)
    return [
        (
            slice(start, start + fold_size),
            slice(start * captions_per_image, (start + fold_size) * captions_per_image),
        )
        for start in starts
    ]


def fold_metrics(
    scores: Float[Tensor, "image caption"], *, fold_size: int = 1000, captions_per_image: int = 5
) -> RetrievalMetrics:
    """The mean over consecutive folds: COCO 1K is five folds of 1000 images.

    Raises:
        DataError: the images do not divide into folds of that size.
        DivergedError: a score is not finite.
    """
    folds = fold_slices(scores.shape[0], fold_size=fold_size, captions_per_image=captions_per_image)
    return RetrievalMetrics.mean(
        [
            retrieval_metrics(scores[rows, columns], captions_per_image=captions_per_image)
            for rows, columns in folds
        ]
    )


def _check_finite(scores: Float[Tensor, "image caption"]) -> None:
    finite = scores.isfinite()
    if not bool(finite.all()):
        image, caption = (~finite).nonzero()[0].tolist()
        raise DivergedError(
            f"{int((~finite).sum())} of {scores.numel()} scores are not finite, the first at image "
            f"{image}, caption {caption}: nothing can be ranked. The training has diverged; try a "
            "lower optim.learning_rate."
        )
