"""The best candidates of every query, in order: what metrics need that look at ranked lists.

Axes:  image, caption   of a gallery     best   places of a list, the best candidate first

As with ranks, the score matrix is never held: a row tells all about its image, and the best images
of each caption are those of before or of the rows that come. Of equal scores the one that comes
first in the gallery comes first in the list, whatever the rows are that came together: the order of
a split says nothing about what is right.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor


class BestCandidates:
    """The first captions of every image and the first images of every caption; one process.

    Attributes:
        captions: of each image, by their positions in the gallery.
        images: of each caption, likewise.
    """

    captions: Int[Tensor, "image best"]
    images: Int[Tensor, "caption best"]

    def __init__(
        self,
        num_images: int,
        num_captions: int,
        *,
        captions_each: int,
        images_each: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        """Starts with no rows.

        Args:
            num_images, num_captions: of the gallery.
            captions_each: how many captions are kept of an image, at most all.
            images_each: how many images are kept of a caption, at most all.
            dtype, device: of the scores.
        """
        each = min(captions_each, num_captions)
        self.captions = torch.zeros(num_images, each, dtype=torch.int64, device=device)
        each = min(images_each, num_images)
        self.images = torch.zeros(num_captions, each, dtype=torch.int64, device=device)
        self._scores = torch.full((num_captions, each), -torch.inf, dtype=dtype, device=device)

    def add(self, scores: Float[Tensor, "row caption"], *, first: int) -> None:
        """Takes some rows of the score matrix; they come in the order of the images.

        Args:
            scores: of images next to each other, with all captions. Of some that are not finite
                the candidates mean nothing.
            first: the first of these images, by its position in the gallery.
        """
        rows = torch.arange(first, first + len(scores), device=scores.device)
        self.captions[rows] = _best(scores, self.captions.shape[1])
        # What was kept stands before the new ones, as in the gallery.
        candidates = torch.cat([self._scores, scores.T], dim=1)
        images = torch.cat([self.images, rows.expand(len(self.images), -1)], dim=1)
        best = _best(candidates, self.images.shape[1])
        self._scores = candidates.gather(1, best)
        self.images = images.gather(1, best)


def _best(scores: Float[Tensor, "query candidate"], count: int) -> Int[Tensor, "query best"]:
    """The best candidates; of equal ones those that stand first, which `topk` does not promise."""
    found = scores.topk(count, dim=1).indices.sort(dim=1).values
    order = scores.gather(1, found).sort(dim=1, descending=True, stable=True).indices
    best = found.gather(1, order)
    # Where the last place has equals outside the list, the choice was arbitrary.
    tied = (scores >= scores.gather(1, best[:, -1:])).sum(dim=1) > count
    if bool(tied.any()):
        best[tied] = scores[tied].sort(dim=1, descending=True, stable=True).indices[:, :count]
    return best
