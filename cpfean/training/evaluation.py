"""All scores of a split, every image and caption encoded exactly once.

Axes:  image     of the split, or this process's contiguous share     caption   of the whole split

Processes share the work: each encodes some captions and sends them to the others, and scores its
own images against all captions. Ranks are counts of better candidates, so the counts travel and the
score matrix does not.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from cpfean.data.dataset import RetrievalDataset
from cpfean.errors import DataError
from cpfean.metrics.retrieval import (
    RecallAtK,
    RetrievalMetrics,
    better_captions,
    better_images,
    fold_slices,
    match_scores,
)
from cpfean.model.cpfean import Cpfean
from cpfean.model.embeddings import CaptionEmbeddings
from cpfean.processes import place, sent_from, share, summed
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
        protocol: "full", or "coco-1k" for the mean over consecutive folds of 1000 images.
        batch_size: images or captions encoded at a time.
        device: where to compute.

    Raises:
        DataError: "coco-1k" on a split that does not divide into folds.
        DivergedError: a score is not finite.
    """
    num_images, per_image = dataset.split.num_images, dataset.split.captions_per_image
    folds = [(slice(0, num_images), slice(0, num_images * per_image))]
    if protocol == "coco-1k":
        folds = fold_slices(num_images, fold_size=COCO_FOLD, captions_per_image=per_image)
    was_training = model.training
    model.eval()
    try:
        start, scores = score_rows(model, dataset, batch_size=batch_size, device=device)
    finally:
        model.train(was_training)
    metrics = [
        _fold_metrics(scores, start, rows, columns, captions_per_image=per_image)
        for rows, columns in folds
    ]
    return RetrievalMetrics.mean(metrics)


def score_rows(
    model: Cpfean, dataset: RetrievalDataset, *, batch_size: int, device: torch.device
) -> tuple[int, Float[Tensor, "image caption"]]:
    """This process's share of the score matrix, on the CPU, and the index of its first row."""
    rank, world_size = place()
    num_images = dataset.split.num_images
    if num_images < world_size:
        raise DataError(
            f"{dataset.split.name}: {num_images} images for {world_size} workers; use fewer."
        )
    start, stop = share(num_images, rank=rank, world_size=world_size)
    captions = _encode_captions(model, dataset, batch_size=batch_size, device=device)
    scores = torch.empty(stop - start, dataset.split.num_captions)
    progress = Progress(f"scoring {dataset.split.name}", total=stop - start)
    for first in range(start, stop, batch_size):
        index = np.arange(first, min(first + batch_size, stop))
        batch = dataset.image_batch(index).to(device)
        images = model.encode_images(**batch._asdict())
        row = first - start
        for columns, embedded in captions:
            scores[row : row + len(index), columns] = model.score(images, embedded).to(scores)
        progress.step(row + len(index))
    return start, scores


def _encode_captions(
    model: Cpfean, dataset: RetrievalDataset, *, batch_size: int, device: torch.device
) -> list[tuple[Int[Tensor, "caption"], CaptionEmbeddings]]:
    """All captions in batches of similar length, with the columns they belong in."""
    rank, world_size = place()
    num_words = np.asarray(dataset.tokens.num_words)
    order = np.argsort(num_words, kind="stable")
    progress = Progress(f"encoding captions of {dataset.split.name}", total=len(order))
    batches = []
    for number, start in enumerate(range(0, len(order), batch_size)):
        index = order[start : start + batch_size]
        owner = number % world_size
        if owner == rank:
            batch = dataset.caption_batch(index).to(device)
            embedded = model.encode_captions(**batch._asdict())
        else:
            shape = (len(index), int(num_words[index].max()), model.config.dim)
            like = model.word_projection.weight
            words, pooled = like.new_empty(shape), like.new_empty((shape[0], shape[2]))
            lengths = torch.as_tensor(num_words[index], device=device)
            mask = torch.arange(shape[1], device=device) < lengths[:, None]
            embedded = CaptionEmbeddings(words, mask, pooled)
        sent_from(embedded.words, owner=owner)
        sent_from(embedded.pooled, owner=owner)
        batches.append((torch.as_tensor(index), embedded))
        progress.step(start + len(index))
    return batches


def _fold_metrics(
    scores: Float[Tensor, "image caption"],
    start: int,
    rows: slice,
    columns: slice,
    *,
    captions_per_image: int,
) -> RetrievalMetrics:
    """The metrics of one fold, from every process's rows of it."""
    low, high = max(start, rows.start), min(start + scores.shape[0], rows.stop)
    own = scores[max(low - start, 0) : max(high - start, 0), columns]
    first = min(max(low - rows.start, 0), rows.stop - rows.start)
    layout = {"first": first, "captions_per_image": captions_per_image}
    num_images = rows.stop - rows.start

    captions = torch.zeros(num_images, dtype=torch.int64)
    captions[first : first + len(own)] = better_captions(own, **layout)
    matches = torch.zeros(num_images, captions_per_image)
    matches[first : first + len(own)] = match_scores(own, **layout)
    matches = _everywhere(matches)
    images = better_images(own, matches.flatten(), **layout)
    return RetrievalMetrics(
        image_to_text=RecallAtK.from_counts(_everywhere(captions)),
        text_to_image=RecallAtK.from_counts(_everywhere(images)),
    )


def _everywhere(tensor: Tensor) -> Tensor:
    """The sum over processes of a CPU tensor, by way of the device the processes talk through."""
    if place()[1] == 1:
        return tensor
    if torch.distributed.get_backend() == "nccl":
        return summed(tensor.cuda()).cpu()
    return summed(tensor)
