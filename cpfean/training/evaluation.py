"""Recall on a split: every image and caption is encoded once, every pair scored once.

Axes:  image, caption   of a gallery: the whole split, or a fold of it

Processes share the work: each encodes some captions and sends them to the others, then scores its
own images against all captions. In memory are the captions' embeddings and one batch of images, on
a GPU several; their scores are counted and forgotten. Several models go through the images side by
side, so that the mean of their scores is counted likewise.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import ExitStack, closing
from itertools import pairwise
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int, Int32
from torch import Tensor

from cpfean.config import Products
from cpfean.data.caption_groups import PER_IMAGE
from cpfean.data.dataset import RetrievalDataset
from cpfean.data.prefetch import prefetched
from cpfean.data.split import Split, open_split
from cpfean.errors import DataError
from cpfean.metrics.best import BestCandidates
from cpfean.metrics.retrieval import RankCounter, RetrievalMetrics, folds
from cpfean.model.cpfean import Cpfean
from cpfean.model.embeddings import CaptionEmbeddings, ImageEmbeddings
from cpfean.model.scoring import in_products
from cpfean.processes import place, sent_from, share
from cpfean.progress import Progress
from cpfean.training.precision import Precision, autocast

COCO_FOLD = 1000
Protocol = Literal["full", "coco-1k"]
# Fewer captions than this are no group: what scoring prepares once for all captions that it is
# given, and for each image, would show.
_FEW = 256
# Images that a GPU scores at a time, so many of them in whole batches: what scoring prepares of all
# captions is prepared that often. A processor goes by batches, whose memory is the smaller.
SCORED_ON_GPU = 1024


def evaluate(
    model: Cpfean,
    dataset: RetrievalDataset,
    *,
    protocol: Protocol,
    batch_size: int,
    device: torch.device,
    products: Products = "fp32",
    precision: Precision = "fp32",
    fold: int = COCO_FOLD,
) -> RetrievalMetrics:
    """Metrics of a split; every process returns the same.

    Args:
        model: on `device`; put into evaluation mode and back.
        dataset: the split.
        protocol: "full", or "coco-1k" for the mean over consecutive folds of images; a fold's
            images are scored with its own captions only.
        batch_size: images or captions encoded at a time, and images scored, of which a GPU takes
            as many batches as 1,024 have room for.
        device: where to compute.
        products: type of the matrix products of scoring; all else of it is in the model's type.
        precision: of the encoders, that of the training for the model that was trained.
        fold: images of one fold of "coco-1k"; any other number than 1000 is for trying it out.

    Raises:
        DataError: "coco-1k" on a split that does not have what it asks for.
        DivergedError: a score is not finite; raised on every process.
    """
    (found,) = evaluate_together(
        [Member(model, dataset, products, precision)],
        protocol=protocol,
        batch_size=batch_size,
        device=device,
        fold=fold,
    )
    return found.metrics


class Member(NamedTuple):
    """A model, the split as it reads it, and the types of its scoring's products and encoders."""

    model: Cpfean
    dataset: RetrievalDataset
    products: Products = "fp32"
    precision: Precision = "fp32"


class Kept(NamedTuple):
    """How many of the best captions of an image, and images of a caption, are kept."""

    captions_each: int
    images_each: int


class Evaluated(NamedTuple):
    """The recalls, and the best candidates of every query if they were asked for."""

    metrics: RetrievalMetrics
    best: BestCandidates | None


@torch.inference_mode()
def evaluate_together(
    members: Sequence[Member],
    *,
    protocol: Protocol,
    batch_size: int,
    device: torch.device,
    fold: int = COCO_FOLD,
    keep: Kept | None = None,
) -> list[Evaluated]:
    """What each model comes to on a split, and behind them, of several, the mean of their scores.

    The mean is that of the scores as they are, in float64: a model whose scores spread more has
    more of a say.

    Args:
        members: at least one, all with the same split of the same data.
        protocol, batch_size, device, fold: as in `evaluate`.
        keep: the best candidates to be kept, in one process and with "full" alone.

    Raises:
        DataError, DivergedError: as `evaluate`.
    """
    split = members[0].dataset.split
    galleries = galleries_of(split, protocol, fold=fold)
    if keep is not None and len(galleries) > 1:
        raise ValueError("best candidates are those of a whole split")
    was_training = [member.model.training for member in members]
    for member in members:
        member.model.eval()
    try:
        found = []
        for number, gallery in enumerate(galleries, start=1):
            name = split.name
            if len(galleries) > 1:
                name = f"{name}, fold {number} of {len(galleries)}"
            counted = _count_ranks(
                members, gallery, name=name, batch_size=batch_size, device=device, keep=keep
            )
            found.append([Evaluated(ranks.metrics(), best) for ranks, best in counted])
    finally:
        for member, training in zip(members, was_training, strict=True):
            member.model.train(training)
    return [
        Evaluated(RetrievalMetrics.mean([each.metrics for each in folds]), folds[0].best)
        for folds in zip(*found, strict=True)
    ]


def galleries_of(split: Split, protocol: Protocol, *, fold: int = COCO_FOLD) -> list[range]:
    """The images of a split that are ranked together.

    Args:
        split: any, for "full".
        protocol, fold: as in `evaluate`.

    Raises:
        DataError: "coco-1k" on a split that does not divide into folds, or of which an image has
            another number of captions than five: its recalls would be compared with published
            ones that they have nothing in common with.
    """
    if protocol == "full":
        return [range(split.num_images)]
    if not split.groups.is_default:
        raise DataError(
            f"{split.name}: the COCO 1K protocol ranks folds of {fold} images with "
            f"{PER_IMAGE} captions each, and the images have {split.groups.described}; convert "
            f"with --captions-each {PER_IMAGE}, which keeps the first of each, or choose "
            'evaluation.protocol = "full".'
        )
    return folds(split.num_images, fold_size=fold)


def check_protocol(folder: Path, protocol: Protocol) -> None:
    """Refuses data on which the protocol would fail, when a training has come to its evaluation.

    Args:
        folder: checked, in the native format; its dev and test splits are opened.
        protocol: as in `evaluate`.

    Raises:
        DataError: as `galleries_of`.
    """
    if protocol != "full":
        for name in ("dev", "test"):
            galleries_of(open_split(folder, name, num_regions=None, overlaps=False), protocol)


@torch.inference_mode()
def score_matrix(
    model: Cpfean,
    dataset: RetrievalDataset,
    *,
    gallery: range,
    batch_size: int,
    device: torch.device,
    products: Products = "fp32",
    precision: Precision = "fp32",
) -> Float[Tensor, "image caption"]:
    """All scores of some images with their captions, for looking at single queries; one process.

    `query_ranks` makes of it the ranks that `evaluate` counts. It takes four bytes a pair, on the
    CPU: 5 MB for 500 images, 500 MB for 5000.

    Args:
        model: in evaluation mode, on `device`.
        dataset: the split.
        gallery: the images, by their positions in the split.
        batch_size, device, products, precision: as in `evaluate`.
    """
    rows = _score_rows(
        model,
        dataset,
        gallery,
        name=dataset.split.name,
        batch_size=batch_size,
        device=device,
        products=products,
        precision=precision,
    )
    return torch.cat([scores.cpu() for _, scores in rows])


def _count_ranks(
    members: Sequence[Member],
    gallery: range,
    *,
    name: str,
    batch_size: int,
    device: torch.device,
    keep: Kept | None,
) -> list[tuple[RankCounter, BestCandidates | None]]:
    """Counts what this process's share of a gallery's images tells, in the order of the results."""
    groups = members[0].dataset.split.groups
    captions = groups.of_images(gallery)
    image_of_caption = torch.from_numpy(groups.image_of_caption[captions.start : captions.stop])
    dtypes = [member.model.word_projection.weight.dtype for member in members]
    if len(members) > 1:
        dtypes.append(torch.float64)
    counted: list[tuple[RankCounter, BestCandidates | None]] = []
    for dtype in dtypes:
        ranks = RankCounter(gallery, captions, image_of_caption, dtype=dtype, device=device)
        best = None
        if keep is not None:
            best = BestCandidates(
                len(gallery), len(captions), **keep._asdict(), dtype=dtype, device=device
            )
        counted.append((ranks, best))
    with ExitStack() as stack:
        rows = []
        for number, member in enumerate(members, start=1):
            of = f", model {number} of {len(members)}" if len(members) > 1 else ""
            rows.append(
                stack.enter_context(
                    closing(
                        _score_rows(
                            member.model,
                            member.dataset,
                            gallery,
                            name=f"{name}{of}",
                            batch_size=batch_size,
                            device=device,
                            products=member.products,
                            precision=member.precision,
                        )
                    )
                )
            )
        for blocks in zip(*rows, strict=True):
            first = blocks[0][0]
            scores = [block for _, block in blocks]
            if len(scores) > 1:
                scores.append(torch.stack([block.double() for block in scores]).mean(dim=0))
            for (ranks, best), block in zip(counted, scores, strict=True):
                ranks.add(block, first=first)
                if best is not None:
                    best.add(block, first=first - gallery.start)
    return counted


def _score_rows(
    model: Cpfean,
    dataset: RetrievalDataset,
    gallery: range,
    *,
    name: str,
    batch_size: int,
    device: torch.device,
    products: Products,
    precision: Precision,
) -> Generator[tuple[int, Float[Tensor, "image caption"]], None, None]:
    """Scores this process's share of a gallery's images with all its captions, block by block.

    Yields:
        The position of a block's first image in the split, and the scores of the block.
    """
    rank, world_size = place()
    own_captions = dataset.split.groups.of_images(gallery)
    captions = _encode_captions(
        model,
        dataset,
        own_captions,
        name=name,
        batch_size=batch_size,
        device=device,
        precision=precision,
    )
    dtype = model.word_projection.weight.dtype
    begin, end = share(len(gallery), rank=rank, world_size=world_size)
    own = gallery[begin:end]
    progress = Progress(f"scoring {name}", total=len(own))
    blocks = [own[start : start + batch_size] for start in range(0, len(own), batch_size)]
    on_gpu = device.type == "cuda"
    together = max(1, SCORED_ON_GPU // batch_size) if on_gpu else 1
    encoded: list[ImageEmbeddings] = []
    with prefetched(map(dataset.image_batch, blocks), pin=on_gpu) as batches:
        for block, batch in zip(blocks, batches, strict=True):
            fields = batch.to(device, non_blocking=on_gpu)._asdict()
            with autocast(precision, device):
                encoded.append(model.encode_images(**fields))
            if len(encoded) < together and block.stop < own.stop:
                continue
            images = ImageEmbeddings.joined(encoded)
            encoded.clear()
            scores = torch.empty(len(images.pooled), len(own_captions), dtype=dtype, device=device)
            with in_products(products, device):
                for columns, embedded in captions:
                    scores[:, columns] = model.score(images, embedded)
            yield block.stop - len(scores), scores
            progress.step(block.stop - own.start)


def _encode_captions(
    model: Cpfean,
    dataset: RetrievalDataset,
    captions: range,
    *,
    name: str,
    batch_size: int,
    device: torch.device,
    precision: Precision,
) -> list[tuple[Int[Tensor, "caption"], CaptionEmbeddings]]:
    """The captions in groups of similar length, with their columns in the gallery's scores."""
    rank, world_size = place()
    num_words = np.asarray(dataset.tokens.num_words)[captions.start : captions.stop]
    order = np.argsort(num_words, kind="stable")
    groups = []
    for part in length_groups(num_words[order]):
        columns = order[part]
        groups.append((columns, _room_for(num_words[columns], model=model, device=device)))
    batches = [
        (columns, embedded, slice(start, start + batch_size))
        for columns, embedded in groups
        for start in range(0, len(columns), batch_size)
    ]
    # All of one's own before anything is sent: else the processes would encode one by one, each
    # waiting for what the one before it sends.
    # And all equally often, the last batch twice if need be: a sharded encoder is put together by
    # all processes at once.
    turns = range(-(-len(batches) // world_size))
    mine = [batches[min(rank + turn * world_size, len(batches) - 1)] for turn in turns]
    made = (dataset.caption_batch(captions.start + columns[rows]) for columns, _, rows in mine)
    on_gpu = device.type == "cuda"
    progress = Progress(f"encoding captions of {name}", total=len(mine))
    with prefetched(made, pin=on_gpu) as ready:
        for done, ((_, embedded, rows), batch) in enumerate(zip(mine, ready, strict=True), start=1):
            fields = batch.to(device, non_blocking=on_gpu)._asdict()
            with autocast(precision, device):
                words, _, pooled, salience = model.encode_captions(**fields)
            embedded.words[rows, : words.shape[1]] = words
            embedded.pooled[rows] = pooled
            embedded.salience[rows, : words.shape[1]] = salience
            progress.step(done)
    for number, (_, embedded, rows) in enumerate(batches):
        sent_from(embedded.words[rows], owner=number % world_size)
        sent_from(embedded.pooled[rows], owner=number % world_size)
        sent_from(embedded.salience[rows], owner=number % world_size)
    return [(torch.as_tensor(columns, device=device), embedded) for columns, embedded in groups]


def length_groups(num_words: Int32[np.ndarray, "caption"], *, few: int = _FEW) -> list[slice]:
    """Captions of one length together; lengths that few captions have join the next longer ones.

    Args:
        num_words: of the captions, in rising order.
        few: fewer than this are no group.
    """
    edges = [0]
    for edge in np.flatnonzero(np.diff(num_words)) + 1:
        if edge - edges[-1] >= few:
            edges.append(int(edge))
    return [slice(start, stop) for start, stop in pairwise([*edges, len(num_words)])]


def _room_for(
    num_words: Int32[np.ndarray, "caption"], *, model: Cpfean, device: torch.device
) -> CaptionEmbeddings:
    """Captions of so many words, whose embeddings are yet to be filled in."""
    lengths = torch.as_tensor(num_words, device=device)
    longest = int(num_words.max())
    mask = torch.arange(longest, device=device) < lengths[:, None]
    like = model.word_projection.weight
    words = like.new_zeros((len(num_words), longest, model.config.dim))
    pooled = like.new_zeros((len(num_words), model.config.dim))
    return CaptionEmbeddings(words, mask, pooled, like.new_ones(mask.shape))
