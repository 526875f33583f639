"""One's own photograph against the same photograph in the gallery."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from cpfean.config import ExperimentConfig
from cpfean.data.provenance import write_provenance
from cpfean.errors import CheckpointError, CpfeanError, DataError
from cpfean.photographs.extractor import ExtractionSettings, RegionExtractor
from cpfean.search.searcher import Searcher
from tests.photographs.models import tiny_dinov2, tiny_rt_detr_v2
from tests.training.tiny import save_untrained, tiny_experiment

CPU = torch.device("cpu")
CAPTIONS = ("a dog", "a red kite", "two people in the snow", "a big tree", "grass")


def photographs(count: int) -> list[np.ndarray]:
    """Of different sizes, with something in them."""
    rng = np.random.default_rng(0)
    found = []
    for number in range(count):
        height, width = 40 + 8 * number, 80 - 4 * number
        picture = np.full((height, width, 3), rng.integers(0, 256, 3), dtype=np.uint8)
        picture[5:20, 10:30] = rng.integers(0, 256, 3)
        picture[height // 2 :, width // 2 :] += rng.integers(0, 256, 3).astype(np.uint8)
        found.append(picture)
    return found


def write_data(folder: Path, extractor: RegionExtractor, pictures: list[np.ndarray]) -> None:
    """A data folder of these photographs, every split with all of them."""
    folder.mkdir(parents=True)
    found = extractor(pictures)
    for number, split in enumerate(("train", "dev", "test")):
        np.save(folder / f"{split}_ims.npy", np.stack([one.features for one in found]))
        np.save(folder / f"{split}_boxes.npy", np.stack([one.boxes for one in found]))
        np.save(folder / f"{split}_sizes.npy", np.array([one.size for one in found]))
        if extractor.label_names is not None:
            np.save(folder / f"{split}_labels.npy", np.stack([one.labels for one in found]))
            np.save(folder / f"{split}_scores.npy", np.stack([one.scores for one in found]))
            vocabulary = "\n".join(extractor.label_names) + "\n"
            (folder / "objects_vocab.txt").write_text(vocabulary)
        ids = [f"{number}-{place}" for place in range(len(pictures))]
        (folder / f"{split}_ids.txt").write_text("\n".join(ids) + "\n")
        (folder / f"{split}_caps.txt").write_text("\n".join(CAPTIONS * len(pictures)) + "\n")
    write_provenance(folder, extractor.provenance())


def model_for(folder: Path, data: Path) -> Path:
    config: ExperimentConfig = tiny_experiment().with_overrides({"data.path": str(data)})
    return save_untrained(config, data, folder)


@pytest.fixture(scope="module", params=["grid", "detector"])
def place(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data that an extraction made, and a model before it."""
    place = tmp_path_factory.mktemp(request.param)
    backbone = str(tiny_dinov2(place / "backbone"))
    if request.param == "grid":
        settings = ExtractionSettings(detector="grid", backbone=backbone, num_regions=9)
    else:
        detector = str(tiny_rt_detr_v2(place / "detector"))
        settings = ExtractionSettings(
            detector=detector, backbone=backbone, features="both", num_regions=9
        )
    write_data(place / "data", RegionExtractor(settings, device=CPU), photographs(6))
    model_for(place / "model", place / "data")
    return place


def opened(place: Path, data: str = "data") -> Searcher:
    return Searcher.from_pretrained(
        place / "model", data=place / data, cache_dir=place / "cache", device="cpu"
    )


def test_a_photograph_of_the_gallery_finds_what_its_image_finds(place: Path) -> None:
    searcher = opened(place)
    for number, picture in enumerate(photographs(6)):
        stored = searcher.image_at(number)
        own = searcher.photograph(picture, name="mine")
        for name, field in own.encoded._asdict().items():
            other = getattr(stored.encoded, name)
            torch.testing.assert_close(field, other, atol=2e-4, rtol=0, msg=name)
        assert own.shown.name == "mine"
        assert own.shown.position is None
        assert own.shown.labels == stored.shown.labels
        assert own.shown.aspect == stored.shown.aspect
        np.testing.assert_allclose(own.shown.boxes, stored.shown.boxes, atol=1e-6)
        found, expected = searcher.captions(own, k=30), searcher.captions(f"2-{number}", k=30)
        scores = {hit.position: hit.score for hit in expected}
        assert len(scores) == 30
        for hit in found:
            assert hit.score == pytest.approx(scores[hit.position], abs=2e-4)


def test_a_view_of_a_photograph_has_its_own_regions(place: Path) -> None:
    searcher = opened(place)
    picture = photographs(6)[2]
    own, stored = searcher.photograph(picture), searcher.image_at(2)
    seen, expected = searcher.view("a dog", own), searcher.view("a dog", stored)
    assert (seen.image, seen.image_id) == (None, "photograph")
    np.testing.assert_allclose(seen.gates, expected.gates, atol=1e-3)
    np.testing.assert_allclose(seen.boxes, expected.boxes, atol=1e-6)


def test_data_that_does_not_tell_what_made_it_takes_no_photograph(place: Path) -> None:
    shutil.copytree(place / "data", place / "untold")
    (place / "untold" / "provenance.json").unlink()
    with pytest.raises(DataError, match=r"no provenance\.json"):
        opened(place, "untold").photograph(photographs(1)[0])


def test_other_weights_than_the_recorded_ones_are_refused(place: Path) -> None:
    shutil.copytree(place / "data", place / "altered")
    record = place / "altered" / "provenance.json"
    digest = opened(place).extractor.provenance()["backbone"]["sha256"]
    record.write_text(record.read_text().replace(digest, digest[::-1]))
    with pytest.raises(CheckpointError, match="other weights"):
        opened(place, "altered").photograph(photographs(1)[0])


def test_a_model_that_is_gone_is_an_error_of_ours(place: Path) -> None:
    searcher = opened(place)
    (place / "backbone").rename(place / "elsewhere")
    try:
        with pytest.raises(CpfeanError, match="backbone"):
            searcher.photograph(photographs(1)[0])
    finally:
        (place / "elsewhere").rename(place / "backbone")
