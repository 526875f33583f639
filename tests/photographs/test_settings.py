"""What can be asked of an extraction."""

from __future__ import annotations

import json
from typing import Any

import pytest

from cpfean.errors import ConfigError
from cpfean.photographs.settings import DEFAULT_BACKBONE, DEFAULT_DETECTOR, ExtractionSettings

SOME = [
    ExtractionSettings(),
    ExtractionSettings(detector="grid", num_regions=7, fill=False, resolution=448),
    ExtractionSettings(detector="a/b@main", features="detector", min_score=0, max_overlap=1),
    ExtractionSettings(detector="x", vocabulary=("dog", "teddy bear"), features="both"),
]


@pytest.mark.parametrize("settings", SOME)
def test_settings_survive_json(settings: ExtractionSettings) -> None:
    plain = json.loads(json.dumps(settings.to_dict()))
    assert ExtractionSettings.from_dict(plain) == settings


def test_a_backbone_is_named_where_one_is_needed_and_only_there() -> None:
    assert ExtractionSettings().detector == DEFAULT_DETECTOR
    assert ExtractionSettings().backbone == DEFAULT_BACKBONE
    assert ExtractionSettings(features="detector").backbone is None


@pytest.mark.parametrize(
    ("values", "part"),
    [
        ({"features": "pixels"}, 'features must be "detector"'),
        ({"detector": " "}, "detector must be"),
        ({"detector": "grid", "features": "detector"}, "has no queries"),
        ({"detector": "grid", "vocabulary": ("dog",)}, "for zero-shot detectors"),
        ({"features": "detector", "backbone": "a/b"}, 'for features "backbone"'),
        ({"features": "detector", "resolution": 224}, "resolution is the backbone's"),
        ({"resolution": 8}, "from 32 to 4096; got 8"),
        ({"num_regions": 0}, "from 1 to 1000; got 0"),
        ({"min_score": 1.0}, r"in \[0, 1\); got 1.0"),
        ({"min_score": float("nan")}, "min_score must be"),
        ({"max_overlap": 0.0}, r"in \(0, 1\], an IoU; got 0.0"),
        ({"vocabulary": ()}, "a name at least"),
        ({"vocabulary": ("dog", " cat")}, "line 2: expected a name without blanks"),
        ({"vocabulary": ("dog", "")}, "line 2"),
        ({"vocabulary": ("dog", "a. b")}, "line 2: expected letters"),
        ({"vocabulary": ("dog", "cat", "Dog")}, "line 3: 'Dog' is there already, on line 1"),
    ],
)
def test_what_cannot_be_done_is_refused(values: dict[str, Any], part: str) -> None:
    with pytest.raises(ConfigError, match=part):
        ExtractionSettings(**values)


@pytest.mark.parametrize(
    ("plain", "part"),
    [
        ({"detektor": "grid"}, "'detektor'.*detector"),
        ({"detector": 3}, "detector has another type"),
        ({"num_regions": True}, "num_regions has another type"),
        ({"num_regions": 3.5}, "num_regions has another type"),
        ({"fill": 1}, "fill has another type"),
        ({"vocabulary": "dog"}, "vocabulary has another type"),
        ({"vocabulary": [3]}, "line 1"),
    ],
)
def test_a_record_of_another_shape_is_refused(plain: dict[str, Any], part: str) -> None:
    with pytest.raises(ConfigError, match=part):
        ExtractionSettings.from_dict(plain)
