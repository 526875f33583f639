"""What captions of one image agree on."""

import numpy as np
import pytest

from cpfean.config import TextConfig
from cpfean.data.consensus import word_consensus
from cpfean.data.tokens import CaptionTokenizer, load_tokenizer

DOG = ["a dog runs on grass", "the dog is on a lawn", "one brown dog outside"]
BOAT = ["a boat on the sea", "the white boat sails"]
ALONE = ["a man and the sky"]


def tokenizer_of(captions: list[str]) -> CaptionTokenizer:
    return load_tokenizer(TextConfig(), train_captions=captions, max_tokens=32)


def consensus_of(captions: list[str], image_of: list[int]) -> tuple[np.ndarray, dict[str, float]]:
    tokenizer = tokenizer_of(captions)
    found = word_consensus(
        tokenizer.encode(captions), np.array(image_of), num_pieces=tokenizer.vocab_size
    )
    words = {word for caption in captions for word in caption.split()}
    pieces = {word: tokenizer.encode([word]).pieces[1:-1] for word in words}
    return found, {word: float(found[ids[0]]) for word, ids in pieces.items() if len(ids) == 1}


def test_it_is_the_agreement_of_pairs_beyond_chance() -> None:
    captions, image_of = DOG + BOAT + ALONE, [0, 0, 0, 1, 1, 2]
    _, found = consensus_of(captions, image_of)
    assert {"dog", "boat", "a", "the", "on"} <= found.keys()
    for word, value in found.items():
        has = [word in caption.split() for caption in captions]
        share = sum(has) / len(captions)
        agreed, having = 0.3 * 5, 5.0
        for one, image in enumerate(image_of):
            others = [o for o, i in enumerate(image_of) if i == image and o != one]
            if has[one] and others:
                having += 1
                agreed += sum(has[o] for o in others) / len(others)
        expected = max(0.0, (agreed / having - share) / (1 - share))
        assert value == pytest.approx(expected, abs=1e-12), word


def test_words_of_the_picture_are_ahead_of_words_of_the_sentence() -> None:
    captions = 8 * (DOG + BOAT)
    image_of = [2 * n + i for n in range(8) for i in (0, 0, 0, 1, 1)]
    _, found = consensus_of(captions, image_of)
    for word in ("dog", "boat"):
        assert found[word] > 2 * max(found[other] for other in ("a", "the", "on"))


def test_with_one_caption_an_image_rare_words_are_ahead_of_frequent_ones() -> None:
    captions = [f"a {word}" for word in ("dog", "boat", "man", "man", "sea", "sky", "lawn")]
    values, found = consensus_of(captions, list(range(len(captions))))
    assert found["dog"] == found["boat"] > found["man"] > found["a"] == 0
    assert np.isfinite(values).all()


def test_pieces_that_stand_everywhere_or_nowhere_have_a_value() -> None:
    captions = ["a dog", "a dog"]
    values, found = consensus_of(captions, [0, 0])
    assert found["a"] == found["dog"] == 0
    tokenizer = tokenizer_of(captions)
    assert values[tokenizer.mask_id] == pytest.approx(0.3)
    assert (values >= 0).all()
    assert (values <= 1).all()
