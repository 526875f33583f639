"""Photographs in, their regions out: boxes, labels, confidences and a feature vector each.

Axes:  region   of a photograph, the most confident first     feature   of a region vector
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from jaxtyping import Float16, Float32, Int32, UInt8

from cpfean.photographs.settings import ExtractionSettings


@dataclass(frozen=True, kw_only=True)
class PhotographRegions:
    """The regions of one photograph, at least one and at most R.

    Attributes:
        features: one vector each; finite, none of them all zero.
        boxes: x1, y1, x2, y2 in pixels of the upright photograph, inside it, x1 < x2 and y1 < y2.
        size: width and height in the same pixels.
        labels: lines of `RegionExtractor.label_names`; None where there are no names.
        scores: confidence, from 0 to 1; None with the detector "grid".
    """

    features: Float16[np.ndarray, "region feature"]
    boxes: Float32[np.ndarray, "region 4"]
    size: tuple[int, int]
    labels: Int32[np.ndarray, " region"] | None
    scores: Float32[np.ndarray, " region"] | None


class RegionExtractor:
    """A detector, or the grid, and what stands for its regions."""

    label_names: list[str] | None
    feature_dim: int

    def __init__(self, settings: ExtractionSettings, *, device: torch.device) -> None:
        self.settings = settings
        raise NotImplementedError

    @classmethod
    def from_provenance(cls, provenance: Mapping[str, Any], *, device: torch.device) -> Self:
        """The extractor that made a folder, by its `provenance.json`."""
        raise NotImplementedError

    def provenance(self) -> dict[str, Any]:
        """What the regions depend on, in plain JSON types."""
        raise NotImplementedError

    def __call__(
        self, photographs: Sequence[UInt8[np.ndarray, "height width 3"]]
    ) -> list[PhotographRegions]:
        """The regions of each photograph, in order."""
        raise NotImplementedError


__all__ = ["ExtractionSettings", "PhotographRegions", "RegionExtractor"]
