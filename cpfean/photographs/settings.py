"""What defines an extraction of regions: settings in, the same numbers out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, Self, get_args

from cpfean.config import nearest
from cpfean.errors import ConfigError

GRID = "grid"
DEFAULT_DETECTOR = "PekingU/rtdetr_v2_r50vd"
DEFAULT_BACKBONE = "facebook/dinov2-small"
Features = Literal["detector", "backbone", "both"]


@dataclass(frozen=True, kw_only=True)
class ExtractionSettings:
    """Which regions a photograph has, and what stands for each.

    The default detector is RT-DETR v2 with a ResNet-50 (Apache-2.0). It is pure torch, with no
    compiled kernel to build and no `timm`; it needs no suppression to be tuned; and it sees every
    photograph as 640 x 640 pixels, so that on a GPU photographs of all shapes share a batch. DETR's
    640 to 1,333 pixels a side have several times the cost in its encoder's attention, and it is
    known to miss small things; D-FINE (Apache-2.0 too) is as sound a choice, and one flag away. All
    three know COCO's 80 classes. The default backbone is DINOv2 (Apache-2.0): trained without
    captions or classes, so that nothing a model is tested on has gone into it, and its patches
    tell parts of a photograph apart. Neither was compared with others here by what it does for
    retrieval.

    Attributes:
        detector: "grid", or a hub name (NAME, or NAME@REVISION) or a folder of an object detector;
            of a zero-shot one with `vocabulary`.
        vocabulary: what a zero-shot detector looks for, a name each.
        features: "detector" takes the embedding of the object query of each region, "backbone" the
            mean of a backbone's feature map inside its box, "both" the first beside the second.
        backbone: a hub name or a folder of a vision model; None for `DEFAULT_BACKBONE`, where one
            is needed.
        resolution: side in pixels of the square with as many pixels as the backbone is given; None
            for what its own image processor says.
        num_regions: R, most regions of a photograph.
        fill: whether a photograph with fewer detections is filled up from the grid. An image has
            one region at least: without any detection it is the whole photograph.
        min_score: least confidence of a detection. Low on purpose: a region that is not mentioned
            costs little, its gate closes and its label is trusted by its confidence, while one
            that was left out can never be found again.
        max_overlap: most IoU of two regions; of two that overlap more, the less confident is left
            out, whatever the labels. 0.7 is what region proposals have used since Faster R-CNN.

    Raises:
        ConfigError: a value out of its range, or two that do not go together.
    """

    detector: str = DEFAULT_DETECTOR
    vocabulary: tuple[str, ...] | None = None
    features: Features = "backbone"
    backbone: str | None = None
    resolution: int | None = None
    num_regions: int = 36
    fill: bool = True
    min_score: float = 0.1
    max_overlap: float = 0.7

    def __post_init__(self) -> None:
        if self.features not in get_args(Features):
            raise ConfigError(
                f'features must be "detector", "backbone" or "both"; got {self.features!r}.'
            )
        if not self.detector.strip():
            raise ConfigError('detector must be "grid", a hub name or a folder; got nothing.')
        if self.detector == GRID and self.features != "backbone":
            raise ConfigError(
                f'features must be "backbone" with the detector "grid", which has no queries; got '
                f"{self.features!r}."
            )
        if self.detector == GRID and self.vocabulary is not None:
            raise ConfigError('a vocabulary is for zero-shot detectors; got one with "grid".')
        if self.features == "detector" and self.backbone is not None:
            raise ConfigError(
                f'a backbone is for features "backbone" or "both"; got {self.backbone!r} with '
                '"detector".'
            )
        if self.features == "detector" and self.resolution is not None:
            raise ConfigError('a resolution is the backbone\'s; got one with features "detector".')
        if self.resolution is not None and not 32 <= self.resolution <= 4096:
            raise ConfigError(f"resolution must be from 32 to 4096; got {self.resolution}.")
        if not 1 <= self.num_regions <= 1000:
            raise ConfigError(f"num_regions must be from 1 to 1000; got {self.num_regions}.")
        if not 0.0 <= self.min_score < 1.0:
            raise ConfigError(f"min_score must be in [0, 1); got {self.min_score}.")
        if not 0.0 < self.max_overlap <= 1.0:
            raise ConfigError(f"max_overlap must be in (0, 1], an IoU; got {self.max_overlap}.")
        if self.vocabulary is not None:
            _check_vocabulary(self.vocabulary)
        if self.backbone is None and self.features != "detector":
            object.__setattr__(self, "backbone", DEFAULT_BACKBONE)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        plain = asdict(self)
        return plain | {"vocabulary": None if self.vocabulary is None else list(self.vocabulary)}

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> Self:
        """What `to_dict` gave.

        Raises:
            ConfigError: an unknown name, a value of another type, or one out of its range.
        """
        known = {item.name for item in fields(cls)}
        for name in plain:
            if name not in known:
                raise ConfigError(f"unknown setting {name!r}{nearest(name, known)}")
        for name, kinds in _TYPES.items():
            value = plain.get(name, getattr(cls, name))
            if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
                raise ConfigError(f"{name} has another type than it can have: {value!r}.")
        vocabulary = plain.get("vocabulary")
        return cls(**{**plain, "vocabulary": None if vocabulary is None else tuple(vocabulary)})


_NONE = type(None)
_TYPES: dict[str, tuple[type, ...]] = {
    "detector": (str,),
    "vocabulary": (list, tuple, _NONE),
    "features": (str,),
    "backbone": (str, _NONE),
    "resolution": (int, _NONE),
    "num_regions": (int,),
    "fill": (bool,),
    "min_score": (int, float),
    "max_overlap": (int, float),
}


def _check_vocabulary(vocabulary: tuple[str, ...]) -> None:
    if not vocabulary:
        raise ConfigError("the vocabulary must have a name at least; got none.")
    seen: dict[str, int] = {}
    for line, name in enumerate(vocabulary, start=1):
        if not isinstance(name, str) or " ".join(name.split()) != name or not name:
            raise ConfigError(
                f"vocabulary, line {line}: expected a name without blanks around it, got {name!r}."
            )
        if not name.isprintable() or "." in name:
            raise ConfigError(
                f"vocabulary, line {line}: expected letters, digits and blanks (a full stop ends a "
                f"name for some detectors), got {name!r}."
            )
        key = name.casefold()
        if key in seen:
            raise ConfigError(
                f"vocabulary, line {line}: {name!r} is there already, on line {seen[key]}; drop "
                "one."
            )
        seen[key] = line
