"""Image-caption pairs as padded batches, with what training disturbs in them.

Axes:  image, caption      given or in the batch      pair    of the global batch: image and caption
       region, piece, word padded to the most

A batch is gathered in one go from the mapped features and the flat tokens; nothing is done image
by image. What is drawn at random depends on (seed, epoch, step) and is drawn for the global batch,
so that it does not depend on how many workers share the batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Int64

from cpfean.data.batch import Batch, CaptionBatch, ImageBatch, each_once
from cpfean.data.split import Split
from cpfean.data.tokens import CaptionTokenizer, Tokens
from cpfean.errors import ConfigError

Indices = Sequence[int] | Int[np.ndarray, "index"]

_REGIONS, _WORDS, _ORDER = 0, 1, 2  # independent random streams of one seed
_MASKED, _REPLACED = 0.5, 0.1  # shares of the disturbed words; the others are deleted


class BatchRequest(NamedTuple):
    """A worker's rows of a step's global batch.

    Attributes:
        epoch, step: which step it is; they seed what is drawn.
        pairs: the captions of the global batch.
        start, stop: the rows wanted.
    """

    epoch: int
    step: int
    pairs: Int64[np.ndarray, "pair"]
    start: int
    stop: int


class WordFeatures(NamedTuple):
    """Outputs of a frozen text encoder for all captions, one vector a word, flat.

    Attributes:
        values: float32, may be memory-mapped.
        offsets: where each caption starts; one more than there are captions.
    """

    values: Float[np.ndarray, "word text"]
    offsets: Int64[np.ndarray, "caption+1"]


class RetrievalDataset:
    """The pairs of a split: caption k and its image, for every caption k.

    Args:
        split: the images.
        tokens: its captions, tokenized, in the same order.
        tokenizer: that made the tokens; tells which pieces words are replaced by.
        region_dropout: share of an image's regions that a training batch leaves out.
        word_noise: share of a caption's words that a training batch disturbs: half of them are
            masked, a tenth replaced by random pieces, the others deleted; never all of them.
        seed: of both.
        word_features: of the same captions; then `word_noise` has to be 0.
    """

    def __init__(
        self,
        split: Split,
        tokens: Tokens,
        tokenizer: CaptionTokenizer,
        *,
        region_dropout: float = 0.0,
        word_noise: float = 0.0,
        seed: int = 0,
        word_features: WordFeatures | None = None,
    ) -> None:
        if tokens.num_captions != split.num_captions:
            raise ValueError(f"{tokens.num_captions} tokenized captions of {split.num_captions}")
        if word_features is not None:
            if word_noise:
                raise ConfigError(
                    "data.word_noise must be 0 with a frozen text encoder, whose outputs are "
                    f"computed once; got {word_noise}."
                )
            if not np.array_equal(np.diff(word_features.offsets), tokens.num_words):
                raise ValueError("the word features are not of these tokens")
        self.split = split
        self.tokens = tokens
        self.word_features = word_features
        self._region_dropout = region_dropout
        self._word_noise = word_noise
        self._seed = seed
        self._pad_id = tokenizer.pad_id
        self._mask_id = tokenizer.mask_id
        self._frame_ids = np.setdiff1d(tokenizer.special_ids, [tokenizer.unknown_id])
        self._ordinary_ids = tokenizer.ordinary_ids

    def __len__(self) -> int:
        return self.split.num_captions

    def image_batch(self, indices: Indices) -> ImageBatch:
        """All stored regions of some images; an image comes out the same in any batch.

        Args:
            indices: positions of images in the split.
        """
        images = np.asarray(indices, dtype=np.int64)
        regions = self.split.regions
        mask = np.arange(regions.num_regions) < regions.counts[images][:, None]
        labels = _picked(regions.labels, images, dtype=torch.int64)
        return ImageBatch(
            features=torch.from_numpy(regions.features[images]),
            geometry=_picked(regions.geometry, images),
            iou=_picked(regions.iou, images),
            labels=labels,
            shown_labels=each_once(labels),
            confidences=_picked(regions.confidences, images),
            region_mask=torch.from_numpy(mask),
        )

    def caption_batch(self, indices: Indices) -> CaptionBatch:
        """Some captions as they are, padded to the longest of them.

        Args:
            indices: positions of captions in the split.
        """
        captions = np.asarray(indices, dtype=np.int64)
        return self._padded(self._flat(captions), captions)

    def training_batch(self, request: BatchRequest) -> Batch:
        """The wanted rows of the global batch, disturbed as for training.

        Padded to the longest caption of the global batch, whichever rows are wanted. Several rows
        may show the same image, each with its own draw of regions.
        """
        pairs = np.asarray(request.pairs, dtype=np.int64)
        rows = slice(request.start, request.stop)
        image_ids = np.asarray(self.split.image_of(pairs), dtype=np.int64)

        if self._region_dropout:
            generator = np.random.default_rng((self._seed, request.epoch, request.step, _REGIONS))
            kept, mask = self._kept_regions(image_ids, generator)
            images = self._narrowed(image_ids[rows], kept[rows], mask[rows])
        else:
            images = self.image_batch(image_ids[rows])

        flat = self._flat(pairs)
        if self._word_noise:
            generator = np.random.default_rng((self._seed, request.epoch, request.step, _WORDS))
            flat = self._disturbed(flat, generator)
        captions = self._padded(flat, pairs, rows=rows)
        return Batch(images, captions, torch.from_numpy(image_ids[rows]))

    def _kept_regions(
        self, images: Int64[np.ndarray, "pair"], generator: np.random.Generator
    ) -> tuple[Int64[np.ndarray, "pair kept"], Bool[np.ndarray, "pair kept"]]:
        """Draws regions without replacement; they keep their order."""
        num_regions = self.split.regions.num_regions
        real = self.split.regions.counts[images]
        keep = np.maximum(1, np.rint((1 - self._region_dropout) * real).astype(np.int64))
        draws = generator.random((len(images), num_regions))
        draws[np.arange(num_regions) >= real[:, None]] = np.inf
        rank = draws.argsort(axis=1).argsort(axis=1)
        dropped = rank >= keep[:, None]
        most = keep.max()
        kept = dropped.argsort(axis=1, kind="stable")[:, :most]
        return kept, np.arange(most) < keep[:, None]

    def _narrowed(
        self,
        images: Int64[np.ndarray, "pair"],
        kept: Int64[np.ndarray, "pair kept"],
        mask: Bool[np.ndarray, "pair kept"],
    ) -> ImageBatch:
        regions = self.split.regions
        rows = images[:, None]
        iou = regions.iou
        labels = _picked(regions.labels, rows, kept, dtype=torch.int64)
        return ImageBatch(
            features=torch.from_numpy(regions.features[rows, kept]),
            geometry=_picked(regions.geometry, rows, kept),
            iou=_picked(iou, images[:, None, None], kept[:, :, None], kept[:, None, :]),
            labels=labels,
            shown_labels=each_once(labels),
            confidences=_picked(regions.confidences, rows, kept),
            region_mask=torch.from_numpy(mask),
        )

    def _flat(self, captions: Int64[np.ndarray, "caption"]) -> _Flat:
        return _flat(self.tokens, captions)

    def _disturbed(self, flat: _Flat, generator: np.random.Generator) -> _Flat:
        """Masks, replaces and deletes words."""
        num_captions = len(flat.num_words)
        first_word = _starts(flat.num_words)
        caption_of_word = np.repeat(np.arange(num_captions), flat.num_words)
        word = first_word[flat.caption] + flat.word_index  # of the batch; not for pieces of none
        touchable = (flat.word_index >= 0) & ~np.isin(flat.pieces, self._frame_ids)
        open_word = np.zeros(len(caption_of_word), dtype=bool)
        open_word[word[touchable]] = True

        disturbed = (generator.random(len(open_word)) < self._word_noise) & open_word
        how = generator.random(len(open_word))
        masked = disturbed & (how < _MASKED)
        replaced = disturbed & ~masked & (how < _MASKED + _REPLACED)
        deleted = disturbed & ~masked & ~replaced
        # Where every word would go, the one that was closest to staying stays.
        num_open = np.bincount(caption_of_word, weights=open_word)
        num_deleted = np.bincount(caption_of_word, weights=deleted)
        for caption in np.flatnonzero((num_deleted == num_open) & (num_deleted > 0)):
            words = slice(first_word[caption], first_word[caption] + flat.num_words[caption])
            deleted[words.start + np.where(deleted[words], how[words], np.inf).argmin()] = False

        random_ids = generator.choice(self._ordinary_ids, size=len(flat.pieces))
        pieces = np.where(touchable & masked[word], self._mask_id, flat.pieces)
        pieces = np.where(touchable & replaced[word], random_ids, pieces)
        keep = ~(touchable & deleted[word])
        before: np.ndarray = np.cumsum(deleted) - deleted  # deleted words before each, of the batch
        before -= before[first_word][caption_of_word]  # of its caption
        moved = np.where(flat.word_index >= 0, flat.word_index - before[word], -1)
        links = None
        if flat.links is not None:
            stays = np.split(~deleted, first_word[1:])
            links = [link[np.ix_(s, s)] for link, s in zip(flat.links, stays, strict=True)]
        return _Flat(
            pieces=pieces[keep],
            caption=flat.caption[keep],
            word_index=moved[keep],
            num_words=np.bincount(caption_of_word, weights=~deleted).astype(np.int64),
            links=links,
        )

    def _padded(
        self, flat: _Flat, captions: Int64[np.ndarray, "caption"], *, rows: slice = slice(None)
    ) -> CaptionBatch:
        padded = _padded(flat, pad_id=self._pad_id, rows=rows)
        if self.word_features is None:
            return padded
        features = self._padded_features(captions[rows], flat.num_words.max(initial=1))
        return padded._replace(word_features=torch.from_numpy(features))

    def _padded_features(
        self, captions: Int64[np.ndarray, "caption"], most_words: int
    ) -> Float[np.ndarray, "caption word text"]:
        assert self.word_features is not None
        values, offsets = self.word_features
        lengths = offsets[captions + 1] - offsets[captions]
        column = np.arange(lengths.sum()) - np.repeat(_starts(lengths), lengths)
        row = np.repeat(np.arange(len(captions)), lengths)
        result = np.zeros((len(captions), most_words, values.shape[1]), dtype=np.float32)
        result[row, column] = values[offsets[captions][row] + column]
        return result


def sentence_batch(tokens: Tokens, *, pad_id: int) -> CaptionBatch:
    """Captions that are of no split, padded to the longest of them.

    Args:
        tokens: theirs, all of which are taken.
        pad_id: the tokenizer's padding.
    """
    return _padded(_flat(tokens, np.arange(tokens.num_captions)), pad_id=pad_id)


class GlobalBatches:
    """One epoch's batches, the same on every worker but for the rows wanted.

    The order of the pairs comes from (seed, epoch). The last batch is left out if it is smaller
    than the others, unless it is the only one.

    Args:
        num_pairs: captions of the split.
        batch_size: of the global batch.
        rank, world_size: which worker of how many; the first ones get a row more if the batch
            cannot be split evenly.

    Raises:
        ConfigError: a batch smaller than the number of workers.
    """

    def __init__(
        self,
        num_pairs: int,
        batch_size: int,
        *,
        seed: int,
        epoch: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self._num_pairs = num_pairs
        self._batch_size = min(batch_size, num_pairs)
        if self._batch_size < world_size:
            raise ConfigError(
                f"optim.batch_size is split over the workers and must be at least {world_size}, "
                f"their number; got {self._batch_size} pairs in a batch."
            )
        self._seed = seed
        self._epoch = epoch
        share, more = divmod(self._batch_size, world_size)
        self._start = rank * share + min(rank, more)
        self._stop = self._start + share + (rank < more)

    def __len__(self) -> int:
        return self._num_pairs // self._batch_size

    def __iter__(self) -> Iterator[BatchRequest]:
        order = np.random.default_rng((self._seed, self._epoch, _ORDER)).permutation(
            self._num_pairs
        )
        for step in range(len(self)):
            pairs = order[step * self._batch_size : (step + 1) * self._batch_size]
            yield BatchRequest(self._epoch, step, pairs, self._start, self._stop)


class _Flat(NamedTuple):
    """Pieces of a batch's captions, one caption after the other."""

    pieces: Int64[np.ndarray, "piece"]
    caption: Int64[np.ndarray, "piece"]  # row of the batch
    word_index: Int64[np.ndarray, "piece"]
    num_words: Int64[np.ndarray, "caption"]
    links: list[Bool[np.ndarray, "word word"]] | None


def _flat(tokens: Tokens, captions: Int64[np.ndarray, "caption"]) -> _Flat:
    """The pieces of some captions."""
    starts = tokens.offsets[captions]
    lengths = tokens.offsets[captions + 1] - starts
    positions = np.repeat(starts - _starts(lengths), lengths) + np.arange(lengths.sum())
    return _Flat(
        pieces=tokens.pieces[positions].astype(np.int64),
        caption=np.repeat(np.arange(len(captions)), lengths),
        word_index=tokens.word_index[positions].astype(np.int64),
        num_words=tokens.num_words[captions].astype(np.int64),
        links=None if tokens.links is None else [tokens.links[c] for c in captions],
    )


def _padded(flat: _Flat, *, pad_id: int, rows: slice = slice(None)) -> CaptionBatch:
    """Some rows of a batch of captions, padded to the longest of the whole batch."""
    lengths = np.bincount(flat.caption, minlength=len(flat.num_words))
    column = np.arange(len(flat.pieces)) - np.repeat(_starts(lengths), lengths)
    shape = (len(lengths), lengths.max(initial=1))
    tokens = np.full(shape, pad_id, dtype=np.int64)
    tokens[flat.caption, column] = flat.pieces
    word_index = np.full(shape, -1, dtype=np.int64)
    word_index[flat.caption, column] = flat.word_index
    most_words = flat.num_words.max(initial=1)

    links = None
    if flat.links is not None:
        links = np.zeros((len(lengths), most_words, most_words), dtype=bool)
        for row, link in enumerate(flat.links):
            links[row, : len(link), : len(link)] = link
    return CaptionBatch(
        tokens=torch.from_numpy(tokens[rows]),
        token_mask=torch.from_numpy((np.arange(shape[1]) < lengths[:, None])[rows]),
        word_index=torch.from_numpy(word_index[rows]),
        word_mask=torch.from_numpy((np.arange(most_words) < flat.num_words[:, None])[rows]),
        word_links=None if links is None else torch.from_numpy(links[rows]),
        word_features=None,
    )


def _starts(lengths: Int64[np.ndarray, "row"]) -> Int64[np.ndarray, "row"]:
    return np.cumsum(lengths) - lengths


def _picked(
    array: np.ndarray | None, *indices: np.ndarray, dtype: torch.dtype | None = None
) -> torch.Tensor | None:
    return None if array is None else torch.from_numpy(array[indices]).to(dtype)
