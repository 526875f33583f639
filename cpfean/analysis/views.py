"""A trained model before a split: which pairs of it are worth a picture, and their ranks.

Axes:  image, caption   of a gallery: a split, or the first images of it
       region           real ones of one image, in the detector's order
       word             of one caption
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from cpfean.analysis.pair_views import PairView, check_gates, has_gates, shown_image, view_pair
from cpfean.config import Products, nearest
from cpfean.errors import ConfigError, DataError
from cpfean.metrics.retrieval import QueryRanks, query_ranks
from cpfean.training.evaluation import score_matrix
from cpfean.training.setup import TrainedModel

Direction = Literal["text to image", "image to text"]

# Ranks up to which a query counts as found, and as found among others.
_FOUND, _NEAR = 1, 10


@dataclass(frozen=True, kw_only=True)
class RankChange:
    """A query that two models rank differently.

    Attributes:
        direction: what is asked for with what.
        query: position of the caption or image in the split.
        ranks: of its best match, from 1, by the first and by the second model.
    """

    direction: Direction
    query: int
    ranks: tuple[int, int]

    @property
    def ratio(self) -> float:
        """Rank by the second model over rank by the first; below 1 the second is better."""
        return self.ranks[1] / self.ranks[0]


class Gallery:
    """A model's scores of a split, and a closer look at any pair of it.

    Everything is scored once, on first use, in one process; see `score_matrix` for the memory.

    Args:
        trained: the model and the split.
        sizes: width and height of the split's images; see `image_sizes`.
        num_images: the first so many images of the split are the gallery; None takes all.
        batch_size: images or captions encoded at a time.
        products: type of the matrix products of scoring; that of the evaluation gives its ranks.

    Raises:
        DataError: a single image, with nothing to tell it from.
    """

    def __init__(
        self,
        trained: TrainedModel,
        *,
        sizes: Int[np.ndarray, "image 2"] | None = None,
        num_images: int | None = None,
        batch_size: int = 128,
        products: Products = "fp32",
    ) -> None:
        self.trained = trained
        self.split = trained.dataset.split
        total = self.split.num_images
        self.num_images = total if num_images is None else min(num_images, total)
        if self.num_images < 2:
            raise DataError(
                f"{self.split.name} has a single image: there is no other one to tell it from."
            )
        self._sizes = sizes
        self._batch_size = batch_size
        self._products = products

    @property
    def has_gates(self) -> bool:
        """Whether the model has gates and prominent words to look at."""
        return has_gates(self.trained.model)

    def check_gates(self, *, name: str) -> None:
        """Refuses a model without gates.

        Raises:
            ConfigError: says which setting makes it so.
        """
        check_gates(self.trained.model, name=name)

    @cached_property
    def scores(self) -> Float[Tensor, "image caption"]:
        """Of every image with every caption of the gallery."""
        return score_matrix(
            self.trained.model,
            self.trained.dataset,
            gallery=range(self.num_images),
            batch_size=self._batch_size,
            device=next(self.trained.model.parameters()).device,
            products=self._products,
        )

    @cached_property
    def ranks(self) -> QueryRanks:
        """Of every query among the gallery."""
        images = self.split.groups.first(self.num_images).image_of_caption
        return query_ranks(self.scores, torch.from_numpy(images))

    def caption_at(self, number: int) -> int:
        """The caption of that number.

        Raises:
            ConfigError: there is none.
        """
        last = self.split.groups.of_images(range(self.num_images)).stop - 1
        if not 0 <= number <= last:
            raise ConfigError(
                f"--caption must be from 0 to {last}, the captions of {self.split.name}; "
                f"got {number}."
            )
        return number

    def image_named(self, name: str) -> int:
        """The image of that id.

        Raises:
            ConfigError: there is none.
        """
        ids = self.split.image_ids[: self.num_images]
        if name not in ids:
            raise ConfigError(f"{self.split.name} has no image {name!r}{nearest(name, ids)}")
        return ids.index(name)

    def best_caption(self, image: int) -> int:
        """The image's own caption with the highest score."""
        own = self._own_captions(image)
        return own.start + int(self.scores[image, own].argmax())

    def wrong_caption(self, image: int) -> int:
        """The hardest negative: the other images' caption with the highest score."""
        row = self.scores[image].clone()
        row[self._own_captions(image)] = -torch.inf
        return int(row.argmax())

    def wrong_image(self, caption: int) -> int:
        """The hardest negative: the image, of those it does not describe, with the best score."""
        column = self.scores[:, caption].clone()
        column[self.split.image_of(caption)] = -torch.inf
        return int(column.argmax())

    def _own_captions(self, image: int) -> slice:
        own = self.split.captions_of(image)
        return slice(own.start, own.stop)

    @torch.inference_mode()
    def view(self, image: int, caption: int) -> PairView:
        """What the model sees in a pair; the model has gates."""
        model, dataset = self.trained.model, self.trained.dataset
        device = next(model.parameters()).device
        return view_pair(
            model,
            model.encode_images(**dataset.image_batch([image]).to(device)._asdict()),
            model.encode_captions(**dataset.caption_batch([caption]).to(device)._asdict()),
            shown=shown_image(self.split, image, sizes=self._sizes),
            words=self.trained.tokenizer.words(self.split.captions[caption]),
            position=caption,
            is_match=self.split.image_of(caption) == image,
        )


def image_sizes(folder: Path, split: str, *, num_images: int) -> Int[np.ndarray, "image 2"] | None:
    """Width and height of a split's images; None for data without.

    Args:
        folder: in the native format, checked.
        split: its name.
        num_images: of the split; files with a row a caption have more.
    """
    file = folder / f"{split}_sizes.npy"
    if not file.exists():
        return None
    sizes = np.load(file, allow_pickle=False)
    return sizes[:: len(sizes) // num_images]


def pick_captions(ranks: QueryRanks, *, count: int, seed: int) -> list[int]:
    """Captions whose image was found, nearly found and missed, in turn.

    Found is rank 1, nearly 2 to 10, missed the rest; drawn at random within each. A kind that runs
    out leaves its turn to the others.

    Args:
        ranks: of the gallery.
        count: how many, if the gallery has as many.
        seed: of the draw.
    """
    rng = np.random.default_rng(seed)
    found = ranks.captions.numpy()
    kinds = (found <= _FOUND, (found > _FOUND) & (found <= _NEAR), found > _NEAR)
    waiting = [rng.permutation(np.flatnonzero(kind)).tolist() for kind in kinds]
    picked: list[int] = []
    while len(picked) < count and any(waiting):
        picked += [line.pop() for line in waiting if line]
    return picked[:count]


def outcome(rank: int) -> str:
    """What a rank means, in a word."""
    if rank <= _FOUND:
        return "found"
    return "near" if rank <= _NEAR else "missed"


def rank_changes(first: QueryRanks, second: QueryRanks) -> list[RankChange]:
    """Every query of both directions, those whose rank changed most first.

    Change is the ratio of the ranks: from the 1st to the 10th place is as far as from the 10th to
    the 100th, and a wrong query that is a little less wrong is no news. Queries that changed alike
    come in their order, captions before images.

    Args:
        first, second: of the same gallery by two models.
    """
    both: tuple[tuple[Direction, Tensor, Tensor], ...] = (
        ("text to image", first.captions, second.captions),
        ("image to text", first.images, second.images),
    )
    changes = [
        RankChange(direction=direction, query=query, ranks=ranks)
        for direction, before, after in both
        for query, ranks in enumerate(zip(before.tolist(), after.tolist(), strict=True))
    ]
    return sorted(changes, key=lambda change: -abs(np.log(change.ratio)))


def most_changed(
    changes: list[RankChange], *, count: int
) -> dict[tuple[Direction, int], list[RankChange]]:
    """The first so many of each direction for each model that ranks them better.

    Args:
        changes: what `rank_changes` gave.
        count: the most of each kind; queries that did not change are left out.

    Returns:
        By direction, and by the model (0 or 1) that is better at these queries.
    """
    directions: tuple[Direction, ...] = ("text to image", "image to text")
    return {
        (direction, better): [
            change
            for change in changes
            if change.direction == direction
            and (change.ratio > 1 if better == 0 else change.ratio < 1)
        ][:count]
        for direction in directions
        for better in (0, 1)
    }
