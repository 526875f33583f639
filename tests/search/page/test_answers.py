"""Questions to the page, and clicks: without Gradio and without a browser."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from cpfean.data.synthetic import write_synthetic
from cpfean.errors import ConfigError
from cpfean.search.page.answers import LARGEST_UPLOAD, Answers, Asked, model_names
from cpfean.search.page.photos import Photos, as_picture
from tests.search.conftest import Open
from tests.training.conftest import TINY


def answers_of(*searchers: Any, photos: Path | None = None, **options: Any) -> Answers:
    given = {"count": 5, "shortlist": None, "names": ["one", "two"][: len(searchers)]} | options
    return Answers(searchers, photos=Photos(photos), **given)


@pytest.fixture
def answers(opened: Open) -> Answers:
    return answers_of(opened("prominent"))


@pytest.fixture
def both(opened: Open) -> Answers:
    return answers_of(opened("prominent"), opened("crossed"))


def test_a_sentence_finds_as_many_images_as_were_asked_for(answers: Answers) -> None:
    answer = answers.images("a dog")
    assert answer.found.count("<button") == 5
    assert "All 30 images scored" in answer.found
    assert answer.asked is not None
    assert list(answer.asked.hits[0]) == list(answers.searchers[0].images("a dog", k=5))


def click(asked: Asked, hit: int, *, side: int = 0) -> dict[str, int]:
    """What the page sends when a hit is clicked."""
    return {"answer": asked.number, "side": side, "hit": hit}


def test_a_click_on_an_older_answer_is_refused(answers: Answers) -> None:
    older, newer = answers.images("a dog").asked, answers.images("a ball").asked
    assert older is not None
    assert 'role="alert"' in answers.chosen(newer, click(older, 0))
    assert 'role="alert"' not in answers.chosen(older, click(older, 0))


def test_a_click_shows_the_pair(answers: Answers) -> None:
    asked = answers.images("a dog").asked
    assert asked is not None
    for number, hit in enumerate(asked.hits[0]):
        pair = answers.chosen(asked, click(asked, number))
        view = answers.searchers[0].view("a dog", hit.image_id)
        assert f"score {view.score:.3f}" in pair
        assert f"rank {number + 1} of 30" in pair
        assert answers.name_of(asked, click(asked, number)) == hit.image_id


@pytest.mark.parametrize(
    "choice",
    [
        None,
        {},
        [],
        "0",
        {"side": 0},
        {"side": 0, "hit": 5},
        {"side": 1, "hit": 0},
        {"side": -1, "hit": 0},
        {"side": 0, "hit": -1},
        {"side": 0, "hit": "../../etc/passwd"},
        {"side": 0, "hit": 1e9},
        {"side": 0, "hit": None},
        {"side": "0", "hit": 0},
    ],
)
def test_a_click_on_what_was_not_shown_is_refused(answers: Answers, choice: Any) -> None:
    asked = answers.images("a dog").asked
    assert asked is not None
    if isinstance(choice, dict):
        choice = choice | {"answer": asked.number}
    assert 'role="alert"' in answers.chosen(asked, choice)
    assert 'role="alert"' in answers.chosen(None, choice)
    with pytest.raises(ConfigError, match="search again"):
        answers.name_of(asked, choice)


@pytest.mark.parametrize("text", ["", "  ", "狗", "\x00"])
def test_a_sentence_that_says_nothing_gets_a_sentence_back(answers: Answers, text: str) -> None:
    answer = answers.images(text)
    assert 'role="alert"' in answer.told
    assert not answer.found
    assert answer.asked is None


def test_an_image_finds_captions_and_a_click_shows_the_pair(answers: Answers) -> None:
    name = answers.searchers[0].split.image_ids[4]
    answer = answers.captions_of(f"  {name} ")
    assert answer.asked is not None
    assert answer.found.count("<button") == 5
    hit = answer.asked.hits[0][2]
    pair = answers.chosen(answer.asked, click(answer.asked, 2))
    assert hit.text in pair
    assert f"score {answers.searchers[0].view(hit.text, name).score:.3f}" in pair
    assert answers.name_of(answer.asked, click(answer.asked, 2)) is None


@pytest.mark.parametrize("name", ["", "../../etc/passwd", "<script>", "test-000031"])
def test_an_image_that_is_not_there_gets_a_sentence_back(answers: Answers, name: str) -> None:
    answer = answers.captions_of(name)
    assert 'role="alert"' in answer.told
    assert "<script>" not in answer.told


def test_any_image_is_one_of_the_gallery(answers: Answers) -> None:
    names = {answers.random_image() for _ in range(50)}
    assert names <= set(answers.searchers[0].split.image_ids)
    assert len(names) > 1


def test_two_models_stand_side_by_side(both: Answers) -> None:
    answer = both.images("a dog")
    assert answer.asked is not None
    assert answer.found.count("<button") == 10
    assert "<h3>one</h3>" in answer.found
    assert "<h3>two</h3>" in answer.found
    chosen = answer.asked.hits[1][4]
    pair = both.chosen(answer.asked, click(answer.asked, 4, side=1))
    assert "cross_attention" in pair
    assert "rank 5 of 30" in pair
    ranks = [hit.rank for hit in answer.asked.hits[0] if hit.position == chosen.position]
    other = f"rank {ranks[0]} of 30" if ranks else "not among the first 5"
    assert other in pair


def test_two_models_before_different_galleries_are_refused(
    opened: Open, tmp_path: Path, home: Path
) -> None:
    write_synthetic(tmp_path / "other", TINY)
    with pytest.raises(ConfigError, match="same images"):
        answers_of(opened("prominent"), opened("prominent", data=tmp_path / "other"))


def test_data_of_unknown_making_says_why_it_takes_no_photograph(answers: Answers) -> None:
    why = answers.why_no_upload()
    assert why is not None
    assert "provenance.json" in why


@pytest.mark.parametrize("content", [b"", b"not a picture", b"\x89PNG\r\n\x1a\n" + b"\0" * 50])
def test_what_is_no_photograph_gets_a_sentence_back(answers: Answers, content: bytes) -> None:
    told = {"name": "<b>x.jpg", "content": base64.b64encode(content).decode()}
    answer = answers.captions_for(told)
    assert 'role="alert"' in answer.told
    assert "&lt;b&gt;x.jpg: " in answer.told


@pytest.mark.parametrize(
    "told",
    [
        None,
        {},
        {"name": "x.jpg"},
        {"name": "x.jpg", "content": "no base64!"},
        {"name": "x.jpg", "content": ["AAAA"]},
        {"path": "/etc/passwd"},
        {"name": "x.jpg", "content": base64.b64encode(b"0" * (LARGEST_UPLOAD + 1)).decode()},
    ],
)
def test_what_is_no_file_gets_a_sentence_back(answers: Answers, told: Any) -> None:
    answer = answers.captions_for(told)
    assert 'role="alert"' in answer.told
    assert answer.asked is None


def test_photographs_are_shown_where_there_are_some(opened: Open, tmp_path: Path) -> None:
    searcher = opened("prominent")
    first, second = searcher.split.image_ids[:2]
    Image.fromarray(np.zeros((40, 60, 3), dtype=np.uint8)).save(tmp_path / f"{first}.png")
    (tmp_path / f"{second}.jpg").write_bytes(b"no picture")
    answers = answers_of(searcher, photos=tmp_path, count=30)
    found = answers.images("a dog").found
    assert found.count("<img") == 1
    assert found.count("data:image/jpeg") == 1
    assert found.count("<svg") == 29


def test_photographs_are_small_and_of_the_folder_alone(tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    (folder / "sub").mkdir(parents=True)
    picture = Image.fromarray(np.zeros((1200, 2400, 3), dtype=np.uint8))
    for file in (tmp_path / "secret.jpg", folder / "a.jpg", folder / "sub" / "b.jpg"):
        picture.save(file)
    photos = Photos(folder)
    for name in ("a", "a.jpg", "sub/b"):
        shown = photos.picture(name, side=320)
        assert shown is not None
        assert (shown.width, shown.height) == (320, 160)
    for name in ("../secret", "sub/../../secret", str(tmp_path / "secret"), "x" * 5000, "\0", ""):
        assert photos.picture(name, side=320) is None
    photos.check(["nothing", "a"])
    with pytest.raises(ConfigError, match="none of the images; files must be named as the ids"):
        photos.check(["nothing", "else"])


def test_a_picture_holds_the_pixels(tmp_path: Path) -> None:
    pixels = np.full((30, 50, 3), (200, 30, 90), dtype=np.uint8)
    shown = as_picture(pixels, side=100)
    data = base64.b64decode(shown.url.split(",")[1])
    with Image.open(io.BytesIO(data)) as image:
        assert image.size == (50, 30)
        np.testing.assert_allclose(np.asarray(image)[15, 25], (200, 30, 90), atol=4)


def test_models_are_called_by_their_runs() -> None:
    paths = [Path("runs/a/best_model"), Path("runs/b")]
    assert model_names(paths) == ["a", "b"]
    assert model_names([Path("x/a"), Path("y/a")]) == ["x/a", "y/a"]
