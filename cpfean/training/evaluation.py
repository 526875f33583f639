"""Recall on a split: every image and caption is encoded once, every pair scored once.

Axes:  image, caption   of a gallery: the whole split, or a fold of it

Processes share the work: each encodes some captions and sends them to the others, then scores its
own images against all captions. In memory are the captions' embeddings and one batch of images;
the scores of a batch are counted and forgotten.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from jaxtyping import Int, Int32
from torch import Tensor

from cpfean.data.dataset import RetrievalDataset
from cpfean.data.prefetch import prefetched
from cpfean.metrics.retrieval import RankCounter, RetrievalMetrics, folds
from cpfean.model.cpfean import Cpfean
from cpfean.model.embeddings import CaptionEmbeddings
from cpfean.processes import place, sent_from, share
from cpfean.training.progress import Progress

COCO_FOLD = 1000


@torch.inference_mode()
def evaluate(
    model: Cpfean,
    dataset: RetrievalDataset,
    *,
    protocol: Literal["full", "coco-1k"],
    batch_size: int,
    device: torch.device,
) -> RetrievalMetrics:
    """Metrics of a split; every process returns the same.

    Args:
        model: on `device`; put into evaluation mode and back.
        dataset: the split.
        protocol: "full", or "coco-1k" for the mean over consecutive folds of 1000 images; a fold's
            images are scored with its own captions only.
        batch_size: images or captions encoded at a time.
        device: where to compute.

    Raises:
        DataError: "coco-1k" on a split that does not divide into folds.
        DivergedError: a score is not finite; raised on every process.
    """
    galleries = [range(dataset.split.num_images)]
    if protocol == "coco-1k":
        galleries = folds(dataset.split.num_images, fold_size=COCO_FOLD)
    was_training = model.training
    model.eval()
    try:
        metrics = []
        for number, gallery in enumerate(galleries, start=1):
            name = dataset.split.name
            if len(galleries) > 1:
                name = f"{name}, fold {number} of {len(galleries)}"
            ranks = _count_ranks(
                model, dataset, gallery, name=name, batch_size=batch_size, device=device
            )
            metrics.append(ranks.metrics())
    finally:
        model.train(was_training)
    return RetrievalMetrics.mean(metrics)


def _count_ranks(
    model: Cpfean,
    dataset: RetrievalDataset,
    gallery: range,
    *,
    name: str,
    batch_size: int,
    device: torch.device,
) -> RankCounter:
    """Scores this process's share of a gallery's images against all its captions."""
    rank, world_size = place()
    per_image = dataset.split.captions_per_image
    captions = _encode_captions(
        model,
        dataset,
        range(gallery.start * per_image, gallery.stop * per_image),
        name=name,
        batch_size=batch_size,
        device=device,
    )
    dtype = model.word_projection.weight.dtype
    ranks = RankCounter(gallery, captions_per_image=per_image, dtype=dtype, device=device)
    begin, end = share(len(gallery), rank=rank, world_size=world_size)
    own = gallery[begin:end]
    progress = Progress(f"scoring {name}", total=len(own))
    blocks = [own[start : start + batch_size] for start in range(0, len(own), batch_size)]
    on_gpu = device.type == "cuda"
    with prefetched(map(dataset.image_batch, blocks), pin=on_gpu) as batches:
        for block, batch in zip(blocks, batches, strict=True):
            images = model.encode_images(**batch.to(device, non_blocking=on_gpu)._asdict())
            scores = torch.empty(len(block), len(gallery) * per_image, dtype=dtype, device=device)
            for columns, embedded in captions:
                scores[:, columns] = model.score(images, embedded)
            ranks.add(scores, first=block.start)
            if ranks.diverged:
                break
            progress.step(block.stop - own.start)
    return ranks


def _encode_captions(
    model: Cpfean,
    dataset: RetrievalDataset,
    captions: range,
    *,
    name: str,
    batch_size: int,
    device: torch.device,
) -> list[tuple[Int[Tensor, "caption"], CaptionEmbeddings]]:
    """The captions in batches of similar length, with their columns in the gallery's scores."""
    rank, world_size = place()
    num_words = np.asarray(dataset.tokens.num_words)[captions.start : captions.stop]
    order = np.argsort(num_words, kind="stable")
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    # All of one's own before anything is sent: else the processes would encode one by one, each
    # waiting for what the one before it sends.
    encoded = {}
    progress = Progress(f"encoding captions of {name}", total=len(batches))
    on_gpu = device.type == "cuda"
    mine = range(rank, len(batches), world_size)
    made = (dataset.caption_batch(captions.start + batches[number]) for number in mine)
    with prefetched(made, pin=on_gpu) as ready:
        for number, batch in zip(mine, ready, strict=True):
            fields = batch.to(device, non_blocking=on_gpu)._asdict()
            encoded[number] = model.encode_captions(**fields)
            progress.step(number + 1)
    result = []
    for number, columns in enumerate(batches):
        embedded = encoded.pop(number, None)
        if embedded is None:
            embedded = _room_for(num_words[columns], model=model, device=device)
        sent_from(embedded.words, owner=number % world_size)
        sent_from(embedded.pooled, owner=number % world_size)
        result.append((torch.as_tensor(columns, device=device), embedded))
    return result


def _room_for(
    num_words: Int32[np.ndarray, "caption"], *, model: Cpfean, device: torch.device
) -> CaptionEmbeddings:
    """Captions of so many words whose embeddings another process is to fill in."""
    lengths = torch.as_tensor(num_words, device=device)
    longest = int(num_words.max())
    mask = torch.arange(longest, device=device) < lengths[:, None]
    like = model.word_projection.weight
    words = like.new_empty((len(num_words), longest, model.config.dim))
    return CaptionEmbeddings(words, mask, like.new_empty((len(num_words), model.config.dim)))
