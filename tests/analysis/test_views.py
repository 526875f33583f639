"""What views say of a pair, against the model itself; ranks and their changes by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from cpfean.analysis.views import (
    Gallery,
    image_sizes,
    most_changed,
    outcome,
    pick_captions,
    rank_changes,
)
from cpfean.config import ExperimentConfig
from cpfean.data.caption_groups import CaptionGroups
from cpfean.data.synthetic import write_synthetic
from cpfean.errors import ConfigError, DataError
from cpfean.metrics.retrieval import QueryRanks, query_ranks
from cpfean.training.evaluation import evaluate
from cpfean.training.setup import TrainedModel, open_checkpoint
from tests.training.conftest import TINY
from tests.training.tiny import save_untrained

CPU = torch.device("cpu")


def opened(folder: Path, data: Path, cache: Path, *, split: str = "test") -> TrainedModel:
    return open_checkpoint(
        folder, data_folder=data, split=split, cache_dir=cache, device=CPU, num_regions=8
    )


@pytest.fixture
def trained(tiny_config: ExperimentConfig, data_folder: Path, tmp_path: Path) -> TrainedModel:
    folder = save_untrained(tiny_config, data_folder, tmp_path / "model")
    return opened(folder, data_folder, tmp_path)


def ranks(images: list[int], captions: list[int]) -> QueryRanks:
    return QueryRanks(torch.tensor(images), torch.tensor(captions))


def test_recalls_of_a_gallery_are_those_of_the_evaluation(
    tiny_config: ExperimentConfig, tmp_path: Path
) -> None:
    # So many captions that they are scored in groups of similar length.
    write_synthetic(tmp_path / "data", replace(TINY, test_images=60))
    folder = save_untrained(tiny_config, tmp_path / "data", tmp_path / "model")
    trained = opened(folder, tmp_path / "data", tmp_path)
    gallery = Gallery(trained, batch_size=40)
    expected = evaluate(
        trained.model, trained.dataset, protocol="full", batch_size=40, device=CPU
    ).as_dict()
    assert gallery.ranks.metrics().as_dict() == expected
    assert 0 < expected["rsum"] < 600


def test_a_gallery_may_be_the_beginning_of_a_split(trained: TrainedModel) -> None:
    some, whole = Gallery(trained, num_images=4), Gallery(trained)
    assert some.scores.shape == (4, 20)
    torch.testing.assert_close(some.scores, whole.scores[:4, :20])
    assert Gallery(trained, num_images=1000).num_images == whole.num_images
    with pytest.raises(DataError, match="single image"):
        Gallery(trained, num_images=1)


@pytest.mark.parametrize("image", [0, 4])
def test_a_view_is_what_the_model_sees_of_that_image_and_that_caption(
    trained: TrainedModel, data_folder: Path, image: int
) -> None:
    split, model = trained.dataset.split, trained.model
    sizes = image_sizes(data_folder, "test", num_images=split.num_images)
    assert sizes is not None
    gallery = Gallery(trained, sizes=sizes)
    caption = 7
    view = gallery.view(image, caption)
    boxes, labels = (np.load(data_folder / f"test_{kind}.npy") for kind in ("boxes", "labels"))
    np.testing.assert_allclose(view.boxes * np.tile(sizes[image], 2), boxes[image], rtol=1e-3)
    names = (data_folder / "objects_vocab.txt").read_text().split("\n")
    assert view.labels == [names[label] for label in labels[image]]
    assert view.image_id == split.image_ids[image]
    assert view.aspect == sizes[image, 0] / sizes[image, 1]
    assert view.words == split.captions[caption].split()
    assert view.is_match == (image == 1)
    assert view.score == pytest.approx(float(gallery.scores[image, caption]), abs=1e-5)
    with torch.inference_mode():
        seen = model.align(
            model.encode_images(**trained.dataset.image_batch([image])._asdict()),
            model.encode_captions(**trained.dataset.caption_batch([caption])._asdict()),
        )
    assert view.fragment_score == float(seen.local)
    np.testing.assert_array_equal(view.gates, seen.gates[0, 0])
    np.testing.assert_array_equal(view.prominent, seen.prominence[0, 0].argmax(dim=0))
    gates, prominent = seen.gates[0, 0].double(), seen.prominence[0, 0].double()
    naming = [
        sum(float(gate * part) for gate, part in zip(gates, word, strict=True))
        for word in prominent
    ]
    np.testing.assert_allclose(view.named, np.array(naming) / sum(naming), rtol=1e-5)
    assert view.named.sum() == pytest.approx(1)
    assert view.widest(3) == sorted(range(8), key=lambda region: -view.gates[region])[:3]


def test_a_view_leaves_out_padded_regions_and_the_padding_of_words(trained: TrainedModel) -> None:
    trained.dataset.split.regions.counts[2] = 3
    view = Gallery(trained).view(2, 0)
    assert view.regions.tolist() == [0, 1, 2]
    assert len(view.gates) == len(view.prominent) == 3
    assert len(view.named) == len(view.words)


@pytest.mark.parametrize("sizes", [[5] * 6, [1, 9, 4, 6, 7, 3]])
def test_the_hardest_negatives_are_the_best_of_the_others(
    sizes: list[int], trained: TrainedModel
) -> None:
    groups = CaptionGroups.of_sizes(sizes)
    trained.dataset.split = replace(trained.dataset.split, groups=groups)
    gallery = Gallery(trained)
    scores = gallery.scores.numpy()
    image_of = np.repeat(np.arange(6), sizes)
    for caption in range(scores.shape[1]):
        column = np.where(np.arange(len(scores)) == image_of[caption], -np.inf, scores[:, caption])
        assert gallery.wrong_image(caption) == column.argmax()
    for image, row in enumerate(scores):
        own = image_of == image
        assert gallery.wrong_caption(image) == np.where(own, -np.inf, row).argmax()
        assert gallery.best_caption(image) == np.where(own, row, -np.inf).argmax()
    of_matrix = query_ranks(gallery.scores, torch.from_numpy(image_of))
    assert gallery.ranks.metrics() == of_matrix.metrics()
    first = Gallery(trained, num_images=3)
    assert first.scores.shape == (3, sum(sizes[:3]))
    assert len(first.ranks.captions) == sum(sizes[:3])
    assert first.caption_at(sum(sizes[:3]) - 1) == sum(sizes[:3]) - 1
    with pytest.raises(ConfigError, match=f"from 0 to {sum(sizes[:3]) - 1}"):
        first.caption_at(sum(sizes[:3]))


def test_data_without_boxes_and_labels_has_views_too(
    tiny_config: ExperimentConfig, data_folder: Path, tmp_path: Path
) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    for file in data_folder.iterdir():
        if file.name.split("_")[-1] in ("ims.npy", "caps.txt", "ids.txt"):
            (bare / file.name).write_bytes(file.read_bytes())
    folder = save_untrained(tiny_config, bare, tmp_path / "model")
    assert image_sizes(bare, "test", num_images=6) is None
    view = Gallery(opened(folder, bare, tmp_path)).view(0, 0)
    assert (view.boxes, view.labels, view.aspect) == (None, None, 1.0)


def test_sizes_may_be_stored_for_every_caption(data_folder: Path, tmp_path: Path) -> None:
    sizes = np.load(data_folder / "test_sizes.npy")
    np.save(tmp_path / "test_sizes.npy", np.repeat(sizes, 5, axis=0))
    np.testing.assert_array_equal(image_sizes(tmp_path, "test", num_images=len(sizes)), sizes)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ({"model.alignment.kind": "cross_attention"}, 'kind = "cross_attention"'),
        ({"model.alignment.global_weight": 1}, "global_weight = 1"),
    ],
)
def test_a_model_without_gates_is_refused_by_its_setting(
    tiny_config: ExperimentConfig,
    data_folder: Path,
    tmp_path: Path,
    overrides: dict[str, str],
    said: str,
) -> None:
    config = tiny_config.with_overrides(overrides)
    folder = save_untrained(config, data_folder, tmp_path / "model")
    gallery = Gallery(opened(folder, data_folder, tmp_path))
    assert not gallery.has_gates
    with pytest.raises(ConfigError, match=said):
        gallery.check_gates(name="it")


def test_what_is_not_in_the_split_is_refused(trained: TrainedModel) -> None:
    gallery = Gallery(trained)
    assert gallery.caption_at(29) == 29
    for number in (-1, 30):
        with pytest.raises(ConfigError, match=f"from 0 to 29.*got {number}"):
            gallery.caption_at(number)
    assert gallery.image_named("test-000003") == 3
    with pytest.raises(ConfigError, match="did you mean 'test-000003'"):
        gallery.image_named("test-00003")


def test_picked_captions_are_found_nearly_found_and_missed_in_turn() -> None:
    found = ranks([1] * 4, [1] * 10 + [2] * 4 + [10] * 4 + [11] + [300])
    picked = pick_captions(found, count=8, seed=0)
    kinds = [outcome(int(found.captions[caption])) for caption in picked]
    assert kinds == ["found", "near", "missed"] * 2 + ["found", "near"]
    assert len(set(picked)) == 8
    assert picked == pick_captions(found, count=8, seed=0)
    assert picked != pick_captions(found, count=8, seed=1)
    assert sorted(pick_captions(found, count=100, seed=0)) == list(range(20))


def test_changes_are_ordered_by_the_ratio_of_the_ranks() -> None:
    first, second = ranks([1, 8], [1, 10, 100, 5, 7]), ranks([1, 2], [2, 100, 300, 1, 7])
    changes = rank_changes(first, second)
    assert [(change.direction, change.query) for change in changes] == [
        ("text to image", 1),  # 10 times
        ("text to image", 3),  # 5 times
        ("image to text", 1),  # 4 times
        ("text to image", 2),
        ("text to image", 0),
        ("text to image", 4),  # not at all
        ("image to text", 0),
    ]
    groups = most_changed(changes, count=2)
    queries = {kind: [change.query for change in group] for kind, group in groups.items()}
    assert queries == {
        ("text to image", 0): [1, 2],
        ("text to image", 1): [3],
        ("image to text", 0): [],
        ("image to text", 1): [1],
    }
