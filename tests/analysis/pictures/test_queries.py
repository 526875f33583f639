"""Which pairs are drawn for a query and for a study, and under which names."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imsave

from cpfean.analysis.pictures.pairs import Panel
from cpfean.analysis.pictures.queries import (
    caption_panels,
    change_panels,
    draw_caption,
    draw_image,
    draw_study_pictures,
    image_panels,
    open_gallery,
    photo_of,
)
from cpfean.analysis.views import Gallery, rank_changes
from cpfean.config import ExperimentConfig
from cpfean.errors import ConfigError
from tests.training.tiny import save_untrained, tiny_experiment

PNG = b"\x89PNG"


def gallery_of(config: ExperimentConfig, data: Path, folder: Path) -> Gallery:
    save_untrained(config, data, folder)
    return open_gallery(folder, config, data_folder=data, split="test", cache_dir=folder.parent)


@pytest.fixture(scope="module")
def gallery(data_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Gallery:
    return gallery_of(tiny_experiment(), data_folder, tmp_path_factory.mktemp("gallery") / "model")


def test_a_caption_is_shown_with_its_image_and_the_best_wrong_one(
    gallery: Gallery, data_folder: Path
) -> None:
    own, wrong = caption_panels(gallery, 12)
    assert (own.view.caption, own.view.image, own.view.is_match) == (12, 2, True)
    assert (wrong.view.caption, wrong.view.is_match) == (12, False)
    assert wrong.view.image == gallery.wrong_image(12)
    boxes, sizes = (np.load(data_folder / f"test_{kind}.npy") for kind in ("boxes", "sizes"))
    for view in (own.view, wrong.view):
        assert view.boxes is not None
        pixels = view.boxes * np.tile(sizes[view.image], 2)
        np.testing.assert_allclose(pixels, boxes[view.image], rtol=1e-3)


def test_an_image_is_shown_with_its_best_caption_and_the_best_wrong_one(gallery: Gallery) -> None:
    own, wrong = image_panels(gallery, 4)
    assert own.view.image == wrong.view.image == 4
    assert (own.view.caption, own.view.is_match) == (gallery.best_caption(4), True)
    assert (wrong.view.caption, wrong.view.is_match) == (gallery.wrong_caption(4), False)


def test_a_changed_query_is_shown_with_its_match_by_each_model_that_has_gates(
    gallery: Gallery, data_folder: Path, tmp_path: Path
) -> None:
    pooled_config = tiny_experiment().with_overrides({"model.alignment.global_weight": 1})
    pooled = gallery_of(pooled_config, data_folder, tmp_path / "pooled")

    def titles(panels: list[Panel]) -> list[str]:
        assert all(panel.view.is_match for panel in panels)
        return [panel.title for panel in panels]

    changes = rank_changes(gallery.ranks, pooled.ranks)
    assert {change.direction for change in changes} == {"text to image", "image to text"}
    for change in changes:
        first, second = change.ranks
        seen = change_panels(change, (gallery, gallery), names=("one", "other"))
        assert titles(seen) == [f"by one: rank {first}", f"by other: rank {second}"]
        asked = "caption" if change.direction == "text to image" else "image"
        assert {getattr(panel.view, asked) for panel in seen} == {change.query}
        only = change_panels(change, (pooled, gallery), names=("pooled", "one"))
        assert titles(only) == [f"by one: rank {second}"]


def test_pictures_are_named_by_what_was_asked_for(gallery: Gallery, tmp_path: Path) -> None:
    caption, image = (
        draw_caption(gallery, 12, output=tmp_path),
        draw_image(gallery, 4, output=tmp_path),
    )
    assert caption == tmp_path / "caption-00012.png"
    assert image == tmp_path / "image-test-000004.png"
    assert {file.read_bytes()[:4] for file in (caption, image)} == {PNG}


def test_photographs_are_found_by_the_images_names(gallery: Gallery, tmp_path: Path) -> None:
    imsave(tmp_path / "test-000002.png", np.zeros((4, 6, 3)))
    own, wrong = caption_panels(gallery, 12, photos=tmp_path)
    assert (own.photo, wrong.photo) == (tmp_path / "test-000002.png", None)
    imsave(tmp_path / "3.png", np.zeros((4, 6, 3)))
    assert photo_of("3", tmp_path) == tmp_path / "3.png"
    assert photo_of("3.png", tmp_path) == tmp_path / "3.png"
    assert photo_of("3.jpg", tmp_path) is None  # another suffix is another file
    assert photo_of("3", None) is None


def test_a_study_has_three_pictures_of_dev_and_draws_them_once(
    data_folder: Path, tmp_path: Path
) -> None:
    config = tiny_experiment()
    folder = save_untrained(config, data_folder, tmp_path / "model")
    output = tmp_path / "pictures" / "trial-000"

    def drawn() -> list[Path]:
        return draw_study_pictures(
            folder, config, data_folder=data_folder, cache_dir=tmp_path, output=output
        )

    files = drawn()
    assert len(files) == 3
    assert {file.read_bytes()[:4] for file in files} == {PNG}
    assert files == sorted(output.iterdir())
    shutil.rmtree(folder)  # nothing is left that could be drawn again
    assert drawn() == files


def test_a_study_of_models_without_gates_has_no_pictures(data_folder: Path, tmp_path: Path) -> None:
    config = tiny_experiment().with_overrides({"model.alignment.kind": "hard_coding"})
    folder = save_untrained(config, data_folder, tmp_path / "model")
    with pytest.raises(ConfigError, match="hard_coding"):
        draw_study_pictures(
            folder,
            config,
            data_folder=data_folder,
            cache_dir=tmp_path,
            output=tmp_path / "pictures",
        )
