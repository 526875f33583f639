"""One training step's loss, of which every process computes a share.

Each process encodes its own pairs, receives everybody's captions and scores its images against all
of them. So the hardest negatives are those of the global batch, no score is computed twice, and
loss and gradients are those of one process with the whole batch.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from cpfean.data.batch import Batch
from cpfean.losses.triplet import triplet_loss
from cpfean.model.cpfean import Cpfean
from cpfean.model.embeddings import CaptionEmbeddings
from cpfean.processes import gathered, place, share
from cpfean.training.sharding import clip_gradients, shard, sum_unsharded_gradients


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
            salience=gathered(captions.salience, total=total),
        )
        image_ids = gathered(batch.image_ids, total=total)
        scores = self.model.score(images, everybody)
        return triplet_loss(scores, image_ids, margin=self.margin, mining=mining, first=first)


def data_parallel(
    step: GlobalBatchLoss, device: torch.device, *, sharding: Literal["none", "full"] = "none"
) -> nn.Module:
    """The step as it is, or wrapped so that gradients are averaged over the processes.

    The optimizer is to be built afterwards: sharding puts other parameters in place of the model's.

    Args:
        step: with the weights to start from.
        device: of this process.
        sharding: "none" keeps the whole model on every process, "full" a share of it.
    """
    if place()[1] == 1:
        return step
    if device.type == "cuda":
        torch.cuda.set_device(device)  # before the first collective, which NCCL ties to a GPU
    if sharding == "full":
        return shard(step, layers_of=step.model.backbone, device=device)
    return DistributedDataParallel(
        step,
        device_ids=[device] if device.type == "cuda" else None,
        forward_sync_buffers=False,
        gradient_as_bucket_view=True,
    )


def find_gradients(
    step: nn.Module, loss: Tensor, parameters: Iterable[nn.Parameter], *, clip_norm: float
) -> Tensor:
    """Gradients of the whole loss, clipped, on the parameters of every process.

    Args:
        step: as `data_parallel` gave it.
        loss: this process's share.
        parameters: those that are trained.
        clip_norm: largest norm of the gradient.

    Returns:
        The norm before clipping.
    """
    # Data-parallel gradients are averaged over the processes; the shares are to be summed.
    (loss * place()[1]).backward()
    sum_unsharded_gradients(step)
    return clip_gradients(parameters, largest_norm=clip_norm)
