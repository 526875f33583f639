"""Photographs in, their regions out: boxes, labels, confidences and a feature vector each.

Axes:  region   of a photograph, the most confident first     feature   of a region vector
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float16, Float32, Int32, UInt8
from PIL import Image

from cpfean.errors import CheckpointError, ConfigError
from cpfean.photographs.backbones import Backbone
from cpfean.photographs.detectors import Detections, ObjectDetector
from cpfean.photographs.model_files import ModelFiles, find_model
from cpfean.photographs.pooling import pooled_regions
from cpfean.photographs.selection import PLACE, Chosen, choose
from cpfean.photographs.settings import GRID, ExtractionSettings
from cpfean.photographs.zero_shot import KINDS, ZeroShotDetector

Detector = ObjectDetector | ZeroShotDetector
# Pixels: 2,048 x 2,048, where DETR takes 1,333 x 800 and the largest OWLv2 1,008 x 1,008.
_LOOKED_AT = 2**22


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

    Everything is computed in float32, and no photograph changes what is found in another. On a CPU
    the bytes are the same in whatever batch a photograph comes; on a GPU they are the same in the
    same batch, and in another one the same numbers but for the rounding of matrix products.

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
        self.feature_dim = self._backbone.feature_dim if self._backbone else 0
        if self._detector is not None and settings.features != "backbone":
            (probe,) = self._detector([np.full((64, 64, 3), 127, dtype=np.uint8)])
            if not probe.embeddings.shape[1]:
                raise CheckpointError(
                    f"{settings.detector}: gives no embeddings of its queries; take features "
                    '"backbone".'
                )
            self.feature_dim += probe.embeddings.shape[1]

    @classmethod
    def from_provenance(
        cls,
        provenance: Mapping[str, Any],
        *,
        device: torch.device,
        detector: str | None = None,
        backbone: str | None = None,
    ) -> RegionExtractor:
        """The extractor that made a folder, by its `provenance.json`.

        Args:
            detector, backbone: where the same models are on this machine, if not under the names
                that were noted.

        Raises:
            ConfigError: a record that is damaged.
            CheckpointError: a model that is not there, or other weights than those of the record.
        """
        records = {}
        for part in ("settings", "detector", "backbone"):
            records[part] = {} if provenance.get(part) is None else provenance[part]
            if not isinstance(records[part], dict):
                raise ConfigError(f"provenance: expected an object as {part}, found another value.")
        if not records["settings"]:
            raise ConfigError("provenance: expected settings, found none.")
        settings = ExtractionSettings.from_dict(records["settings"])
        elsewhere = {"detector": detector, "backbone": backbone}
        for part, given in elsewhere.items():
            name, revision = getattr(settings, part), records[part].get("revision")
            if given is None and name and revision:  # as of then, whatever is newest now
                elsewhere[part] = f"{name.partition('@')[0]}@{revision}"
        extractor = cls(
            replace(
                settings,
                detector=elsewhere["detector"] or settings.detector,
                backbone=elsewhere["backbone"] or settings.backbone,
            ),
            device=device,
        )
        # It is to say of itself what the record says, wherever the files are now.
        found = extractor.provenance()
        for part in ("detector", "backbone"):
            for key in ("sha256", "settings_sha256"):
                has = (found[part] or {}).get(key)
                had = records[part].get(key)
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
        self, photographs: Sequence[UInt8[np.ndarray, "_height _width 3"]]
    ) -> list[PhotographRegions]:
        """The regions of each photograph, in order.

        Args:
            photographs: RGB and upright, of any sizes.

        Raises:
            CheckpointError: a model whose results are no finite numbers, or too large for float16.
        """
        seen = [_reduced(photograph) for photograph in photographs]
        found: Sequence[Detections | None] = [None] * len(photographs)
        if self._detector is not None and len(photographs):
            found = self._detector(seen)
        chosen = [
            choose(
                detections,
                size=(photograph.shape[1], photograph.shape[0]),
                num_regions=self.settings.num_regions,
                fill=self.settings.fill,
                max_overlap=self.settings.max_overlap,
            )
            for detections, photograph in zip(found, photographs, strict=True)
        ]
        parts: list[list[np.ndarray]] = [[] for _ in photographs]
        if self.settings.features != "backbone":
            for part, detections, regions in zip(parts, found, chosen, strict=True):
                assert detections is not None
                part.append(detections.embeddings[regions.queries])
        if self._backbone is not None and len(photographs):
            for part, features, regions in zip(parts, self._backbone(seen), chosen, strict=True):
                boxes = torch.from_numpy(regions.boxes).to(features.device)
                part.append(pooled_regions(features, boxes).float().cpu().numpy())
        return [
            self._finished(part, regions, size=(photograph.shape[1], photograph.shape[0]))
            for part, regions, photograph in zip(parts, chosen, photographs, strict=True)
        ]

    def _finished(
        self, parts: list[np.ndarray], chosen: Chosen, *, size: tuple[int, int]
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
        labels = np.where(chosen.labels < 0, self._place, chosen.labels)
        boxes = (chosen.boxes * np.array([width, height, width, height])).astype(np.float32)
        return PhotographRegions(
            features=half,
            boxes=boxes,
            size=size,
            labels=None if self.label_names is None else labels.astype(np.int32),
            scores=None if self._detector is None else chosen.scores.clip(0, 1),
        )

    def _called(self) -> str:
        names = [part.files.name for part in (self._detector, self._backbone) if part is not None]
        return " and ".join(names)


def _reduced(
    photograph: UInt8[np.ndarray, "height width 3"],
) -> UInt8[np.ndarray, "rows columns 3"]:
    """A photograph with at most four times as many pixels as a model could look at.

    Image processors make copies, and some of them as float32 squares: of 80 million pixels that
    is gigabytes. Means over whole squares of pixels, as Pillow's own `reducing_gap` takes them
    before a resize, leave nothing of it to be seen.
    """
    height, width = photograph.shape[:2]
    factor = math.isqrt(height * width // _LOOKED_AT)
    if factor < 2:
        return photograph
    return np.asarray(Image.fromarray(photograph).reduce(factor))


def _detector(files: ModelFiles, settings: ExtractionSettings, *, device: torch.device) -> Detector:
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
    return ZeroShotDetector(files, settings.vocabulary, min_score=settings.min_score, device=device)


def _described(part: Detector | Backbone | None) -> dict[str, Any] | None:
    return None if part is None else part.files.provenance(part.model)


__all__ = ["PLACE", "ExtractionSettings", "PhotographRegions", "RegionExtractor"]
