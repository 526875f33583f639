"""One's own photograph before a gallery: its regions are made as those of the gallery were.

Axes:  height, width   pixels        region   of the photograph
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from jaxtyping import UInt8

from cpfean.analysis.pair_views import ShownImage
from cpfean.data.batch import ImageBatch, each_once
from cpfean.data.provenance import PROVENANCE, read_provenance
from cpfean.data.regions import region_geometry, region_overlaps
from cpfean.data.split import Split
from cpfean.errors import DataError
from cpfean.model.cpfean import Cpfean
from cpfean.photographs.extractor import PhotographRegions, RegionExtractor
from cpfean.search.hits import EncodedImage


def open_extractor(folder: Path, split: Split, *, device: torch.device) -> RegionExtractor:
    """What made the regions of a folder.

    Raises:
        CheckpointError, ConfigError: its models cannot be loaded, or are others by now.
        DataError: nothing tells what made the regions, or it makes others.
    """
    told = read_provenance(folder)
    if told is None:
        raise DataError(
            f"the data has no {PROVENANCE}, so nothing tells which detector and backbone made its "
            "regions, and regions of others would mean nothing to the model. Data that "
            "experiments/extract.py made has one."
        )
    extractor = RegionExtractor.from_provenance(told, device=device)
    width = split.regions.feature_dim
    if extractor.feature_dim != width:
        raise DataError(
            f"{PROVENANCE} names models that make features of width "
            f"{extractor.feature_dim}, and those of the gallery have {width}."
        )
    return extractor


@torch.inference_mode()
def encode_photograph(
    pixels: UInt8[np.ndarray, "height width 3"],
    extractor: RegionExtractor,
    model: Cpfean,
    *,
    split: Split,
    name: str,
) -> EncodedImage:
    """A photograph as the model sees it.

    Args:
        pixels: RGB, upright.
        extractor: that made the gallery.
        model: in evaluation mode.
        split: the gallery, as whose images it is treated.
        name: what to call it.

    Raises:
        DataError: its regions lack what the gallery's have.
    """
    (found,) = extractor([pixels])
    real = slice(0, split.regions.num_regions)
    batch = _batch(found, real, split, label_names=extractor.label_names)
    device = next(model.parameters()).device
    boxes = found.boxes[real].astype(np.float64) / np.tile(np.array(found.size), 2)
    labels = None
    if found.labels is not None and extractor.label_names is not None:
        labels = [extractor.label_names[label] for label in found.labels[real]]
    return EncodedImage(
        shown=ShownImage(
            name=name,
            position=None,
            boxes=boxes,
            labels=labels,
            aspect=found.size[0] / found.size[1],
        ),
        encoded=model.encode_images(**batch.to(device)._asdict()),
    )


def _batch(
    found: PhotographRegions, real: slice, split: Split, *, label_names: list[str] | None
) -> ImageBatch:
    """The one image, with those fields that the gallery's have."""
    stored = split.regions
    corners = found.boxes[real].astype(np.float64)[None]
    geometry = iou = labels = confidences = None
    if stored.geometry is not None:
        sizes = np.array([found.size], dtype=np.float64)
        geometry = torch.from_numpy(region_geometry(corners, sizes))
        iou = torch.from_numpy(region_overlaps(corners))
    if stored.labels is not None:
        if found.labels is None or label_names != split.label_names:
            raise DataError(
                "the detector that the data names has other labels than objects_vocab.txt; both "
                "must come from one extraction."
            )
        labels = torch.from_numpy(found.labels[real].astype(np.int64))[None]
    if stored.confidences is not None:
        if found.scores is None:
            raise DataError("the detector that the data names gives no confidences.")
        confidences = torch.from_numpy(found.scores[real].astype(np.float32))[None]
    features = torch.from_numpy(found.features[real])[None]
    return ImageBatch(
        features=features,
        geometry=geometry,
        iou=iou,
        labels=labels,
        shown_labels=each_once(labels),
        confidences=confidences,
        region_mask=torch.ones(features.shape[:2], dtype=torch.bool),
    )
