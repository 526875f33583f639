"""A searcher against the evaluation, against slow obvious searches, and what it refuses."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from cpfean.analysis.views import Gallery
from cpfean.errors import CheckpointError, ConfigError, DataError
from cpfean.search.searcher import Searcher
from tests.search.conftest import MODELS, Open


@pytest.fixture(params=sorted(MODELS))
def any_searcher(request: pytest.FixtureRequest, opened: Open) -> Searcher:
    return opened(request.param)


def pooled_cosines(searcher: Searcher, sentence: str) -> np.ndarray:
    """Of the pooled sentence with every pooled image, by the model itself."""
    dataset, model = searcher.trained.dataset, searcher.trained.model
    with torch.inference_mode():
        images = model.encode_images(
            **dataset.image_batch(range(searcher.split.num_images))._asdict()
        )
        caption = dataset.caption_batch([searcher.split.captions.index(sentence)])
        spoken = model.encode_captions(**caption._asdict())
        return (images.pooled.double() @ spoken.pooled[0].double()).numpy()


def test_a_sentence_finds_images_in_the_order_of_the_evaluation(any_searcher: Searcher) -> None:
    split, gallery = any_searcher.split, Gallery(any_searcher.trained, batch_size=7)
    for caption, sentence in enumerate(split.captions):
        hits = any_searcher.images(sentence, k=split.num_images)
        assert [hit.rank for hit in hits] == list(range(1, split.num_images + 1))
        assert hits.is_exact
        positions = [hit.position for hit in hits]
        assert sorted(positions) == list(range(split.num_images))
        expected = gallery.scores[:, caption].numpy()
        np.testing.assert_allclose([hit.score for hit in hits], expected[positions], atol=2e-6)
        own = positions.index(split.image_of(caption)) + 1
        assert own == gallery.ranks.captions[caption]
        assert [hit.image_id for hit in hits] == [split.image_ids[place] for place in positions]


def test_an_image_finds_captions_in_the_order_of_the_evaluation(any_searcher: Searcher) -> None:
    split, gallery = any_searcher.split, Gallery(any_searcher.trained, batch_size=7)
    for image, name in enumerate(split.image_ids):
        hits = any_searcher.captions(name, k=split.num_captions)
        positions = [hit.position for hit in hits]
        expected = gallery.scores[image].numpy()
        np.testing.assert_allclose([hit.score for hit in hits], expected[positions], atol=2e-6)
        own = min(positions.index(caption) for caption in split.captions_of(image)) + 1
        assert own == gallery.ranks.images[image]
        assert all(hit.text == split.captions[hit.position] for hit in hits)
        assert {hit.position for hit in hits if hit.image_id == name} == set(
            split.captions_of(image)
        )


@pytest.mark.parametrize("model", ["prominent", "crossed", "mixed"])
def test_a_shortlist_is_the_nearest_pools_in_the_order_of_the_full_score(
    model: str, opened: Open
) -> None:
    searcher = opened(model)
    for sentence in searcher.split.captions[::20]:
        cosines = pooled_cosines(searcher, sentence)
        nearest = set(np.argsort(-cosines, kind="stable")[:9].tolist())
        whole = searcher.images(sentence, k=searcher.split.num_images)
        expected = [hit for hit in whole if hit.position in nearest][:5]
        found = searcher.images(sentence, k=5, shortlist=9)
        assert [hit.position for hit in found] == [hit.position for hit in expected]
        np.testing.assert_allclose(
            [hit.score for hit in found], [hit.score for hit in expected], atol=2e-6
        )
        assert (found.scored, found.total, found.is_exact) == (9, 30, False)


def test_a_shortlist_of_captions_keeps_their_scores(searcher: Searcher) -> None:
    name = searcher.split.image_ids[3]
    whole = {hit.position: hit.score for hit in searcher.captions(name, k=150)}
    found = searcher.captions(name, k=10, shortlist=40)
    assert (found.scored, found.total) == (40, 150)
    scores = [hit.score for hit in found]
    assert scores == sorted(scores, reverse=True)
    np.testing.assert_allclose(scores, [whole[hit.position] for hit in found], atol=2e-6)


def test_a_shortlist_of_everything_is_exact_and_so_is_one_of_pooled_scores(
    searcher: Searcher, opened: Open
) -> None:
    sentence = searcher.split.captions[0]
    assert searcher.images(sentence, k=5, shortlist=30).is_exact
    pooled = opened("pooled")
    assert pooled.images(sentence, k=5, shortlist=6).is_exact
    assert list(pooled.images(sentence, k=5, shortlist=6)) == list(pooled.images(sentence, k=5))


def test_a_view_of_a_sentence_is_that_of_the_same_caption(searcher: Searcher) -> None:
    gallery = Gallery(searcher.trained)
    caption, image = 37, 11
    expected = gallery.view(image, caption)
    seen = searcher.view(searcher.split.captions[caption], searcher.split.image_ids[image])
    assert (seen.image, seen.caption, seen.is_match) == (image, None, None)
    assert (seen.words, seen.labels, seen.image_id) == (
        expected.words,
        expected.labels,
        expected.image_id,
    )
    assert seen.score == pytest.approx(expected.score, abs=2e-6)
    for field in ("named", "gates", "boxes"):
        np.testing.assert_allclose(getattr(seen, field), getattr(expected, field), atol=2e-6)
    np.testing.assert_array_equal(seen.prominent, expected.prominent)
    hit = searcher.images(searcher.split.captions[caption], k=1)[0]
    best = searcher.view(searcher.split.captions[caption], hit.image_id)
    assert best.score == pytest.approx(hit.score, abs=2e-6)


@pytest.mark.parametrize("model", ["crossed", "pooled"])
def test_a_model_without_gates_searches_and_says_why_it_has_no_view(
    model: str, opened: Open
) -> None:
    searcher = opened(model)
    assert not searcher.has_gates
    assert searcher.images("a dog", k=3)
    with pytest.raises(ConfigError, match="no gates"):
        searcher.view("a dog", searcher.split.image_ids[0])


def test_half_precision_takes_half_the_room_and_nearly_the_same_scores(
    home: Path, opened: Open, tmp_path: Path
) -> None:
    halved = opened("prominent", cache_dir=tmp_path, precision="float16")
    whole = opened("prominent")
    sentence = whole.split.captions[5]
    scores = {hit.position: hit.score for hit in whole.images(sentence, k=30)}
    for hit in halved.images(sentence, k=30):
        assert hit.score == pytest.approx(scores[hit.position], abs=2e-3)
    (half,) = tmp_path.glob("gallery-*/regions.npy")
    sizes = {file.stat().st_size for file in (home / "cache").glob("gallery-*/regions.npy")}
    assert 2 * half.stat().st_size - 128 in sizes


def test_a_gallery_is_encoded_once_and_known_by_its_content(home: Path, tmp_path: Path) -> None:
    def state() -> dict[str, int]:
        return {str(file): file.stat().st_mtime_ns for file in tmp_path.rglob("*.npy")}

    def opened_again(model: Path, data: Path) -> None:
        searcher = Searcher.from_pretrained(model, data=data, cache_dir=tmp_path, device="cpu")
        searcher.captions(searcher.split.image_ids[0])

    opened_again(home / "prominent", home / "data")
    first = state()
    assert {Path(file).name for file in first} >= {"regions.npy", "pooled.npy", "words.npy"}
    opened_again(home / "prominent", home / "data")
    assert state() == first
    # Where model and data lie has no say.
    shutil.copytree(home / "prominent", tmp_path / "moved" / "best_model")
    shutil.copytree(home / "data", tmp_path / "other-data")
    opened_again(tmp_path / "moved", tmp_path / "other-data")
    assert {file: state()[file] for file in first} == first
    features = np.load(tmp_path / "other-data" / "test_ims.npy")
    features[0, 0, 0] += 1
    np.save(tmp_path / "other-data" / "test_ims.npy", features)
    opened_again(tmp_path / "moved", tmp_path / "other-data")
    assert len(list(tmp_path.glob("gallery-*/regions.npy"))) == 2
    opened_again(home / "crossed", home / "data")
    assert len(list(tmp_path.glob("gallery-*/regions.npy"))) == 3


def test_a_gallery_without_captions_is_the_split_that_nobody_has_to_name(
    home: Path, tmp_path: Path
) -> None:
    data = tmp_path / "photos"
    data.mkdir()
    for part in ("ims.npy", "boxes.npy", "sizes.npy", "labels.npy", "scores.npy", "ids.txt"):
        source = home / "data" / f"test_{part}"
        (data / f"gallery_{part}").write_bytes(source.read_bytes())
    (data / "objects_vocab.txt").write_bytes((home / "data" / "objects_vocab.txt").read_bytes())
    searcher = Searcher.from_pretrained(
        home / "prominent", data=data, cache_dir=tmp_path / "cache", device="cpu"
    )
    assert searcher.split.name == "gallery"
    expected = Searcher.from_pretrained(
        home / "prominent", data=home / "data", cache_dir=tmp_path / "cache", device="cpu"
    )
    sentence = expected.split.captions[0]
    assert list(searcher.images(sentence)) == list(expected.images(sentence))
    with pytest.raises(DataError, match="no captions"):
        searcher.captions(searcher.split.image_ids[0])


@pytest.mark.parametrize(
    ("k", "shortlist", "said"),
    [
        (0, None, "k must be at least 1"),
        (-3, None, "at least 1"),
        (10, 9, "at least the 10 that are asked for; got 9"),
    ],
)
def test_a_count_that_cannot_be_is_refused(
    searcher: Searcher, k: int, shortlist: int | None, said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        searcher.images("a dog", k=k, shortlist=shortlist)
    with pytest.raises(ConfigError, match=said):
        searcher.captions(searcher.split.image_ids[0], k=k, shortlist=shortlist)


def test_more_than_there_is_gives_all(searcher: Searcher) -> None:
    assert len(searcher.images("a dog", k=1000)) == 30
    assert len(searcher.captions(searcher.split.image_ids[0], k=1000)) == 150


def test_an_image_that_is_not_there_is_refused_with_the_nearest(searcher: Searcher) -> None:
    with pytest.raises(ConfigError, match=r"no image 'test-00001'.*'test-00001"):
        searcher.captions("test-00001")
    with pytest.raises(ConfigError, match="no image"):
        searcher.view("a dog", "../../etc/passwd")


def test_a_folder_that_is_no_model_is_refused(home: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no folder of a finished run"):
        Searcher.from_pretrained(home / "data", cache_dir=tmp_path)
    with pytest.raises(DataError, match="nowhere"):
        Searcher.from_pretrained(home / "prominent", data="nowhere", cache_dir=tmp_path)
