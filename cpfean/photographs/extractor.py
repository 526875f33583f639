"""Photographs in, their regions out: boxes, labels, confidences and a feature vector each.

Axes:  region   of a photograph, the most confident first     feature   of a region vector
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
import torch
from jaxtyping import Float16, Float32, Float64, Int32, Int64, UInt8

from cpfean.errors import CheckpointError, ConfigError
from cpfean.photographs.backbones import Backbone
from cpfean.photographs.detectors import Detections, Detector, ObjectDetector
from cpfean.photographs.grid import grid_boxes
from cpfean.photographs.pooling import pooled_regions
from cpfean.photographs.pretrained import ModelFiles, find_model
from cpfean.photographs.settings import GRID, ExtractionSettings
from cpfean.photographs.suppression import overlaps, suppressed
from cpfean.photographs.zero_shot import KINDS, ZeroShotDetector

# What a region is called that no detector has found. It is a place and no thing, so it gets a line
# of the vocabulary that says no more than that, and confidence 0, by which a model trusts its label
# as little as it can. To hand it the detector's best guess instead would put names into captions'
# way that the detector itself rejected.
PLACE = "region"
_MOST_FILLERS = 2000  # boxes of the grid that are tried


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
    """A detector, or the grid, and what stands for its regions.

    Everything is computed in float32 and by the same steps for each photograph, whatever it is
    called together with: the same batch gives the same bytes, another batch the same numbers but
    for the rounding of matrix products.

    Attributes:
        settings: what it does.
        label_names: names of the labels, a line each; None with the detector "grid" and for a
            detector that knows no names.
        feature_dim: width of a region's vector.
    """

    def __init__(self, settings: ExtractionSettings, *, device: torch.device) -> None:
        """Loads the models; what is not on this machine is fetched.

        Raises:
            CheckpointError: a model that is not there, of another kind, or damaged.
            ConfigError: a vocabulary where there has to be none, or none where there has to be one.
        """
        self.settings = settings
        self._detector: Detector | None = None
        self._backbone: Backbone | None = None
        if settings.detector != GRID:
            files = find_model(settings.detector, what="detector")
            self._detector = _detector(files, settings, device=device)
        if settings.backbone is not None:
            self._backbone = Backbone(
                find_model(settings.backbone, what="backbone"),
                device=device,
                resolution=settings.resolution,
            )
        names = self._detector.label_names if self._detector else None
        self.label_names = None if names is None else [*names, *([PLACE] * (PLACE not in names))]
        self._place = self.label_names.index(PLACE) if self.label_names else 0
        self._fillers = grid_boxes(_MOST_FILLERS)
        self.feature_dim = self._backbone.feature_dim if self._backbone else 0
        if self._detector is not None and settings.features != "backbone":
            (probe,) = self._detector([np.full((64, 64, 3), 127, dtype=np.uint8)])
            self.feature_dim += probe.embeddings.shape[1]

    @classmethod
    def from_provenance(
        cls,
        provenance: Mapping[str, Any],
        *,
        device: torch.device,
        detector: str | None = None,
        backbone: str | None = None,
    ) -> Self:
        """The extractor that made a folder, by its `provenance.json`.

        Args:
            detector, backbone: where the same models are on this machine, if not under the names
                that were noted.

        Raises:
            ConfigError: a record that is damaged.
            CheckpointError: a model that is not there, or other weights than those of the record.
        """
        noted = provenance.get("settings")
        if not isinstance(noted, dict):
            raise ConfigError("provenance: expected settings, found none.")
        settings = ExtractionSettings.from_dict(noted)
        elsewhere = {"detector": detector, "backbone": backbone}
        for part, given in elsewhere.items():
            record = provenance.get(part) or {}
            name, revision = getattr(settings, part), record.get("revision")
            if given is None and name and revision:  # as of then, whatever is newest now
                elsewhere[part] = f"{name.partition('@')[0]}@{revision}"
        there = {part: name for part, name in elsewhere.items() if name is not None}
        extractor = cls(replace(settings, **there), device=device)
        # It is to say of itself what the record says, wherever the files are now.
        found = extractor.provenance()
        for part in ("detector", "backbone"):
            for key in ("sha256", "settings_sha256"):
                has = (found[part] or {}).get(key)
                had = (provenance.get(part) or {}).get(key)
                if has != had:
                    what = "weights" if key == "sha256" else "settings"
                    raise CheckpointError(
                        f"{part} {getattr(extractor.settings, part)!r}: other {what} than the "
                        f"regions were made with (SHA-256 {str(has)[:12]}, noted "
                        f"{str(had)[:12]}); give the same model."
                    )
        return extractor

    def provenance(self) -> dict[str, Any]:
        """What the regions depend on, in plain JSON types."""
        import PIL
        import transformers

        return {
            "settings": self.settings.to_dict(),
            "detector": _described(self._detector),
            "backbone": _described(self._backbone),
            "versions": {
                "torch": torch.__version__,
                "transformers": transformers.__version__,
                "numpy": np.__version__,
                "pillow": PIL.__version__,
            },
        }

    def __call__(
        self, photographs: Sequence[UInt8[np.ndarray, "height width 3"]]
    ) -> list[PhotographRegions]:
        """The regions of each photograph, in order.

        Args:
            photographs: RGB and upright, of any sizes.

        Raises:
            CheckpointError: a model whose results are no finite numbers, or too large for float16.
        """
        found: Sequence[Detections | None] = [None] * len(photographs)
        if self._detector is not None and len(photographs):
            found = self._detector(photographs)
        chosen = [
            self._chosen(detections, size=(photograph.shape[1], photograph.shape[0]))
            for detections, photograph in zip(found, photographs, strict=True)
        ]
        parts: list[list[np.ndarray]] = [[] for _ in photographs]
        if self.settings.features != "backbone":
            for part, detections, regions in zip(parts, found, chosen, strict=True):
                assert detections is not None
                part.append(detections.embeddings[regions.queries])
        if self._backbone is not None and len(photographs):
            for part, features, regions in zip(
                parts, self._backbone(photographs), chosen, strict=True
            ):
                boxes = torch.from_numpy(regions.boxes).to(features.device)
                part.append(pooled_regions(features, boxes).float().cpu().numpy())
        return [
            self._finished(part, regions, size=(photograph.shape[1], photograph.shape[0]))
            for part, regions, photograph in zip(parts, chosen, photographs, strict=True)
        ]

    def _chosen(self, detections: Detections | None, *, size: tuple[int, int]) -> _Chosen:
        """The best detections that do not overlap too much, and boxes of the grid after them."""
        settings = self.settings
        if detections is None:
            return _Chosen(
                boxes=self._fillers[: settings.num_regions],
                labels=np.zeros(settings.num_regions, dtype=np.int64),
                scores=np.zeros(settings.num_regions, dtype=np.float32),
                queries=np.zeros(0, dtype=np.int64),
            )
        # A box of less than a pixel shows nothing.
        sides = (detections.boxes[:, 2:] - detections.boxes[:, :2]) * np.array(size)
        candidates = np.flatnonzero((sides >= 1).all(axis=1))
        kept = suppressed(
            detections.boxes[candidates],
            max_overlap=settings.max_overlap,
            most=settings.num_regions,
        )
        kept = candidates[kept]
        wanted = settings.num_regions - len(kept) if settings.fill else int(not len(kept))
        fillers = _fitting(
            self._fillers, detections.boxes[kept], wanted, max_overlap=settings.max_overlap
        )
        # A place has no query; the one that looked at most of the same pixels speaks for it.
        nearest = [int(overlaps(box, detections.query_boxes).argmax()) for box in fillers]
        return _Chosen(
            boxes=np.concatenate((detections.boxes[kept], fillers)),
            labels=np.concatenate(
                (detections.labels[kept], np.full(len(fillers), self._place, dtype=np.int64))
            ),
            scores=np.concatenate(
                (detections.scores[kept], np.zeros(len(fillers), dtype=np.float32))
            ),
            queries=np.concatenate((detections.queries[kept], np.array(nearest, dtype=np.int64))),
        )

    def _finished(
        self, parts: list[np.ndarray], chosen: _Chosen, *, size: tuple[int, int]
    ) -> PhotographRegions:
        features = np.concatenate(parts, axis=1).astype(np.float32)
        with np.errstate(over="ignore"):
            half = features.astype(np.float16)
        if not np.isfinite(half).all():
            raise CheckpointError(
                f"{self._called()}: a feature of {np.abs(features).max():.3g}, and float16 ends at "
                "65,504; take another model."
            )
        if not half.any(axis=1).all():
            raise CheckpointError(
                f"{self._called()}: a region whose features are all zero in float16 (largest "
                f"{np.abs(features[~half.any(axis=1)]).max():.3g}); take another model."
            )
        width, height = size
        boxes = (chosen.boxes * np.array([width, height, width, height])).astype(np.float32)
        return PhotographRegions(
            features=half,
            boxes=boxes,
            size=size,
            labels=None if self.label_names is None else chosen.labels.astype(np.int32),
            scores=None if self._detector is None else chosen.scores.clip(0, 1),
        )

    def _called(self) -> str:
        names = [part.files.name for part in (self._detector, self._backbone) if part is not None]
        return " and ".join(names)


@dataclass(frozen=True, kw_only=True)
class _Chosen:
    """The regions of a photograph before they have features; boxes in shares."""

    boxes: Float64[np.ndarray, "region 4"]
    labels: Int64[np.ndarray, " region"]
    scores: Float32[np.ndarray, " region"]
    queries: Int64[np.ndarray, " query"]


def _detector(
    files: ModelFiles, settings: ExtractionSettings, *, device: torch.device
) -> Detector:
    if settings.vocabulary is None and files.kind in KINDS:
        raise ConfigError(
            f"{files.name}: a zero-shot detector ({files.kind}) looks for what it is told to; give "
            "a vocabulary, a name a line."
        )
    if settings.vocabulary is None:
        return ObjectDetector(files, min_score=settings.min_score, device=device)
    if files.kind not in KINDS:
        raise ConfigError(
            f"{files.name}: a detector with classes of its own ({files.kind}) takes no vocabulary; "
            "leave it out, or take a zero-shot detector such as google/owlv2-base-patch16-ensemble."
        )
    return ZeroShotDetector(
        files, settings.vocabulary, min_score=settings.min_score, device=device
    )


def _fitting(
    grid: Float64[np.ndarray, "box 4"],
    kept: Float64[np.ndarray, "region 4"],
    count: int,
    *,
    max_overlap: float,
) -> Float64[np.ndarray, "filler 4"]:
    """The first boxes of the grid that are not nearly a region which is there already."""
    free = np.ones(len(grid), dtype=bool)
    for box in kept:
        free &= overlaps(box, grid) <= max_overlap
    return grid[free][:count]


def _described(part: Detector | Backbone | None) -> dict[str, Any] | None:
    return None if part is None else part.files.provenance(part.model)


__all__ = ["PLACE", "ExtractionSettings", "PhotographRegions", "RegionExtractor"]
