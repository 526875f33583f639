"""One training step's loss, of which every process computes a share.

Each process encodes its own pairs, receives everybody's captions and scores its images against all
of them. So the hardest negatives are those of the global batch, no score is computed twice, and
loss and gradients are those of one process with the whole batch.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from cpfean.data.batch import Batch
from cpfean.losses.triplet import triplet_loss
from cpfean.model.cpfean import Cpfean
from cpfean.model.embeddings import CaptionEmbeddings, ImageEmbeddings
from cpfean.processes import gathered, place, share


class GlobalBatchLoss(nn.Module):
    """This process's share of the loss; the shares, and their gradients, add up to the whole."""

    def __init__(self, model: Cpfean, *, margin: float) -> None:
        super().__init__()
        self.model = model
        self.margin = margin

    def forward(self, batch: Batch, mining: Literal["hardest", "all"], total: int) -> Tensor:
        """The share as a scalar.

        Args:
            batch: this process's pairs, as many as `processes.share` gives it.
            mining: which negatives count.
            total: pairs of the global batch.
        """
        rank, world_size = place()
        first, _ = share(total, rank=rank, world_size=world_size)
        images = self.model.encode_images(**batch.images._asdict())
        captions = self.model.encode_captions(**batch.captions._asdict())
        everybody = CaptionEmbeddings(
            words=gathered(captions.words, total=total),
            mask=gathered(captions.mask.to(torch.uint8), total=total).bool(),
            pooled=gathered(captions.pooled, total=total),
        )
        image_ids = gathered(batch.image_ids, total=total)
        if mining == "hardest":
            return self._hardest(images, everybody, image_ids, first)
        scores = self.model.score(images, everybody)
        return triplet_loss(scores, image_ids, margin=self.margin, mining="all", first=first)

    def _hardest(
        self, images: ImageEmbeddings, captions: CaptionEmbeddings, image_ids: Tensor, first: int
    ) -> Tensor:
        """The loss on hardest negatives, whose gradient reaches few pairs.

        Of B x B pairs at most 3 B matter: the matches and, for each query, its hardest negative.
        All pairs are scored without a graph, those that matter once more with one. The result has
        the value of the loss and, exactly, its gradient.
        """
        with torch.no_grad():
            scores = self.model.score(images, captions)
        loss = triplet_loss(
            scores.requires_grad_(), image_ids, margin=self.margin, mining="hardest", first=first
        )
        (sensitivity,) = torch.autograd.grad(loss, scores)
        matters = sensitivity != 0
        # The matches always: a process without an active hinge still has to send its gradients.
        own = torch.arange(len(scores), device=scores.device)
        matters[own, own + first] = True
        rows, columns = matters.nonzero(as_tuple=True)
        again = self.model.score_pairs(images.rows(rows), captions.rows(columns))
        change = again - again.detach()
        return loss.detach() + (sensitivity[rows, columns] * change).sum()
