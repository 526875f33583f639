"""The card says what the records say, and no more."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from cpfean.config import ExperimentConfig
from cpfean.publishing.origin import origin_of, published, without_places
from cpfean.publishing.push import prepared
from tests.publishing.conftest import write_run


def card_of(model: Path, config: ExperimentConfig, licence: str | None = None) -> str:
    with prepared(model, "me/model", config=config, licence=licence) as publication:
        return publication.card


def test_the_figures_of_a_run_are_those_of_its_record(
    run_folder: Path, config: ExperimentConfig
) -> None:
    told = json.loads((run_folder / "summary.json").read_text(encoding="utf-8"))["test"]
    text = card_of(run_folder / "best_model", config, licence="mit")
    card = ModelCard(text)
    results = card.data.eval_results
    assert results is not None
    assert card.data.license == "mit"
    assert sorted(one.metric_value for one in results) == sorted(
        round(value, 2) for value in told.values()
    )
    assert {one.dataset_name for one in results} == {"tiny-set"}
    assert {one.dataset_split for one in results} == {"test"}
    assert {one.metric_args["protocol"] for one in results if one.metric_args} == {"full"}
    identity = json.loads((run_folder / "sweep.json").read_text(encoding="utf-8"))
    fingerprint = identity["data_fingerprint"]
    assert {one.dataset_args["fingerprint"] for one in results if one.dataset_args} == {fingerprint}
    for said in (
        f"| image to text | {told['i2t_r1']:.1f} | {told['i2t_r5']:.1f} | {told['i2t_r10']:.1f} |",
        f"| text to image | {told['t2i_r1']:.1f} | {told['t2i_r5']:.1f} | {told['t2i_r10']:.1f} |",
        "Test split of tiny-set, 6 images with 30 captions, ranked among the whole split",
        "rSum on dev: 123.4",
        "commit `c0ffee`",
        "torch 2.13.0",
        fingerprint,
        'read_model("me/model")',
    ):
        assert said in text


def test_a_model_without_a_record_has_no_figures(
    run_folder: Path, config: ExperimentConfig, tmp_path: Path
) -> None:
    alone = Path(shutil.copytree(run_folder / "best_model", tmp_path / "best_model"))
    text = card_of(alone, config)
    card = ModelCard(text)
    assert card.data.eval_results is None
    assert card.data.license is None
    assert "Not known: this model came without the record of a run." in text
    assert "To be filled in by its author" in text
    assert "R@1" not in text
    assert "rSum on dev" not in text


def test_a_record_of_another_configuration_is_not_the_models(
    run_folder: Path, config: ExperimentConfig
) -> None:
    other = config.with_overrides({"loss.margin": 0.5})
    assert origin_of(run_folder / "best_model", other).test == {}
    # Data that has moved is the same data.
    moved = config.with_overrides({"data.path": "/elsewhere"})
    assert origin_of(run_folder / "best_model", moved).run == "my-run"


def test_a_model_that_was_not_tested_tells_of_dev_alone(
    run_folder: Path, config: ExperimentConfig, tmp_path: Path
) -> None:
    run = Path(shutil.copytree(run_folder, tmp_path / "untested"))
    record = run / "trials" / "000" / "record.json"
    plain = json.loads(record.read_text(encoding="utf-8"))
    record.write_text(json.dumps(plain | {"test": {}}), encoding="utf-8")
    text = card_of(run / "best_model", config)
    assert "Best rSum on dev: 123.4. It has not been shown a test split" in text
    assert "model-index" not in text


def test_how_the_regions_were_made_is_told_where_the_data_still_is_what_it_was(
    config: ExperimentConfig, data: Path, tmp_path: Path
) -> None:
    provenance = {
        "format": 1,
        "settings": {"detector": "/home/me/detectors/rt-detr", "backbone": "facebook/dinov2-small"},
        "detector": {"name": "/home/me/detectors/rt-detr", "sha256": "ab12"},
        "backbone": {"name": "facebook/dinov2-small", "revision": "12ef", "sha256": "cd34"},
        "skipped": [{"split": "train", "name": "clients/smith.jpg", "reason": "damaged"}],
    }
    here = Path(shutil.copytree(data, tmp_path / "tiny-set"))
    (here / "provenance.json").write_text(json.dumps(provenance), encoding="utf-8")
    config = config.with_overrides({"data.path": str(here)})
    model = write_run(tmp_path / "run", config, here) / "best_model"
    text = card_of(model, config)
    assert "| features | detector rt-detr, backbone facebook/dinov2-small |" in text
    assert '"sha256": "ab12"' in text
    assert '"skipped": 1' in text
    assert "/home/me" not in text
    assert "smith" not in text
    with (here / "dev_caps.txt").open("a", encoding="utf-8") as file:
        file.write("another caption\n")
    changed = origin_of(model, config)
    assert (changed.provenance, changed.gallery) == (None, None)
    assert changed.test  # what it came to on what the data was


def test_a_model_that_is_a_folder_here_has_its_last_name_alone() -> None:
    provenance = {
        "settings": {"detector": "../secret/detr", "backbone": "facebook/dinov2-small"},
        "detector": {"name": "../secret/detr", "revision": None},
        "backbone": {"name": "facebook/dinov2-small", "revision": "12ef"},
    }
    told = published(provenance)
    assert told["settings"] == {"detector": "detr", "backbone": "facebook/dinov2-small"}
    assert told["detector"]["name"] == "detr"
    assert told["backbone"] == provenance["backbone"]
    assert provenance["detector"]["name"] == "../secret/detr"


def test_places_are_cut_to_their_names() -> None:
    plain = {"a": ["/home/me/x", "y/z", 3, None], "b": {"c": "/d"}}
    assert without_places(plain) == {"a": ["x", "y/z", 3, None], "b": {"c": "d"}}


@pytest.mark.parametrize("path", ["synthetic", "s3://bucket/flickr"])
def test_what_is_no_place_of_this_machine_stays(
    run_folder: Path, config: ExperimentConfig, path: str
) -> None:
    other = config.with_overrides({"data.path": path})
    with prepared(run_folder / "best_model", "me/model", config=other) as publication:
        told = ExperimentConfig.from_toml(publication.folder / "config.toml")
    assert told.data.path == path
