"""One training step's loss, of which every process computes a share.

Each process encodes its own pairs, receives everybody's captions and scores its images against all
of them. So the hardest negatives are those of the global batch, no score is computed twice, and
loss and gradients are those of one process with the whole batch.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from cpfean.data.batch import Batch
from cpfean.losses.triplet import triplet_loss
from cpfean.model.cpfean import Cpfean
from cpfean.model.embeddings import CaptionEmbeddings
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
        scores = self.model.score(images, everybody)
        return triplet_loss(scores, image_ids, margin=self.margin, mining=mining, first=first)


def data_parallel(step: GlobalBatchLoss, device: torch.device) -> nn.Module:
    """The step as it is, or wrapped so that gradients are averaged over the processes."""
    if place()[1] == 1:
        return step
    return DistributedDataParallel(
        step,
        device_ids=[device] if device.type == "cuda" else None,
        forward_sync_buffers=False,
        gradient_as_bucket_view=True,
    )
