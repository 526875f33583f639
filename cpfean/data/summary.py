"""What is in a data folder, short enough to be checked by eye.

What no check can find shows here: labels that do not fit the captions beside them, features in an
odd range, boxes of people that are wider than tall.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cpfean.data.boxes import order_is_open
from cpfean.data.provenance import described, read_provenance
from cpfean.data.split import Split, open_split, split_stem, splits_of
from cpfean.errors import DataError
from cpfean.files import is_there

_SAMPLED = 64  # images whose features are looked at, evenly spread
_COMMONEST = 10  # labels
_SHOWN = 3  # captions
_AT_ONCE = 10_000  # images whose boxes are looked at together
_NOTHING = re.compile(r"_*(background|bg|none|nothing|no[ _-]?object)_*", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class SplitSummary:
    """One split.

    Attributes:
        images, captions: how many.
        captions_per_image: mean over the images.
        captions_least, captions_most: of an image.
        regions: stored for an image.
        regions_mean: real ones of an image.
        width: of a region's features.
        dtype: of them, as stored.
        sampled_images: how many the next four are about, evenly spread over the split.
        feature_min, feature_max, feature_mean: of the features of real regions.
        zero_share: of the same, how many are exactly zero, 0 to 1.
    """

    images: int
    captions: int
    captions_per_image: float
    captions_least: int
    captions_most: int
    regions: int
    regions_mean: float
    width: int
    dtype: str
    sampled_images: int
    feature_min: float
    feature_max: float
    feature_mean: float
    zero_share: float


@dataclass(frozen=True, kw_only=True)
class LabelSummary:
    """One of the commonest labels.

    Attributes:
        name: in the vocabulary.
        count: regions that have it, in all splits.
        tallness: median height of their boxes by their width; None without boxes.
    """

    name: str
    count: int
    tallness: float | None


@dataclass(frozen=True, kw_only=True)
class Example:
    """A caption with the labels of its image, the first regions first."""

    split: str
    image: str
    caption: str
    labels: list[str]


@dataclass(frozen=True, kw_only=True)
class FolderSummary:
    """A data folder.

    Attributes:
        splits: by name.
        labels: the commonest; empty without labels.
        examples: a few captions.
        provenance: what made the features, in a line; None where nothing tells.
        notes: what may be wrong and cannot be told from the files.
    """

    splits: dict[str, SplitSummary]
    labels: list[LabelSummary]
    examples: list[Example]
    notes: list[str]
    provenance: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)

    def lines(self) -> list[str]:
        """For people."""
        if not self.splits:
            return []
        rows = [
            f"{'':8}{'images':>9}{'captions':>10}{'each':>6}{'regions':>9}{'width':>7}"
            "  features: type, range, mean, zeros"
        ]
        for name, split in self.splits.items():
            few = split.regions_mean < split.regions
            regions = f"{split.regions_mean:.1f}" if few else f"{split.regions}"
            least, most = split.captions_least, split.captions_most
            each = f"{least}" if least == most else f"{least}-{most}"
            rows.append(
                f"{name:8}{split.images:9,}{split.captions:10,}{each:>6}"
                f"{regions:>9}{split.width:7,}  {split.dtype}, {split.feature_min:.3g} to "
                f"{split.feature_max:.3g}, {split.feature_mean:.3g}, {split.zero_share:.1%}"
            )
        if any(split.sampled_images < split.images for split in self.splits.values()):
            rows.append(f"(features of {_SAMPLED} images of each split, evenly spread)")
        if self.provenance:
            rows.append(f"made by extract.py: {self.provenance}")
        if self.labels:
            tall = [label for label in self.labels if label.tallness is not None]
            named = ", ".join(f"{label.name} {label.count:,}" for label in self.labels)
            rows.append(f"commonest labels: {named}")
            if tall:
                shapes = ", ".join(f"{label.name} {label.tallness:.2f}" for label in tall)
                rows.append(f"height of their boxes by width, median: {shapes}")
        if self.examples:
            rows.append("captions, to be read beside the labels of their images:")
        for example in self.examples:
            labels = ", ".join(example.labels) or "no labels"
            rows.append(f"  {example.split} {example.image}: {example.caption} [{labels}]")
        rows += [f"note: {note}" for note in self.notes]
        return rows


def summarize(folder: Path, *, splits: Sequence[str] | None = None) -> FolderSummary:
    """Looks at those splits of a folder that have no fault; takes seconds at any size.

    Args:
        splits: their names; None for all that the folder is meant to have.
    """
    opened = []
    for name in splits_of(folder) if splits is None else splits:
        if not is_there(folder / f"{split_stem(folder, name)}_ims.npy"):
            continue
        try:
            opened.append(open_split(folder, name, num_regions=None, overlaps=False))
        except DataError:
            continue  # what is wrong with it is told by the checks
    return FolderSummary(
        splits={split.name: _summary(split) for split in opened},
        labels=_labels(opened),
        examples=_examples(opened[0]) if opened and opened[0].captions else [],
        notes=_notes(opened),
        provenance=_provenance(folder),
    )


def _provenance(folder: Path) -> str | None:
    try:
        told = read_provenance(folder)
    except DataError:
        return None  # as above
    return None if told is None else described(told)


def label_hints(splits: Sequence[Split]) -> list[str]:
    """What may be wrong with the numbers of the labels, if they do not begin with the first."""
    labelled = [split for split in splits if split.label_names]
    if not labelled:
        return []
    names = labelled[0].label_names or []
    counts = _label_counts(labelled, len(names))
    empty = _NOTHING.fullmatch(names[0]) is not None
    if not counts[0] and not empty:
        return [
            f"label 0 ({names[0]}) occurs nowhere in {counts.sum():,} labels: do they count from "
            "1? If the labels below do not fit the captions, convert with --labels-from 1"
        ]
    if counts[0] and empty and not counts[-1]:
        return [
            f"label 0 ({names[0]}) occurs and the last ({names[-1]}) does not: if the labels leave "
            f"the background out, take {names[0]} out of objects_vocab.txt"
        ]
    return []


def _notes(splits: Sequence[Split]) -> list[str]:
    notes = label_hints(splits)
    open_order = [split.name for split in splits if _order_is_open(split)]
    if open_order and len(open_order) == len(splits):
        notes.append(
            "every box fits into its image with x and y exchanged too, so that nothing tells which "
            "comes first; x1, y1, x2, y2 is taken (else convert with --box-order yxyx)"
        )
    return notes


def _order_is_open(split: Split) -> bool:
    regions = split.regions
    if regions.geometry is None or regions.sizes is None:
        return False
    real = _real(split)
    for start in range(0, split.num_images, _AT_ONCE):
        part = slice(start, start + _AT_ONCE)
        kept = real[part]
        sizes = np.broadcast_to(regions.sizes[part, None], (*kept.shape, 2))[kept]
        boxes = regions.geometry[part, :, :4][kept] * np.tile(sizes, 2)
        if not order_is_open(boxes, sizes):
            return False
    return True


def _summary(split: Split) -> SplitSummary:
    regions = split.regions
    chosen = np.unique(np.linspace(0, split.num_images - 1, _SAMPLED).astype(np.int64))
    least, most, total, zeros, number = np.inf, -np.inf, 0.0, 0, 0
    for image in chosen:  # one at a time: a few hundred kilobytes
        values = np.asarray(regions.features[image, : regions.counts[image]], dtype=np.float64)
        least, most = min(least, values.min()), max(most, values.max())
        total += values.sum()
        zeros += int((values == 0).sum())
        number += values.size
    return SplitSummary(
        images=split.num_images,
        captions=split.num_captions,
        captions_per_image=round(split.num_captions / split.num_images, 2),
        captions_least=int(split.groups.sizes.min()),
        captions_most=int(split.groups.sizes.max()),
        regions=regions.num_regions,
        regions_mean=round(float(regions.counts.mean()), 2),
        width=regions.feature_dim,
        dtype=regions.features.dtype.name,
        sampled_images=len(chosen),
        feature_min=float(least),
        feature_max=float(most),
        feature_mean=total / number,
        zero_share=zeros / number,
    )


def _label_counts(splits: Sequence[Split], num_labels: int) -> np.ndarray:
    counts = np.zeros(num_labels, dtype=np.int64)
    for split in splits:
        if split.regions.labels is not None:
            counts += np.bincount(split.regions.labels[_real(split)], minlength=num_labels)
    return counts


def _real(split: Split) -> np.ndarray:
    return np.arange(split.regions.num_regions) < split.regions.counts[:, None]


def _labels(splits: Sequence[Split]) -> list[LabelSummary]:
    names = next((split.label_names for split in splits if split.label_names), None)
    if names is None:
        return []
    counts = _label_counts(splits, len(names))
    result = []
    for label in np.argsort(-counts, kind="stable")[:_COMMONEST]:
        if not counts[label]:
            break
        result.append(
            LabelSummary(
                name=names[label], count=int(counts[label]), tallness=_tallness(splits, int(label))
            )
        )
    return result


def _tallness(splits: Sequence[Split], label: int) -> float | None:
    ratios = []
    for split in splits:
        regions = split.regions
        if regions.labels is None or regions.geometry is None or regions.sizes is None:
            continue
        image, region = np.nonzero(_real(split) & (regions.labels == label))
        boxes = regions.geometry[image, region, :4].astype(np.float64)
        sides = (boxes[:, 2:] - boxes[:, :2]) * regions.sizes[image]
        ratios.append(sides[:, 1] / sides[:, 0])
    values = np.concatenate(ratios) if ratios else np.zeros(0)
    return round(float(np.median(values)), 3) if len(values) else None


def _examples(split: Split) -> list[Example]:
    examples = []
    for image in np.unique(np.linspace(0, split.num_images - 1, _SHOWN).astype(np.int64)):
        labels: list[str] = []
        if split.label_names is not None and split.regions.labels is not None:
            real = split.regions.labels[image, : split.regions.counts[image]]
            labels = list(dict.fromkeys(split.label_names[label] for label in real))[:_COMMONEST]
        examples.append(
            Example(
                split=split.name,
                image=split.image_ids[image],
                caption=split.captions[split.captions_of(int(image)).start],
                labels=labels,
            )
        )
    return examples
