"""A whole training step of the full model on random data, for what measures it.

A text encoder of the shape of BERT with random weights, fine-tuned, 36 regions unless told
otherwise, hardest negatives, clipping and AdamW, in the precision of `optim.precision = "auto"`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from random_data import as_dataset, write_split
from torch import nn

from cpfean.config import ExperimentConfig
from cpfean.data.batch import Batch
from cpfean.data.dataset import BatchRequest, GlobalBatches
from cpfean.losses.triplet import triplet_loss
from cpfean.training.global_batch import GlobalBatchLoss, find_gradients
from cpfean.training.optimizer import build_optimizer
from cpfean.training.precision import LossScale, autocast, chosen_precision
from cpfean.training.setup import build_model
from cpfean.training.sharding import clip_gradients


class FullStep:
    """The step, whole and in its parts.

    Args:
        folder: for the data, which is made.
        device: that it runs on.
        pairs: of a batch.
        dim: of the joint space.
        feature_dim: of a region.
        text_dim, text_layers: of the text encoder.
        regions: of an image.
    """

    def __init__(
        self,
        folder: Path,
        device: torch.device,
        *,
        pairs: int,
        dim: int,
        feature_dim: int,
        text_dim: int,
        text_layers: int,
        regions: int = 36,
    ) -> None:
        split = write_split(
            folder, images=max(2, pairs // 2), regions=regions, feature_dim=feature_dim
        )
        self.config = ExperimentConfig().with_overrides(
            {
                "model.dim": dim,
                "model.text.scratch_dim": text_dim,
                "model.text.scratch_layers": text_layers,
                "optim.batch_size": pairs,
            }
        )
        self.dataset, tokenizer = as_dataset(split)
        torch.manual_seed(0)
        self.device = device
        precision = chosen_precision(self.config.optim.precision, device)
        self.scale = LossScale.to_go_on(precision, LossScale())
        self.model = build_model(self.config, split=split, tokenizer=tokenizer).to(device)
        self.loss = GlobalBatchLoss(self.model, margin=self.config.loss.margin).train()
        self.optimizer = build_optimizer(self.model, self.config.optim)
        self.pairs = pairs
        self._requests = _endless(len(self.dataset), pairs)

    def batch(self) -> Batch:
        """The next one, on the device."""
        return self.dataset.training_batch(next(self._requests)).to(self.device)

    def whole(self, batch: Batch) -> None:
        """Forward, backward, clipping and update."""
        take_step(
            self.loss,
            self.optimizer,
            batch,
            pairs=self.pairs,
            clip_norm=self.config.optim.clip_norm,
            scale=self.scale,
        )

    def seconds_by_phase(self, wait: Callable[[], None]) -> dict[str, float]:
        """One step, the device waited for after every phase."""
        found: dict[str, float] = {}

        @contextmanager
        def phase(name: str) -> Iterator[None]:
            wait()
            started = time.perf_counter()
            yield
            wait()
            found[name] = time.perf_counter() - started

        with phase("batch to the device"):
            batch = self.batch()
        self.optimizer.zero_grad(set_to_none=True)
        with autocast(self.scale.precision, self.device):
            with phase("encode images"):
                images = self.model.encode_images(**batch.images._asdict())
            with phase("encode captions"):
                captions = self.model.encode_captions(**batch.captions._asdict())
            with phase("score"):
                scores = self.model.score(images, captions)
            with phase("loss"):
                loss = triplet_loss(
                    scores, batch.image_ids, margin=self.config.loss.margin, mining="hardest"
                )
        with phase("backward"):
            (loss * self.scale.value).backward()
        with phase("update"):
            parameters = list(self.model.parameters())
            largest = self.config.optim.clip_norm * self.scale.value
            norm = clip_gradients(parameters, largest_norm=largest)
            self.scale.step(self.optimizer, parameters, norm)
        return found


def take_step(
    loss_of: nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: Batch,
    *,
    pairs: int,
    clip_norm: float,
    scale: LossScale,
) -> None:
    """Forward with the hardest negatives, backward, clipping and update.

    Args:
        loss_of: a `GlobalBatchLoss`.
        optimizer: of its parameters.
        batch: on the device.
        pairs: in the batch.
        clip_norm: largest norm of the gradient.
        scale: of the loss, with the precision of the step.
    """
    optimizer.zero_grad(set_to_none=True)
    with autocast(scale.precision, batch.image_ids.device):
        loss = loss_of(batch, "hardest", pairs)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    largest = clip_norm * scale.value
    norm = find_gradients(loss_of, loss * scale.value, parameters, clip_norm=largest)
    scale.step(optimizer, parameters, norm)


def _endless(num_pairs: int, batch_size: int) -> Iterator[BatchRequest]:
    """Global batches, epoch after epoch."""
    epoch = 0
    while True:
        yield from GlobalBatches(num_pairs, batch_size, seed=0, epoch=epoch)
        epoch += 1
