"""What people type into a search: long, empty, strange, in another script."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cpfean.errors import ConfigError
from cpfean.search.searcher import Searcher
from cpfean.search.sentences import read_sentence


def test_a_sentence_is_encoded_as_the_same_caption_of_a_split_is(searcher: Searcher) -> None:
    dataset, model = searcher.trained.dataset, searcher.trained.model
    for caption in (0, 7, 33):
        read = read_sentence(searcher.split.captions[caption], searcher.trained)
        with torch.inference_mode():
            expected = model.encode_captions(**dataset.caption_batch([caption])._asdict())
        for field, other in zip(read.encoded, expected, strict=True):
            torch.testing.assert_close(field, other)
        assert read.words == searcher.split.captions[caption].split()
        assert not read.unknown
        assert not read.is_cut


def test_ten_thousand_words_are_those_that_fit(searcher: Searcher) -> None:
    long = searcher.images("a dog " * 5000)
    assert long.sentence is not None
    assert long.sentence.is_cut
    begins = long.sentence.words
    assert set(begins) == {"a", "dog"}
    assert list(long) == list(searcher.images(" ".join(begins)))


@pytest.mark.parametrize(
    "text",
    ["", " ", "\t\n  \r", "\x00\x01\x1b", "\u200b\u200d", "\ufeff", "\u00a0"],
)
def test_what_says_nothing_is_refused_in_a_plain_sentence(searcher: Searcher, text: str) -> None:
    with pytest.raises(ConfigError, match="expected a sentence, found no"):
        searcher.images(text)


@pytest.mark.parametrize("text", ["狗在雪地里", "собака в снегу", "🐕", "🐕 ❄️ !"])
def test_a_sentence_of_which_no_word_is_known_is_refused_with_its_words(
    searcher: Searcher, text: str
) -> None:
    with pytest.raises(ConfigError, match="knows none of these words: '"):
        searcher.images(text)


def test_half_a_character_is_no_word(searcher: Searcher) -> None:
    hits = searcher.images("\ud83d dog")
    assert hits.sentence is not None
    assert hits.sentence.words == ["dog"]


def test_unknown_words_among_known_ones_are_told(searcher: Searcher) -> None:
    hits = searcher.images("a 狗 dog 雪 and a 狗")
    assert hits.sentence is not None
    assert hits.sentence.unknown == ["狗", "雪"]
    assert hits.sentence.words == ["a", "狗", "dog", "雪", "and", "a", "狗"]


@given(text=st.text(max_size=60))
def test_any_text_gets_an_answer_or_an_error_of_ours(text: str) -> None:
    searcher = _SEARCHERS[0]
    try:
        hits = searcher.images(text, k=2)
    except ConfigError as error:
        assert str(error)
    else:
        assert len(hits) == 2


_SEARCHERS: list[Searcher] = []


@pytest.fixture(autouse=True)
def _hold(searcher: Searcher) -> None:
    """Hypothesis runs one test many times, and asks for fixtures of the session to be held."""
    _SEARCHERS[:] = [searcher]
