"""The synthetic set: well-formed files, and a truth that is true of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from cpfean.config import SyntheticConfig
from cpfean.data.concepts import CONCEPTS
from cpfean.data.synthetic import load_truth, write_synthetic
from cpfean.errors import DataError

SMALL = {"train_images": 60, "dev_images": 10, "test_images": 20}
SPLITS = ("train", "dev", "test")


def made(folder: Path, **changes) -> Path:
    write_synthetic(folder, SyntheticConfig(**(SMALL | changes)))
    return folder


def array(folder: Path, name: str) -> np.ndarray:
    return np.load(folder / f"{name}.npy", allow_pickle=False)


def captions(folder: Path, split: str) -> list[str]:
    return (folder / f"{split}_caps.txt").read_text(encoding="utf-8").split("\n")[:-1]


def overlap(a: np.ndarray, b: np.ndarray) -> float:
    low, high = np.maximum(a[:2], b[:2]), np.minimum(a[2:], b[2:])
    shared = np.clip(high - low, 0, None).prod()
    return shared / ((a[2:] - a[:2]).prod() + (b[2:] - b[:2]).prod() - shared)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made(tmp_path_factory.mktemp("synthetic"))


@pytest.mark.parametrize(("num_regions", "feature_dim"), [(24, 64), (4, 8), (256, 300)])
def test_every_file_has_its_dtype_and_shape(
    tmp_path: Path, num_regions: int, feature_dim: int
) -> None:
    sizes = {"train_images": 3, "dev_images": 2, "test_images": 2}
    made(tmp_path, num_regions=num_regions, feature_dim=feature_dim, **sizes)
    for split in SPLITS:
        images = sizes[f"{split}_images"]
        expected = {
            "ims": (np.float16, (images, num_regions, feature_dim)),
            "boxes": (np.float32, (images, num_regions, 4)),
            "sizes": (np.int32, (images, 2)),
            "labels": (np.int16, (images, num_regions)),
            "scores": (np.float16, (images, num_regions)),
        }
        for name, (dtype, shape) in expected.items():
            values = array(tmp_path, f"{split}_{name}")
            assert (values.dtype, values.shape) == (dtype, shape)
            assert np.isfinite(values).all()
        assert len(captions(tmp_path, split)) == 5 * images
        truth = load_truth(tmp_path, split)
        assert truth.objects.shape == truth.concepts.shape == (images, num_regions)
        assert truth.described_by.shape == (5 * images, num_regions)


def test_the_same_seed_makes_the_same_bytes_and_another_seed_others(
    folder: Path, tmp_path: Path
) -> None:
    again, other = made(tmp_path / "again"), made(tmp_path / "other", seed=1)
    names = sorted(path.name for path in folder.iterdir())
    assert names == sorted(path.name for path in again.iterdir())
    assert len(names) == 3 * 8 + 1
    for name in names:
        same = (folder / name).read_bytes()
        assert (again / name).read_bytes() == same
        fixed = name == "objects_vocab.txt" or name.endswith("_ids.txt")
        assert fixed or (other / name).read_bytes() != same


def test_a_smaller_set_is_the_beginning_of_a_larger_one(folder: Path, tmp_path: Path) -> None:
    made(tmp_path, train_images=7)
    for split, images in (("train", 7), ("dev", 10), ("test", 20)):
        np.testing.assert_array_equal(
            array(tmp_path, f"{split}_ims"), array(folder, f"{split}_ims")[:images]
        )
        assert captions(tmp_path, split) == captions(folder, split)[: 5 * images]


def test_no_two_images_are_the_same(folder: Path) -> None:
    features = np.concatenate([array(folder, f"{split}_ims") for split in SPLITS])
    assert len(np.unique(features.reshape(len(features), -1), axis=0)) == len(features)
    ids = [name for split in SPLITS for name in (folder / f"{split}_ids.txt").read_text().split()]
    assert len(set(ids)) == len(ids) == len(features)


@pytest.mark.parametrize("changes", [{"feature_noise": 3.0}, {"label_error": 0.6}])
def test_noise_and_label_errors_leave_scenes_and_captions_alone(
    folder: Path, tmp_path: Path, changes: dict[str, float]
) -> None:
    made(tmp_path, **changes)
    assert captions(tmp_path, "train") == captions(folder, "train")
    for name in ("train_boxes", "train_ims"):
        ours, theirs = array(tmp_path, name), array(folder, name)
        moved = name == "train_ims" and "feature_noise" in changes
        # Wrong labels lower confidences, and with them the order of an image's regions.
        same = np.array_equal(np.sort(ours, axis=1), np.sort(theirs, axis=1))
        assert same is not moved


def test_boxes_lie_inside_the_image_and_have_an_area(folder: Path) -> None:
    for split in SPLITS:
        boxes, sizes = array(folder, f"{split}_boxes"), array(folder, f"{split}_sizes")
        assert (boxes[..., :2] >= 0).all()
        assert (boxes[..., 2:] <= sizes[:, None, :]).all()
        assert (boxes[..., 2:] - boxes[..., :2] >= 4).all()
    assert len(np.unique(array(folder, "train_sizes"), axis=0)) > 10


def test_duplicates_overlap_the_first_region_of_their_object_by_more_than_half(
    folder: Path,
) -> None:
    truth, boxes = load_truth(folder, "train"), array(folder, "train_boxes").astype(np.float64)
    pairs = 0
    for objects, image in zip(truth.objects, boxes, strict=True):
        for number in set(objects[objects >= 0].tolist()):
            regions = image[objects == number]
            if len(regions) > 1:
                pairs += 1
                # The first is not marked; it is the one that all others were made from.
                assert max(min(overlap(a, b) for b in regions) for a in regions) > 0.5
    assert pairs > len(boxes)


def test_images_hold_described_regions_undescribed_objects_and_distractors(folder: Path) -> None:
    truth = load_truth(folder, "train")
    described, distractors = truth.described, truth.objects < 0
    assert not (described & distractors).any()
    for share in (described.mean(), distractors.mean(), (~described & ~distractors).mean()):
        assert 0.15 < share < 0.6
    # A gate has something to close at in every pair.
    assert truth.described_by.mean() < 0.3
    assert (~truth.described_by).any(axis=1).all()


def test_regions_come_by_falling_confidence_within_0_and_1(folder: Path) -> None:
    scores = array(folder, "train_scores").astype(np.float64)
    assert (np.diff(scores, axis=1) <= 0).all()
    assert scores.min() > 0
    assert scores.max() < 1


@pytest.mark.parametrize("rate", [0.0, 0.15, 0.5, 1.0])
def test_labels_are_wrong_at_the_stated_rate(tmp_path: Path, rate: float) -> None:
    made(tmp_path, label_error=rate, train_images=100)
    labels, truth = array(tmp_path, "train_labels"), load_truth(tmp_path, "train")
    wrong = (labels != truth.concepts).mean()
    # 2400 regions: the standard error is at most 0.0102.
    assert wrong == rate if rate in (0, 1) else abs(wrong - rate) < 0.04
    assert labels.min() >= 0
    assert labels.max() < len(CONCEPTS)


def test_confidence_tells_wrong_labels_from_right_ones_but_not_surely(tmp_path: Path) -> None:
    made(tmp_path, label_error=0.3)
    wrong = array(tmp_path, "train_labels") != load_truth(tmp_path, "train").concepts
    scores = array(tmp_path, "train_scores").astype(np.float64)
    right_is_higher = (scores[~wrong][:, None] > scores[wrong][None, :]).mean()
    assert 0.75 < right_is_higher < 0.97


def test_captions_are_plain_lower_case_words_and_the_truth_has_one_entry_for_each(
    folder: Path,
) -> None:
    for split in SPLITS:
        truth = load_truth(folder, split)
        for caption, named, qualified in zip(
            captions(folder, split), truth.named, truth.qualified, strict=True
        ):
            words = caption.split(" ")
            assert all(word.isascii() and word.isalpha() and word.islower() for word in words)
            assert len(words) == len(named) == len(qualified)
            assert not any(n and q for n, q in zip(named, qualified, strict=True))


def test_a_noun_names_all_regions_of_its_objects_and_nothing_else(folder: Path) -> None:
    """A word that is a name of a concept names regions that show this concept."""
    spoken: dict[str, set[int]] = {}
    for number, concept in enumerate(CONCEPTS):
        for name in (*concept.words, *concept.plurals):
            for word in name.split():
                spoken.setdefault(word, set()).add(number)
    general = {"person", "people", "child", "children", "animal", "animals", "vehicle", "vehicles"}
    truth = load_truth(folder, "train")
    several = 0
    for number, (caption, named) in enumerate(
        zip(captions(folder, "train"), truth.named, strict=True)
    ):
        objects, concepts = truth.objects[number // 5], truth.concepts[number // 5]
        for word, regions in zip(caption.split(), named, strict=True):
            if not regions:
                continue
            assert word in general or set(concepts[list(regions)]) <= spoken[word]
            assert len(set(concepts[list(regions)])) == 1
            shown = set(objects[list(regions)].tolist())
            assert np.flatnonzero(np.isin(objects, list(shown))).tolist() == list(regions)
            several += len(shown) > 1
    assert several > 20


def test_captions_name_the_main_objects_often_and_others_rarely(folder: Path) -> None:
    truth = load_truth(folder, "train")
    by_image = truth.described_by.reshape(len(truth.objects), 5, -1)
    times = by_image.sum(axis=1)[truth.described]
    assert (times >= 3).mean() > 0.25
    assert (times == 1).mean() > 0.15
    vague = (~truth.described_by.any(axis=1)).mean()
    assert 0 < vague < 0.15
    assert len(set(captions(folder, "train"))) > 0.9 * len(truth.named)


def test_stated_relations_are_true_of_the_boxes(tmp_path: Path) -> None:
    folder = made(tmp_path, train_images=400, feature_dim=8)
    truth, boxes = load_truth(folder, "train"), array(folder, "train_boxes").astype(np.float64)
    sizes = array(folder, "train_sizes")

    def centre(box: np.ndarray) -> np.ndarray:
        return (box[:2] + box[2:]) / 2

    # Duplicates are jittered by up to a tenth, so that the box around a thing is known less well.
    slack = 0.12
    holds = {
        "left": lambda a, b: centre(a)[0] < centre(b)[0],
        "right": lambda a, b: centre(a)[0] > centre(b)[0],
        "above": lambda a, b: centre(a)[1] < centre(b)[1] and a[3] < b[1] + slack,
        "below": lambda a, b: centre(a)[1] > centre(b)[1] and a[1] > b[3] - slack,
        "front": lambda a, b: a[3] > b[3] - slack,
        "behind": lambda a, b: a[3] < b[3] + slack,
        "near": lambda a, b: (np.maximum(a[:2], b[:2]) - np.minimum(a[2:], b[2:])).max() < slack,
        "on": lambda a, b: overlap(a, b) > 0 and a[3] < b[3] + slack,
        "riding": lambda a, b: overlap(a, b) > 0 and a[3] < b[3] + slack,
        "in": lambda a, b: overlap(a, b) > 0,
        "with": lambda a, b: overlap(a, b) > 0,
        "under": lambda a, b: overlap(a, b) > 0 and a[3] > b[3] - slack,
    }
    seen = set()
    for number, told in enumerate(truth.relations):
        image = boxes[number // 5] / np.tile(sizes[number // 5], 2)
        for name, subject, other in told:
            a, b = (
                np.concatenate([image[list(r), :2].min(axis=0), image[list(r), 2:].max(axis=0)])
                for r in (subject, other)
            )
            assert holds[name](a, b), (number, name, a, b)
            seen.add(name)
    assert seen == set(holds)


def test_features_of_one_object_are_alike_and_noise_drowns_them(tmp_path: Path) -> None:
    """Mean cosine of duplicates, of regions of the same concept elsewhere, of different ones."""
    alike = {}
    for noise in (0.0, 1.0, 4.0):
        folder = made(tmp_path / str(noise), feature_noise=noise, label_error=0.0)
        features = array(folder, "train_ims").astype(np.float64)
        truth = load_truth(folder, "train")
        shown = truth.objects.ravel() >= 0
        image = np.repeat(np.arange(len(features)), features.shape[1])[shown]
        rows = features.reshape(-1, features.shape[2])[shown]
        lengths = np.linalg.norm(rows, axis=1)
        np.testing.assert_allclose((lengths**2).mean(), 1 + noise**2, rtol=0.05)
        cosines = rows @ rows.T / np.outer(lengths, lengths)
        concept, thing = truth.concepts.ravel()[shown], truth.objects.ravel()[shown]
        elsewhere = image[:, None] != image[None, :]
        same = concept[:, None] == concept[None, :]
        duplicate = ~elsewhere & (thing[:, None] == thing[None, :])
        np.fill_diagonal(duplicate, False)
        alike[noise] = [
            cosines[mask].mean() for mask in (duplicate, same & elsewhere, ~same & elsewhere)
        ]
        assert alike[noise][0] > alike[noise][1] > alike[noise][2]
    assert alike[0.0][1] > alike[1.0][1] > alike[4.0][1]
    assert alike[4.0][1] < 0.1


def test_missing_or_foreign_truth_is_refused_with_its_path(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"train_truth\.json: no such file"):
        load_truth(tmp_path, "train")
    for text in ("", "[]", "{}", '{"concepts": 1, "objects": 1, "named": 1}'):
        (tmp_path / "train_truth.json").write_text(text)
        with pytest.raises(DataError, match=r"train_truth\.json: not the truth"):
            load_truth(tmp_path, "train")
