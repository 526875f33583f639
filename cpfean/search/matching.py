"""One sentence with many images, or one image with many captions: scored, and the best of them.

Axes:  candidate   an image or caption that is scored      dim   width of the joint space

Every candidate is scored, or those of a shortlist: the ones whose pooled vectors have the highest
cosines with the query's. Of mapped embeddings no other is read then.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from cpfean.config import Products
from cpfean.model.cpfean import Cpfean
from cpfean.model.embeddings import CaptionEmbeddings, ImageEmbeddings
from cpfean.model.scoring import in_products
from cpfean.progress import Progress
from cpfean.search.kept import KeptCaptions, KeptImages, Rows
from cpfean.search.ranking import best

_BLOCK_BYTES = 2**26  # of images' embeddings that are scored at a time
_BLOCK_CAPTIONS = 1024


@dataclass(frozen=True, kw_only=True)
class Found:
    """The best candidates, the highest score first; of equal ones, the first first.

    Attributes:
        positions: of the best.
        scores: theirs, in cosine units.
        scored: how many candidates were scored.
    """

    positions: Int64[np.ndarray, "best"]
    scores: Float[np.ndarray, "best"]
    scored: int

    def ranked(self) -> Iterator[tuple[int, int, float]]:
        """Rank, from 1, position and score of each."""
        pairs = zip(self.positions.tolist(), self.scores.tolist(), strict=True)
        for rank, (position, score) in enumerate(pairs, start=1):
            yield rank, position, score


def find_images(
    model: Cpfean,
    images: KeptImages,
    caption: CaptionEmbeddings,
    *,
    k: int,
    shortlist: int | None = None,
    products: Products = "fp32",
) -> Found:
    """The images that score best with a caption.

    Args:
        model: that encoded them, in evaluation mode.
        images: of the gallery.
        caption: the one.
        k: how many, if there are as many.
        shortlist: score only so many; None scores all.
        products: type of the matrix products of scoring.
    """
    device = caption.pooled.device

    def score(rows: Rows) -> Float[np.ndarray, "candidate"]:
        return _scores(model, images.rows(rows, device=device), caption, products)[:, 0]

    listed = _shortlist(model, images.pooled, caption.pooled, shortlist)
    step = max(1, _BLOCK_BYTES // images.bytes_each)
    return _best(score, len(images), listed, k=k, step=step)


def find_captions(
    model: Cpfean,
    captions: KeptCaptions,
    image: ImageEmbeddings,
    *,
    k: int,
    shortlist: int | None = None,
    products: Products = "fp32",
) -> Found:
    """The captions that score best with an image; otherwise as `find_images`."""
    device = image.pooled.device

    def score(rows: Rows) -> Float[np.ndarray, "candidate"]:
        return _scores(model, image, captions.rows(rows, device=device), products)[0]

    listed = _shortlist(model, captions.pooled, image.pooled, shortlist)
    return _best(score, len(captions), listed, k=k, step=_BLOCK_CAPTIONS)


@torch.inference_mode()
def _scores(
    model: Cpfean, images: ImageEmbeddings, captions: CaptionEmbeddings, products: Products
) -> Float[np.ndarray, "image caption"]:
    with in_products(products, images.pooled.device):
        return model.score(images, captions).float().cpu().numpy()


def _shortlist(
    model: Cpfean,
    pooled: Float[np.ndarray, "candidate dim"],
    query: Float[Tensor, "1 dim"],
    length: int | None,
) -> Int64[np.ndarray, "listed"] | None:
    """Which candidates are scored, in the order of the disk; None for all.

    A score that is the pooled cosine itself has nothing to gain from a shortlist.
    """
    if length is None or length >= len(pooled) or model.scorer is None:
        return None
    cosines = (torch.from_numpy(pooled) @ query[0].float().cpu()).numpy()
    return np.sort(best(cosines, length))


def _best(
    score: Callable[[Rows], Float[np.ndarray, "candidate"]],
    total: int,
    listed: Int64[np.ndarray, "listed"] | None,
    *,
    k: int,
    step: int,
) -> Found:
    """Scores so many candidates at a time, and keeps the best."""
    scored = total if listed is None else len(listed)
    progress = Progress("scoring every pair", total=scored)
    parts = []
    for start in range(0, scored, step):
        stop = min(start + step, scored)
        parts.append(score(slice(start, stop) if listed is None else listed[start:stop]))
        progress.step(stop)
    scores = np.concatenate(parts)
    found = best(scores, k)
    return Found(
        positions=found if listed is None else listed[found], scores=scores[found], scored=scored
    )
