"""Captions as word pieces and words, the text encoder's way.

Axes:  caption, piece   of all captions given, one after the other      word   of one caption

A word is what the tokenizer's pre-tokenizer takes for one (for BERT: a run of letters and digits),
but for punctuation marks, which the encoder sees and nothing else does; where a caption has nothing
but marks, they are its words. A piece is an entry of the vocabulary; a word has one or more.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Int32, Int64

from cpfean.config import TextConfig
from cpfean.errors import CheckpointError, ConfigError, DataError, message_of
from cpfean.files import open_file
from cpfean.json_files import read_object

logger = logging.getLogger(__name__)

SPACY_MODEL = "en_core_web_sm"
_SETTINGS = "caption_tokenizer.json"  # ours, beside the files of the Hugging Face tokenizer
_SPECIALS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
# BERT drops these, which would make one word of the two beside them.
_SEPARATORS = str.maketrans(dict.fromkeys("\v\f\x1c\x1d\x1e\x1f\x85", " "))
_CHUNK = 4096  # captions tokenized at a time
# A caption is cut before it is tokenized where it has more characters than these for a piece.
_LONGEST_PIECE = 64
_AHEAD = 256  # characters behind a word that a tokenizer may look at, for a special piece
_LONGEST_WORD = 1000  # characters; WordPiece takes a word of more than 100 for unknown
_LARGEST_FILE = 2**28  # bytes, of any one file of a tokenizer
_MOST_UNKNOWN = 0.01  # of a split's captions
_ALPHABET = 4  # at most one in so many pieces of "scratch" is there for a character
_SUFFIXES = (".json", ".txt", ".model")
_VOCABULARIES = ("tokenizer.json", "vocab.txt", "vocab.json")

Units = Literal["words", "pieces"]
Graph = Literal["dense", "window", "syntax"]


class ParsedToken(NamedTuple):
    """A token of a dependency parse.

    Attributes:
        start, stop: its characters in the caption.
        head: position of the token that it depends on; its own for a root.
    """

    start: int
    stop: int
    head: int


Parser = Callable[[Sequence[str]], Iterable[Sequence[ParsedToken]]]


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """Tokenized captions, flat: caption c has pieces offsets[c] to offsets[c + 1].

    Attributes:
        pieces: ids in the vocabulary, [CLS] and [SEP] included.
        offsets: where each caption starts; one more than there are captions.
        word_index: the word of its caption that a piece belongs to, from 0; -1 for none. With
            units "pieces", the piece's own place.
        num_words: words of each caption, at least 1.
        links: for the syntax graph, which words of a caption are neighbours, symmetric, a word and
            itself included; None for other graphs.
        num_truncated: captions that were cut.
    """

    pieces: Int32[np.ndarray, "piece"]
    offsets: Int64[np.ndarray, "caption+1"]
    word_index: Int32[np.ndarray, "piece"]
    num_words: Int32[np.ndarray, "caption"]
    links: list[Bool[np.ndarray, "word word"]] | None
    num_truncated: int

    @property
    def num_captions(self) -> int:
        return len(self.num_words)

    @cached_property
    def content_key(self) -> str:
        """SHA-256 over everything, to recognise what was computed from the same tokens."""
        digest = hashlib.sha256()
        for array in (self.pieces, self.offsets, self.word_index, self.num_words):
            digest.update(f"{array.dtype.str}{array.shape}".encode())
            digest.update(np.ascontiguousarray(array).tobytes())
        for links in self.links or ():
            digest.update(np.packbits(links).tobytes())
        return digest.hexdigest()


class CaptionTokenizer:
    """A Hugging Face tokenizer of the BERT family, and what counts as a word.

    Args:
        tokenizer: a fast one, which knows where its pieces come from.
        units: "words", or "pieces" to take every piece and special for a word.
        max_tokens: pieces that a caption is cut to, specials included.
        graph: "syntax" makes `encode` parse the captions.
        parser: gives the dependency parses; spaCy's if None.

    Raises:
        ConfigError: a tokenizer without [PAD] or [MASK] or without words; no spaCy for "syntax".
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        units: Units,
        max_tokens: int,
        graph: Graph = "dense",
        parser: Parser | None = None,
    ) -> None:
        _check_suits(tokenizer)
        self.units = units
        self.max_tokens = max_tokens
        self.graph = graph
        self._tokenizer = tokenizer
        self._parser = (parser or spacy_parser()) if graph == "syntax" else None

    @property
    def vocab_size(self) -> int:
        """Rows that an embedding of the pieces must have: one more than the largest id."""
        return max(self._tokenizer.get_vocab().values()) + 1

    @property
    def mask_id(self) -> int:
        return self._tokenizer.mask_token_id

    @property
    def pad_id(self) -> int:
        return self._tokenizer.pad_token_id

    @property
    def unknown_id(self) -> int:
        """The piece that stands for a word the vocabulary cannot spell; -1 if there is none."""
        unknown = self._tokenizer.unk_token_id
        return -1 if unknown is None else unknown

    @cached_property
    def special_ids(self) -> Int32[np.ndarray, "special"]:
        """Ids of the pieces that stand for no text, [CLS] for one, ascending."""
        return np.array(sorted(set(self._tokenizer.all_special_ids)), dtype=np.int32)

    @cached_property
    def ordinary_ids(self) -> Int32[np.ndarray, "ordinary"]:
        """Ids of all other pieces, ascending, without BERT's [unused...] places."""
        special = set(self.special_ids.tolist())
        vocabulary = self._tokenizer.get_vocab().items()
        ids = [i for piece, i in vocabulary if i not in special and not piece.startswith("[unused")]
        return np.array(sorted(ids), dtype=np.int32)

    def encode(self, captions: Sequence[str]) -> Tokens:
        """Tokenizes captions.

        Raises:
            DataError: a caption in which the tokenizer finds no word.
        """
        pieces: list[int] = []
        word_index: list[int] = []
        offsets = [0]
        num_words: list[int] = []
        links: list[np.ndarray] | None = None if self._parser is None else []
        num_truncated = 0
        for first in range(0, len(captions), _CHUNK):
            chunk = [c.translate(_SEPARATORS) for c in captions[first : first + _CHUNK]]
            coded = self._coded(chunk)
            parses: Iterator[Sequence[ParsedToken] | None] = iter([None] * len(chunk))
            if self._parser is not None:
                limit = _LONGEST_PIECE * self.max_tokens
                parses = iter(self._parser([caption[:limit] for caption in chunk]))
            for row, (coding, parse) in enumerate(zip(coded, parses, strict=True), start=first):
                num_truncated += bool(coding.overflowing)
                words = _words_of(coding, chunk[row - first])
                if max(words, default=-1) < 0:
                    raise DataError(
                        f"caption {row}: expected words, found none that the text encoder knows in "
                        f"{_quoted(captions[row])}; write a caption, or drop the image with its "
                        "captions."
                    )
                if self.units == "pieces":
                    words = list(range(len(words)))
                pieces += coding.ids
                word_index += words
                offsets.append(len(pieces))
                num_words.append(max(words) + 1)
                if links is not None and parse is not None:
                    links.append(_links(words, coding.offsets, parse))
        if num_truncated:
            logger.info(
                "%d of %d captions were cut to %d pieces",
                num_truncated,
                len(captions),
                self.max_tokens,
            )
        return Tokens(
            pieces=np.array(pieces, dtype=np.int32),
            offsets=np.array(offsets, dtype=np.int64),
            word_index=np.array(word_index, dtype=np.int32),
            num_words=np.array(num_words, dtype=np.int32),
            links=links,
            num_truncated=num_truncated,
        )

    def words(self, caption: str) -> list[str]:
        """The texts of a caption's words as they stand in it, without what is cut.

        With units "pieces", its pieces, specials included.
        """
        text = caption.translate(_SEPARATORS)
        coded = self._coded([text])[0]
        if self.units == "pieces":
            return list(coded.tokens)
        spans: dict[int, tuple[int, int]] = {}
        for word, (start, stop) in zip(_words_of(coded, text), coded.offsets, strict=True):
            spans[word] = (spans.get(word, (start, stop))[0], stop)
        spans.pop(-1, None)
        return [text[start:stop] for start, stop in spans.values()]

    def unknown_words(self, caption: str) -> list[str]:
        """Those words of a caption that the vocabulary cannot spell, each once, in their order.

        As they stand in it, without what is cut.
        """
        text = caption.translate(_SEPARATORS)
        coded = self._coded([text])[0]
        spans = zip(coded.ids, coded.offsets, strict=True)
        unknown = self.unknown_id
        return list(dict.fromkeys(text[start:stop] for i, (start, stop) in spans if i == unknown))

    def unknown_captions(self, tokens: Tokens) -> Int64[np.ndarray, " unknown"]:
        """Captions of which the vocabulary knows no word: marks alone do not make one known.

        Args:
            tokens: that `encode` made.
        """
        if self.unknown_id < 0:
            return np.empty(0, dtype=np.int64)
        starts = tokens.offsets[:-1]
        known = np.add.reduceat(self._is_word_piece[tokens.pieces].astype(np.int64), starts)
        unknown = np.add.reduceat((tokens.pieces == self.unknown_id).astype(np.int64), starts)
        return np.flatnonzero((known == 0) & (unknown > 0))

    def spelled(self, characters: Iterable[str]) -> set[str]:
        """Those characters that never make a word unknown, wherever in it they are."""
        listed = sorted(set(characters))
        unknown = self.unknown_id
        # Twice: what begins a word and what continues it are different pieces.
        return {
            character
            for character, coding in zip(listed, self._cut([2 * c for c in listed]), strict=True)
            if unknown not in coding.ids
        }

    @cached_property
    def _is_word_piece(self) -> Bool[np.ndarray, " piece"]:
        """Whether a piece is one of words, and neither of marks nor special."""
        special = set(self.special_ids.tolist())
        result = np.zeros(self.vocab_size, dtype=bool)
        for piece, i in self._tokenizer.get_vocab().items():
            result[i] = i not in special and any(c.isalnum() for c in piece)
        return result

    def _coded(self, texts: Sequence[str]) -> list[Any]:
        """The tokenizer's encodings, cut to `max_tokens` pieces.

        Of a long text only a beginning is tokenized: where its pieces are more than are kept, and
        all that are kept are of words before its last one, the rest of the text changes none of
        them. Where not, the beginning is doubled.
        """
        limit = _LONGEST_PIECE * self.max_tokens
        if getattr(self._tokenizer, "truncation_side", "right") != "right":
            limit = max(map(len, texts), default=0)
        coded = self._cut([text[:limit] for text in texts])
        for row, text in enumerate(texts):
            size = limit
            while size < len(text) and not _is_settled(coded[row], size):
                size *= 2
                coded[row] = self._cut([text[:size]])[0]
        return coded

    def _cut(self, texts: list[str]) -> list[Any]:
        coded = self._tokenizer(
            texts, truncation=True, max_length=self.max_tokens, return_attention_mask=False
        )
        return list(coded.encodings)

    @property
    def _vocabulary_key(self) -> str:
        """SHA-256 of the vocabulary."""
        vocabulary = sorted(self._tokenizer.get_vocab().items())
        return hashlib.sha256(json.dumps(vocabulary).encode()).hexdigest()

    def save(self, folder: Path) -> None:
        """Writes the tokenizer's files and our settings; `load` takes them back."""
        folder.mkdir(parents=True, exist_ok=True)
        self._tokenizer.save_pretrained(folder)
        settings = {
            "units": self.units,
            "max_tokens": self.max_tokens,
            "graph": self.graph,
            "vocabulary_sha256": self._vocabulary_key,
        }
        (folder / _SETTINGS).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: Path, *, parser: Parser | None = None) -> CaptionTokenizer:
        """Reads what `save` wrote.

        Raises:
            CheckpointError: files that are missing or damaged.
            ConfigError: graph "syntax" and no spaCy.
        """
        path = folder / _SETTINGS
        settings = read_object(path, error=CheckpointError)
        units: Any = settings.get("units")
        graph: Any = settings.get("graph")
        max_tokens: Any = settings.get("max_tokens")
        known = units in ("words", "pieces") and graph in ("dense", "window", "syntax")
        if not known or isinstance(max_tokens, bool) or not isinstance(max_tokens, int):
            raise CheckpointError(f"{path}: the tokenizer cannot be read: unknown settings.")
        if not 4 <= max_tokens <= 1000:
            raise CheckpointError(
                f"{path}: the tokenizer cannot be read: max_tokens must be from 4 to 1000; got "
                f"{max_tokens}."
            )
        try:
            tokenizer = _pretrained(str(folder))
            _check_suits(tokenizer)
        except ConfigError as error:
            raise CheckpointError(f"{folder}: the tokenizer cannot be read: {error}") from None
        loaded = cls(tokenizer, units=units, max_tokens=max_tokens, graph=graph, parser=parser)
        if settings.get("vocabulary_sha256", loaded._vocabulary_key) != loaded._vocabulary_key:
            raise CheckpointError(
                f"{folder}: the vocabulary is not the one that was saved with {_SETTINGS}."
            )
        return loaded


def load_tokenizer(
    text: TextConfig,
    *,
    train_captions: Sequence[str],
    max_tokens: int,
    graph: Graph = "dense",
    parser: Parser | None = None,
) -> CaptionTokenizer:
    """The tokenizer of the configured text encoder.

    Args:
        train_captions: what the vocabulary of "scratch" is made from; not looked at otherwise.
        max_tokens: pieces that a caption is cut to, specials included.
        graph: `model.words.graph`.
        parser: gives the parses for graph "syntax"; spaCy's if None.

    Raises:
        ConfigError: a tokenizer that cannot be loaded or lacks what is needed.
    """
    if text.encoder == "scratch":
        tokenizer = _scratch(
            train_captions, size=text.scratch_vocabulary, limit=_LONGEST_PIECE * max_tokens
        )
    else:
        tokenizer = _pretrained(text.encoder)
    return CaptionTokenizer(
        tokenizer, units=text.units, max_tokens=max_tokens, graph=graph, parser=parser
    )


def spacy_parser() -> Parser:
    """Dependency parses by spaCy's small English model.

    Raises:
        ConfigError: spaCy or the model is not installed.
    """
    advice = (
        'model.words.graph = "syntax" needs spaCy and its model: pip install "cpfean[syntax]" and '
        f'python -m spacy download {SPACY_MODEL}; or choose "dense" or "window".'
    )
    try:
        import spacy
    except ImportError:
        raise ConfigError(f"spaCy is not installed. {advice}") from None
    try:
        nlp = spacy.load(SPACY_MODEL, exclude=["ner", "lemmatizer"])
    except OSError:
        raise ConfigError(f"spaCy's model {SPACY_MODEL} is not installed. {advice}") from None

    def parse(captions: Sequence[str]) -> Iterator[list[ParsedToken]]:
        for document in nlp.pipe(captions, batch_size=256):
            yield [ParsedToken(t.idx, t.idx + len(t.text), t.head.i) for t in document]

    return parse


def check_known(
    tokenizer: CaptionTokenizer,
    tokens: Tokens,
    captions: Sequence[str],
    *,
    split: str,
    made_from: bool = False,
) -> None:
    """Warns of captions of which the vocabulary knows no word, and refuses a split with many.

    Args:
        tokenizer: that made `tokens` of `captions`.
        tokens: of the whole split.
        captions: their texts.
        split: its name.
        made_from: whether the vocabulary was made from this split; then it is not refused: there is
            no better one.

    Raises:
        DataError: they are more than 1 % of the split.
    """
    unknown = tokenizer.unknown_captions(tokens).tolist()
    if unknown and (made_from or len(unknown) <= _MOST_UNKNOWN * len(captions)):
        logger.warning("%s", _unknown(unknown, captions, split=split))
    else:
        _refuse_unknown(unknown, captions, split=split)


def check_vocabulary(
    text: TextConfig,
    captions: Mapping[str, Sequence[str]],
    *,
    max_tokens: int,
    tokenizer: CaptionTokenizer | None = None,
) -> None:
    """Refuses splits of which the vocabulary knows too little, as `check_known` will.

    Captions that any vocabulary of the kind can spell are told by their characters, so nothing is
    tokenized, nor a vocabulary made, where all is well. Below 1 % nothing is said.

    Args:
        text: the text encoder.
        captions: of each split, by its name; "train" is what the vocabulary of "scratch" is made
            from.
        max_tokens: pieces that a caption is cut to, specials included.
        tokenizer: of an encoder that is not "scratch".

    Raises:
        DataError: more than 1 % of a split are captions of which the vocabulary knows no word.
    """
    train = captions["train"]
    checked = {name: some for name, some in captions.items() if tokenizer or name != "train"}
    if tokenizer is None:
        seen: set[str] = set().union(*(c for c in train if len(c) <= _LONGEST_WORD))
        # Of too large a script the vocabulary leaves characters out.
        safe = seen if len(seen) <= text.scratch_vocabulary // _ALPHABET else set()
    else:
        safe = tokenizer.spelled(set().union(*(c for some in checked.values() for c in some)))
    for split, some in checked.items():
        doubtful = [row for row, caption in enumerate(some) if not _is_spelled(caption, safe)]
        if len(doubtful) <= _MOST_UNKNOWN * len(some):
            continue
        tokenizer = tokenizer or load_tokenizer(text, train_captions=train, max_tokens=max_tokens)
        tokens = tokenizer.encode([some[row] for row in doubtful])
        unknown = [doubtful[place] for place in tokenizer.unknown_captions(tokens)]
        _refuse_unknown(unknown, some, split=split)


def _is_spelled(caption: str, safe: set[str]) -> bool:
    """Whether a vocabulary that has these characters spells every word of a caption."""
    # A character may become several before it is looked up, and 100 make a word unknown.
    return safe.issuperset(caption) and all(len(run) <= 30 for run in caption.split())


def _refuse_unknown(unknown: Sequence[int], captions: Sequence[str], *, split: str) -> None:
    if len(unknown) > _MOST_UNKNOWN * len(captions):
        raise DataError(
            f"{_unknown(unknown, captions, split=split)}. At most {100 * _MOST_UNKNOWN:.0f} % may "
            "be so. Are they in another language than the training captions or the text encoder, "
            "was the file read in a wrong encoding, or does the vocabulary belong to another model?"
        )


def _unknown(unknown: Sequence[int], captions: Sequence[str], *, split: str) -> str:
    """How many captions there are, in words, and the first of them."""
    first = ", ".join(f"line {row + 1} {_quoted(captions[row])}" for row in unknown[:3])
    return (
        f"{split}: the vocabulary knows no word of {len(unknown):,} of {len(captions):,} captions "
        f"({100 * len(unknown) / len(captions):.3g} %): {first}{', ...' if unknown[3:] else ''}"
    )


def _quoted(caption: str) -> str:
    """A caption in a message, without most of a long one."""
    return repr(caption if len(caption) <= 80 else f"{caption[:77]}...")


def _is_settled(coding: Any, size: int) -> bool:
    """Whether more text behind the `size` characters that were coded cannot change what is kept."""
    if not coding.overflowing:
        return False
    kept = max((word for word in coding.word_ids if word is not None), default=-1)
    last = max((word for word in coding.overflowing[-1].word_ids if word is not None), default=-1)
    end = max(stop for _, stop in coding.offsets)
    return kept < last and end + _AHEAD <= size


def _pretrained(name: str) -> Any:
    from transformers import AutoTokenizer  # seconds to import

    _check_files(Path(name))
    try:
        return AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except Exception as error:  # the library's own, and whatever it trips over in damaged files
        raise ConfigError(
            f"model.text.encoder {name!r}: no tokenizer can be loaded ({message_of(error)}). Give "
            "a local folder or a Hugging Face name (the first use downloads it), or "
            '"scratch", which needs neither.'
        ) from None


def _check_files(folder: Path) -> None:
    """Refuses a local folder in which something stands in place of a tokenizer's file."""
    if not folder.is_dir():
        return
    try:
        present = [path for path in sorted(folder.iterdir()) if path.suffix in _SUFFIXES]
    except OSError as error:
        raise ConfigError(f"{folder}: cannot be read: {error.strerror}.") from None
    if not any(path.name in _VOCABULARIES or path.suffix == ".model" for path in present):
        raise ConfigError(
            f"model.text.encoder {str(folder)!r}: no tokenizer can be loaded: expected one of "
            f"{', '.join(_VOCABULARIES)}, found none. Copy it from where the encoder is from, or "
            'choose "scratch".'
        )
    for path in present:
        try:
            with open_file(path) as file:
                size = os.fstat(file.fileno()).st_size
        except OSError as error:
            raise ConfigError(f"{path}: cannot be read: {error.strerror or error}.") from None
        if size > _LARGEST_FILE:
            raise ConfigError(f"{path}: expected at most {_LARGEST_FILE:,} bytes, found {size:,}.")


def _check_suits(tokenizer: Any) -> None:
    if not getattr(tokenizer, "is_fast", False):
        raise ConfigError(
            "model.text.encoder needs a fast tokenizer, which knows the word of each piece; "
            f"{type(tokenizer).__name__} is none. Choose a BERT-type encoder."
        )
    for role in ("pad_token", "mask_token"):
        if getattr(tokenizer, role) is None:
            raise ConfigError(
                f"model.text.encoder needs a tokenizer with a {role}; this one has none. "
                "Choose a BERT-type encoder."
            )
    if len(tokenizer) <= len(set(tokenizer.all_special_ids)):
        raise ConfigError("model.text.encoder: the tokenizer's vocabulary is empty.")


def _scratch(captions: Sequence[str], *, size: int, limit: int) -> Any:
    """A lower-case WordPiece tokenizer whose vocabulary is made from the captions.

    Args:
        captions: the texts.
        size: the most pieces that it may have.
        limit: characters of a caption that are looked at.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    normalizer = normalizers.BertNormalizer(lowercase=True)
    splitter = pre_tokenizers.BertPreTokenizer()
    words: Counter[str] = Counter()
    for caption in captions:
        text = normalizer.normalize_str(caption[:limit].translate(_SEPARATORS))
        words.update(w for w, _ in splitter.pre_tokenize_str(text) if len(w) <= _LONGEST_WORD)
    vocabulary = {piece: i for i, piece in enumerate(_vocabulary(words, size=size))}

    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = splitter
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        special_tokens=[(piece, vocabulary[piece]) for piece in ("[CLS]", "[SEP]")],
    )
    pad, unknown, first, last, mask = _SPECIALS
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=pad,
        unk_token=unknown,
        cls_token=first,
        sep_token=last,
        mask_token=mask,
    )


def _vocabulary(words: Counter[str], *, size: int) -> list[str]:
    """WordPiece vocabulary of at most `size` pieces, the same for the same words.

    The trainer numbers the pieces that continue a word as it meets them in a hash table, which
    differs from run to run, and breaks ties by these numbers. So all single characters, with and
    without the prefix, are handed to it in a fixed order; what follows is then fixed too.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    counts: Counter[str] = Counter()
    for word, count in words.items():
        for character in word:
            counts[character] += count
    # Rare characters of a large script must leave room for words.
    alphabet = sorted(counts, key=lambda c: (-counts[c], c))[: size // _ALPHABET]
    known = set(alphabet)
    trainer = trainers.WordPieceTrainer(
        vocab_size=size,
        special_tokens=[*_SPECIALS, *alphabet, *(f"##{c}" for c in alphabet)],
        show_progress=False,
    )
    trained = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    trained.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    lines = (" ".join([w] * n) for w, n in sorted(words.items()) if known.issuperset(w))
    trained.train_from_iterator(lines, trainer)
    pieces = trained.get_vocab()
    return sorted(pieces, key=pieces.__getitem__)


def _words_of(coding: Any, text: str) -> list[int]:
    """The word of each piece of a text, from 0; -1 for specials and punctuation marks."""
    # Piece by piece: some tokenizers take a mark for the end of the word before it.
    words = [
        None if _is_mark(text[start:stop]) else word
        for word, (start, stop) in zip(coding.word_ids, coding.offsets, strict=True)
    ]
    return _numbered(coding.word_ids if set(words) <= {None} else words)


@lru_cache(maxsize=2**16)  # captions are made of few words
def _is_mark(text: str) -> bool:
    """Whether there is punctuation and nothing else; signs of ASCII such as $ are some to BERT."""
    return all(
        unicodedata.category(c).startswith("P") or (c.isascii() and not c.isalnum()) for c in text
    )


def _numbered(word_ids: Sequence[int | None]) -> list[int]:
    """Words counted from 0 without gaps; -1 for pieces of none."""
    result = []
    last, number = None, -1
    for word in word_ids:
        if word is not None and word != last:
            last, number = word, number + 1
        result.append(-1 if word is None else number)
    return result


def _links(
    words: Sequence[int],
    spans: Sequence[tuple[int, int]],
    parse: Sequence[ParsedToken],
) -> Bool[np.ndarray, "word word"]:
    """Dependency edges carried over from the parser's tokens to the words they overlap with.

    Two words are neighbours if their tokens are the ends of an edge, or if they overlap with the
    same token; the two tokenizations need not agree anywhere.

    Args:
        words: the word of each piece, -1 for none.
        spans: the characters of each piece in the caption.
    """
    num_words = max(words) + 1
    starts = np.full(num_words, np.iinfo(np.int64).max)
    stops = np.zeros(num_words, dtype=np.int64)
    for word, (start, stop) in zip(words, spans, strict=True):
        if word >= 0:
            starts[word], stops[word] = min(starts[word], start), max(stops[word], stop)
    links = np.eye(num_words, dtype=bool)
    if not parse:
        return links
    tokens = np.array(parse, dtype=np.int64)  # token (start stop head)
    covers = (starts < tokens[:, 1:2]) & (stops > tokens[:, 0:1])  # token word
    for token, head in enumerate(tokens[:, 2]):
        ends = covers[token] | covers[head]
        links |= np.outer(covers[token], ends)
    return links | links.T


__all__ = [
    "SPACY_MODEL",
    "CaptionTokenizer",
    "ParsedToken",
    "Parser",
    "Tokens",
    "check_known",
    "check_vocabulary",
    "load_tokenizer",
    "spacy_parser",
]
