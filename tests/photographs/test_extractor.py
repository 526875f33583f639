"""Photographs to regions, whatever the detector and the features."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from cpfean.errors import CheckpointError, ConfigError
from cpfean.photographs.extractor import (
    PLACE,
    ExtractionSettings,
    PhotographRegions,
    RegionExtractor,
)
from cpfean.photographs.grid import grid_boxes
from cpfean.photographs.suppression import overlaps

Made = Callable[[str], Path]
CPU = torch.device("cpu")
VOCABULARY = ("dog", "red kite", "traffic light")


def extractor(made: Made, detector: str, features: str, **others: Any) -> RegionExtractor:
    zero_shot = detector in ("owlv2", "grounding_dino")
    settings = ExtractionSettings(
        **{
            "detector": detector if detector == "grid" else str(made(detector)),
            "features": features,
            "backbone": None if features == "detector" else str(made("dinov2")),
            "vocabulary": VOCABULARY if zero_shot else None,
            "num_regions": 20,
            **others,
        }
    )
    return RegionExtractor(settings, device=CPU)


WAYS = [
    ("grid", "backbone"),
    *itertools.product(
        ("rt_detr_v2", "d_fine", "detr", "owlv2", "grounding_dino"),
        ("detector", "backbone", "both"),
    ),
]


@pytest.mark.parametrize(("detector", "features"), WAYS)
def test_regions_are_what_the_native_format_takes(
    detector: str, features: str, made: Made, photographs: list[np.ndarray]
) -> None:
    extract = extractor(made, detector, features)
    for regions, photograph in zip(extract(photographs), photographs, strict=True):
        height, width = photograph.shape[:2]
        assert regions.size == (width, height)
        assert regions.features.dtype == np.float16
        assert regions.features.shape == (20, extract.feature_dim)
        assert np.isfinite(regions.features).all()
        assert regions.features.any(axis=1).all()
        assert regions.boxes.dtype == np.float32
        assert (regions.boxes >= 0).all()
        assert (regions.boxes <= [width, height] * 2).all()
        assert (regions.boxes[:, 2:] - regions.boxes[:, :2] >= 0.99).all()
        if detector == "grid":
            assert regions.labels is None
            assert regions.scores is None
            assert extract.label_names is None
            continue
        assert regions.labels is not None
        assert regions.scores is not None
        assert extract.label_names is not None
        assert regions.labels.dtype == np.int32
        assert set(regions.labels) <= set(range(len(extract.label_names)))
        assert (np.diff(regions.scores) <= 0).all()
        assert ((regions.scores >= 0.1) | (regions.scores == 0)).all()
        places = regions.labels == extract.label_names.index(PLACE)
        np.testing.assert_array_equal(places, regions.scores == 0)


@pytest.mark.parametrize(("detector", "features"), WAYS)
def test_a_photograph_has_the_same_bytes_in_any_batch(
    detector: str, features: str, made: Made, photographs: list[np.ndarray]
) -> None:
    extract = extractor(made, detector, features)
    for photograph, regions in zip(photographs, extract(photographs), strict=True):
        (alone,) = extract([photograph])
        assert alone.features.tobytes() == regions.features.tobytes()
        assert alone.boxes.tobytes() == regions.boxes.tobytes()


def test_more_pixels_than_are_looked_at_change_nothing(made: Made) -> None:
    small = np.random.default_rng(0).integers(0, 256, (1600, 2700, 3), dtype=np.uint8)
    large = small.repeat(3, axis=0).repeat(3, axis=1)
    extract = extractor(made, "rt_detr_v2", "both")
    (few,), (many,) = extract([small]), extract([large])
    assert many.size == (8100, 4800)
    np.testing.assert_array_equal(many.features, few.features)
    np.testing.assert_allclose(many.boxes, 3 * few.boxes, rtol=1e-6)


def test_both_is_the_detectors_beside_the_backbones(
    made: Made, photographs: list[np.ndarray]
) -> None:
    ways = {way: extractor(made, "rt_detr_v2", way) for way in ("detector", "backbone", "both")}
    found = {way: extract(photographs) for way, extract in ways.items()}
    for first, second, both in zip(
        found["detector"], found["backbone"], found["both"], strict=True
    ):
        np.testing.assert_array_equal(first.boxes, both.boxes)
        beside = np.concatenate((first.features, second.features), axis=1)
        np.testing.assert_array_equal(both.features, beside)


@pytest.mark.parametrize("backbone", ["dinov2", "siglip", "siglip2", "vit", "convnext"])
def test_nothing_is_printed_that_was_not_asked_for(
    backbone: str,
    made: Made,
    photographs: list[np.ndarray],
    capfd: pytest.CaptureFixture[str],
    recwarn: pytest.WarningsRecorder,
) -> None:
    detector = {"vit": "owlv2", "siglip": "detr"}.get(backbone, "rt_detr_v2")
    folder = str(made(backbone)), str(made(detector))
    capfd.readouterr()
    extractor(made, detector, "both", backbone=folder[0])(photographs)
    assert capfd.readouterr() == ("", "")
    assert [str(warning.message) for warning in recwarn] == []


def test_the_grid_is_the_grid(made: Made, photographs: list[np.ndarray]) -> None:
    (regions,) = extractor(made, "grid", "backbone")(photographs[:1])
    np.testing.assert_allclose(regions.boxes, grid_boxes(20) * [90, 60, 90, 60], rtol=1e-6)


def found_and_filled(regions: PhotographRegions) -> tuple[np.ndarray, np.ndarray]:
    assert regions.scores is not None
    return regions.boxes[regions.scores > 0], regions.boxes[regions.scores == 0]


@pytest.mark.parametrize("limit", [0.2, 0.5, 0.8])
def test_no_region_that_was_found_overlaps_too_much_with_another(
    limit: float, made: Made, photographs: list[np.ndarray]
) -> None:
    extract = extractor(made, "owlv2", "backbone", max_overlap=limit, min_score=0.0)
    for regions in extract(photographs):
        found, filled = found_and_filled(regions)
        assert len(found) > 1
        for position, box in enumerate(found):
            assert (overlaps(box, found[:position]) <= limit + 1e-6).all()
            assert (overlaps(box, filled) <= limit + 1e-6).all()


def test_without_filling_there_are_as_many_as_were_found(
    made: Made, photographs: list[np.ndarray]
) -> None:
    filled = extractor(made, "rt_detr_v2", "backbone", num_regions=36)(photographs)
    bare = extractor(made, "rt_detr_v2", "backbone", num_regions=36, fill=False)(photographs)
    for some, more in zip(bare, filled, strict=True):
        count = len(found_and_filled(more)[0])
        assert len(some.features) == count < 36
        np.testing.assert_array_equal(some.boxes, more.boxes[:count])


@pytest.mark.parametrize("features", ["detector", "backbone"])
def test_where_nothing_is_found_the_whole_photograph_is_the_region(
    features: str, made: Made, photographs: list[np.ndarray]
) -> None:
    extract = extractor(made, "rt_detr_v2", features, min_score=0.9999, fill=False)
    for regions, photograph in zip(extract(photographs), photographs, strict=True):
        height, width = photograph.shape[:2]
        np.testing.assert_array_equal(regions.boxes, [[0, 0, width, height]])
        assert extract.label_names is not None
        assert regions.labels is not None
        assert [extract.label_names[label] for label in regions.labels] == [PLACE]


def test_a_place_is_spoken_for_by_the_query_that_looked_at_most_of_it(
    made: Made, photographs: list[np.ndarray]
) -> None:
    extract = extractor(made, "rt_detr_v2", "detector", min_score=0.9999)
    everything = extractor(made, "rt_detr_v2", "detector", min_score=0.0, max_overlap=1.0)
    (regions,), (queries,) = extract(photographs[:1]), everything(photographs[:1])
    embeddings = {row.tobytes() for row in queries.features}
    assert len({row.tobytes() for row in regions.features}) > 1
    assert any(row.tobytes() in embeddings for row in regions.features)


def test_a_name_of_the_vocabulary_may_be_that_of_places(
    made: Made, photographs: list[np.ndarray]
) -> None:
    extract = extractor(made, "owlv2", "backbone", vocabulary=("region", "dog"))
    assert extract.label_names == ["region", "dog"]
    assert len(extract(photographs)) == 4


def test_no_photographs_have_no_regions(made: Made) -> None:
    assert extractor(made, "rt_detr_v2", "both")([]) == []


def test_names_and_vocabulary_have_to_go_together(made: Made) -> None:
    with pytest.raises(ConfigError, match="looks for what it is told to; give a vocabulary"):
        extractor(made, "owlv2", "detector", vocabulary=None)
    with pytest.raises(ConfigError, match="takes no vocabulary"):
        extractor(made, "rt_detr_v2", "detector", vocabulary=("dog",))


def scaled(source: Path, target: Path, factor: float) -> Path:
    """The same backbone with features so many times as large."""
    shutil.copytree(source, target)
    tensors = load_file(target / "model.safetensors")
    for name in ("layernorm.weight", "layernorm.bias"):
        tensors[name] = tensors[name] * factor
    (target / "model.safetensors").unlink()
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


@pytest.mark.parametrize(
    ("factor", "part"), [(1e6, "float16 ends at 65,504"), (1e-12, "all zero in float16")]
)
def test_features_that_float16_cannot_hold_are_refused(
    factor: float, part: str, made: Made, photographs: list[np.ndarray], tmp_path: Path
) -> None:
    folder = scaled(made("dinov2"), tmp_path / "it", factor)
    extract = extractor(made, "grid", "backbone", backbone=str(folder))
    with pytest.raises(CheckpointError, match=part):
        extract(photographs)


def test_provenance_is_json_that_makes_the_same_extractor(
    made: Made, photographs: list[np.ndarray]
) -> None:
    extract = extractor(made, "owlv2", "both")
    plain = json.loads(json.dumps(extract.provenance()))
    assert plain["detector"]["class"] == "Owlv2ForObjectDetection"
    assert plain["backbone"]["class"] == "Dinov2Model"
    assert plain["detector"]["revision"] is None
    assert set(plain["versions"]) == {"torch", "transformers", "numpy", "pillow"}
    again = RegionExtractor.from_provenance(plain, device=CPU)
    assert again.provenance() == extract.provenance()
    assert again.label_names == extract.label_names
    for one, other in zip(extract(photographs), again(photographs), strict=True):
        np.testing.assert_array_equal(one.features, other.features)


def test_models_may_have_moved_but_not_changed(made: Made, tmp_path: Path) -> None:
    plain = extractor(made, "grid", "backbone").provenance()
    shutil.copytree(made("dinov2"), tmp_path / "moved")
    moved = str(tmp_path / "moved")
    again = RegionExtractor.from_provenance(plain, device=CPU, backbone=moved)
    assert again.provenance()["backbone"]["sha256"] == plain["backbone"]["sha256"]
    other = str(scaled(made("dinov2"), tmp_path / "other", 2.0))
    with pytest.raises(CheckpointError, match=r"other weights than the regions were made with"):
        RegionExtractor.from_provenance(plain, device=CPU, backbone=other)
    (tmp_path / "moved/preprocessor_config.json").write_text(
        (made("vit") / "preprocessor_config.json").read_text("utf-8"), "utf-8"
    )
    with pytest.raises(CheckpointError, match=r"other settings than the regions were made with"):
        RegionExtractor.from_provenance(plain, device=CPU, backbone=moved)
    with pytest.raises(ConfigError, match="expected settings"):
        RegionExtractor.from_provenance({}, device=CPU)
    with pytest.raises(ConfigError, match="expected an object as backbone"):
        RegionExtractor.from_provenance(plain | {"backbone": "mine"}, device=CPU)
