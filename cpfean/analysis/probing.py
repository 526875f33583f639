"""How trained models do on a split that is disturbed, cut, or looked at part by part.

Axes:  image, caption   of the split         region   stored for an image
       bin              a part of the images, by how many objects they show

Every measurement ends in recalls as `evaluate` counts them. The gallery is always the whole split.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import comb
from pathlib import Path
from types import MappingProxyType

import numpy as np
import torch
from jaxtyping import Bool, Int

from cpfean.data.caption_groups import CaptionGroups
from cpfean.data.dataset import RetrievalDataset
from cpfean.data.disturb import (
    drop_words,
    noisy_features,
    replace_labels,
    replace_words,
    shuffle_words,
)
from cpfean.data.regions import RegionStore
from cpfean.data.split import Split, open_split
from cpfean.errors import DataError
from cpfean.metrics.retrieval import QueryRanks, RecallAtK, RetrievalMetrics
from cpfean.model.text_encoder import TextBackbone
from cpfean.training.setup import TrainedModel
from cpfean.training.text_cache import encode_frozen

_AREA = 4  # of a region's geometry: the share of the image that its box covers


def open_whole(folder: Path, name: str) -> Split:
    """Opens a split with all regions that are stored.

    Args:
        folder: in the native format, checked.
        name: of the split.

    Raises:
        DataError: as `open_split`.
    """
    return open_split(folder, name, num_regions=None)


def first_regions(split: Split, count: int) -> Split:
    """The split with the first so many regions of each image, as if it were opened with them."""

    def cut(array: np.ndarray | None) -> np.ndarray | None:
        return None if array is None else array[:, :count]

    whole = split.regions
    if count >= whole.num_regions:
        return split
    regions = RegionStore(
        features=whole.features[:, :count],
        geometry=cut(whole.geometry),
        iou=None if whole.iou is None else whole.iou[:, :count, :count],
        labels=cut(whole.labels),
        confidences=cut(whole.confidences),
        counts=np.minimum(whole.counts, count),
        num_clipped=whole.num_clipped,
        sizes=whole.sizes,
    )
    return replace(split, regions=regions)


@dataclass(frozen=True, kw_only=True)
class Disturbance:
    """One way to spoil a split.

    Attributes:
        name: for people, and of the tables.
        unit: what a share is a share of.
        apply: from the split, a share and a seed to the spoilt split; share 0 changes nothing.
        needs_labels: the split must have object labels.
    """

    name: str
    unit: str
    apply: Callable[[Split, float, int], Split]
    needs_labels: bool = False


def _reworded(change: Callable[..., list[str]]) -> Callable[[Split, float, int], Split]:
    def apply(split: Split, share: float, seed: int) -> Split:
        return replace(split, captions=change(split.captions, share, seed=seed))

    return apply


def _relabelled(split: Split, share: float, seed: int) -> Split:
    regions, names = split.regions, split.label_names
    assert regions.labels is not None
    assert names is not None
    if len(names) < 2:
        raise DataError(
            f"{split.name}: objects_vocab.txt has a single label: there is no other one."
        )
    labels = replace_labels(
        regions.labels, share, counts=regions.counts, num_labels=len(names), seed=seed
    )
    return replace(split, regions=replace(regions, labels=labels))


def _noisy(split: Split, share: float, seed: int) -> Split:
    features = noisy_features(split.regions.features, share, seed=seed)
    return replace(split, regions=replace(split.regions, features=features))


DISTURBANCES: Mapping[str, Disturbance] = MappingProxyType(
    {
        each.name: each
        for each in (
            Disturbance(name="words dropped", unit="words", apply=_reworded(drop_words)),
            Disturbance(name="words replaced", unit="words", apply=_reworded(replace_words)),
            Disturbance(name="words shuffled", unit="words", apply=_reworded(shuffle_words)),
            Disturbance(
                name="labels replaced", unit="regions", apply=_relabelled, needs_labels=True
            ),
            Disturbance(name="feature noise", unit="rms of the feature", apply=_noisy),
        )
    }
)


def dataset_for(
    trained: TrainedModel, split: Split, *, num_regions: int, cache_dir: Path
) -> RetrievalDataset:
    """A split the way that a model sees it, like the one that it was opened with.

    Args:
        trained: the model.
        split: the model's own, with all its regions, as it is or disturbed.
        num_regions: the first so many are kept.
        cache_dir: for what a frozen text encoder makes of captions that are not the model's own;
            large, and of use as long as other models with the same encoder are shown the same.

    Raises:
        DataError: a caption in which the tokenizer finds no word.
    """
    own = trained.dataset
    seen = first_regions(split, num_regions)
    if split.captions == own.split.captions:
        return RetrievalDataset(
            seen, own.tokens, trained.tokenizer, word_features=own.word_features
        )
    tokens = trained.tokenizer.encode(split.captions)
    dataset = RetrievalDataset(seen, tokens, trained.tokenizer)
    backbone = trained.model.backbone
    if not backbone.trainable:
        device = next(trained.model.parameters()).device
        dataset.word_features = encode_frozen(dataset, backbone, cache_dir=cache_dir, device=device)
    return dataset


def share_frozen_encoder(trained: TrainedModel, *, known: dict[str, TextBackbone]) -> None:
    """Lets models with the same frozen text encoder hold it once: it is most of their memory.

    Args:
        trained: its encoder is replaced by the known one with the same weights, or becomes known.
        known: encoders by fingerprint.
    """
    backbone = trained.model.backbone
    if not backbone.trainable:
        trained.model.backbone = known.setdefault(backbone.fingerprint(), backbone)


@dataclass(frozen=True, kw_only=True)
class Bin:
    """Images with a similar number of objects.

    Attributes:
        low, high: the least and the most that an image of it has.
        images: which images.
    """

    low: int
    high: int
    images: Bool[np.ndarray, " image"]

    @property
    def label(self) -> str:
        """The range of the number: "3" or "3-7"."""
        return str(self.low) if self.low == self.high else f"{self.low}-{self.high}"


def object_counts(
    split: Split, *, least_confidence: float, least_area: float
) -> dict[str, Int[np.ndarray, " image"]]:
    """How many prominent objects every image shows, counted in as many ways as the data allows.

    Args:
        split: with all its regions.
        least_confidence: a region is a detected object if the confidence in its label is above.
        least_area: a box is large if it covers more than this share of the image.

    Returns:
        "detected objects" and "different labels" of these, for data with labels and confidences;
        "large boxes", for data with boxes.
    """
    regions = split.regions
    real = np.arange(regions.num_regions) < regions.counts[:, None]
    found = {}
    if regions.confidences is not None and regions.labels is not None:
        detected = real & (regions.confidences > least_confidence)
        found["detected objects"] = detected.sum(axis=1)
        found["different labels"] = np.array(
            [
                len(np.unique(labels[which]))
                for labels, which in zip(regions.labels, detected, strict=True)
            ]
        )
    if regions.geometry is not None:
        found["large boxes"] = (real & (regions.geometry[..., _AREA] > least_area)).sum(axis=1)
    return found


def quantile_bins(counts: Int[np.ndarray, " image"], number: int) -> list[Bin]:
    """Bins of about as many images each; images with the same count are never parted.

    Args:
        counts: of every image.
        number: of bins, at most: where many images have the same count there are fewer.
    """
    shares = np.arange(1, number) / number
    edges = np.unique(np.quantile(counts, shares, method="inverted_cdf"))
    of_image = np.searchsorted(edges, counts, side="left")
    members = [of_image == which for which in np.unique(of_image)]
    return [
        Bin(low=int(counts[images].min()), high=int(counts[images].max()), images=images)
        for images in members
    ]


def recalls_of(
    ranks: QueryRanks, images: Bool[np.ndarray, " image"], *, groups: CaptionGroups
) -> RetrievalMetrics:
    """The recalls of some images and of their captions as queries, among the whole gallery.

    Args:
        ranks: of all queries.
        images: which images, at least one.
        groups: of the captions.
    """
    captions = images[groups.image_of_caption]
    return QueryRanks(
        images=ranks.images[torch.from_numpy(images)],
        captions=ranks.captions[torch.from_numpy(captions)],
    ).metrics()


def chance_metrics(groups: CaptionGroups) -> RetrievalMetrics:
    """The recalls that ranking at random is expected to have.

        caption: K / images        image: mean of 1 - C(others, K) / C(captions, K)

    An image counts as found if any of its captions is among the first K; `others` are not its own.
    """
    captions = groups.num_captions
    times = Counter(groups.sizes.tolist())  # how many images have so many captions

    def image(k: int) -> float:
        if k >= captions:
            return 100.0
        missed = sum(n * comb(captions - size, k) for size, n in times.items())
        return 100 * (1 - missed / (groups.num_images * comb(captions, k)))

    def caption(k: int) -> float:
        return 100 * min(1.0, k / groups.num_images)

    return RetrievalMetrics(
        image_to_text=RecallAtK(r1=image(1), r5=image(5), r10=image(10)),
        text_to_image=RecallAtK(r1=caption(1), r5=caption(5), r10=caption(10)),
    )


def region_counts(stored: int, wanted: Sequence[int]) -> list[int]:
    """Those of the wanted region counts that the data has; if it has not all, what it has too."""
    counts = [count for count in wanted if count <= stored]
    if stored < max(wanted) and stored not in counts:
        counts.append(stored)
    return counts


__all__ = [
    "DISTURBANCES",
    "Bin",
    "Disturbance",
    "chance_metrics",
    "dataset_for",
    "first_regions",
    "object_counts",
    "open_whole",
    "quantile_bins",
    "recalls_of",
    "region_counts",
    "share_frozen_encoder",
]
