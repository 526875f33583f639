"""Captions and regions with a known share of them spoilt, for measuring what that costs.

Axes:  image, caption   of a split                   row        an image or a caption
       region           stored for an image          position   of all rows, one row after the other

Everything follows from the seed. What is spoilt at a small share is spoilt at a larger one too, so
that along a curve nothing but the share changes.

A word is a run of letters and digits, apostrophes between them included. Punctuation is no word: it
is not touched and not counted.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Bool, Float, Int

_WORD = re.compile(r"\w+(?:['\N{RIGHT SINGLE QUOTATION MARK}]\w+)*")
_TOUCHED, _DRAWN = 0, 1  # independent random streams of one seed


def touched(
    counts: Int[np.ndarray, " row"],
    share: float,
    *,
    seed: int,
    spared: int = 0,
    together: int = 1,
) -> Bool[np.ndarray, " position"]:
    """Which positions are touched: an exact share of all, spread evenly over the rows.

    Every row has its share, rounded down or up at random, so that the whole has exactly
    round(share x positions). Positions touched at a share are touched at every larger one.

    Args:
        counts: positions of each row.
        share: from 0 to 1.
        seed: of the draw.
        spared: so many positions of a row are never touched; where that leaves fewer than the
            share asks for, all others are.
        together: the first positions that are touched in a row come so many at a time, 1 or 2,
            where one alone would be of no use. A row with fewer has none. With 2 the total is one
            short where only half a couple would fit.
    """
    rng = np.random.default_rng((seed, _TOUCHED))
    counts = np.asarray(counts, dtype=np.int64)
    starts = np.cumsum(counts) - counts
    row = np.repeat(np.arange(len(counts)), counts)
    phase = rng.random(len(counts))[row]
    by_draw = np.lexsort((rng.random(len(row)), row))  # row after row, shuffled within each
    turn = np.arange(len(row)) - starts[row]  # of by_draw: when it is touched, within its row

    # The share at which a position's turn comes; a row of n has its k-th turn around k / n.
    due = np.where(turn < together, together * phase, turn + phase) / np.maximum(counts[row], 1)
    due[(turn >= counts[row] - spared) | (counts[row] < together)] = np.inf
    order = np.lexsort((turn, row, due))
    wanted = min(round(share * len(row)), int(np.isfinite(due).sum()))
    chosen = order[:wanted]
    if together == 2 and wanted and turn[chosen[-1]] == 0:
        chosen = chosen[:-1]  # half a couple
    result = np.zeros(len(row), dtype=bool)
    result[by_draw[chosen]] = True
    return result


def words_of(caption: str) -> list[str]:
    """The words of a caption, in their order."""
    return _WORD.findall(caption)


def drop_words(captions: Sequence[str], share: float, *, seed: int) -> list[str]:
    """Leaves words out; of every caption that has words one stays.

    Args:
        captions: texts.
        share: of all their words, from 0 to 1.
        seed: of the draw.
    """
    chosen = touched(_num_words(captions), share, seed=seed, spared=1)
    return _rewritten(captions, chosen, lambda words, places: [""] * len(places))


def replace_words(captions: Sequence[str], share: float, *, seed: int) -> list[str]:
    """Puts other words in the place of some, drawn as often as they occur in these captions.

    Args:
        captions, share, seed: as in `drop_words`.

    Raises:
        ValueError: all words are the same, so there is no other one.
    """
    words = np.array([word for caption in captions for word in words_of(caption)], dtype=object)
    chosen = touched(_num_words(captions), share, seed=seed)
    rng = np.random.default_rng((seed, _DRAWN))
    kinds = np.array([word.lower() for word in words], dtype=object)
    if len(words) and len(set(kinds.tolist())) < 2:
        raise ValueError("the captions have a single word between them: there is no other one")
    drawn = rng.integers(len(words), size=len(words)) if len(words) else np.zeros(0, dtype=int)
    # Of all words, touched or not: what a word is replaced by must not depend on the share.
    while len(same := np.flatnonzero(kinds[drawn] == kinds)):
        drawn[same] = rng.integers(len(words), size=len(same))
    others = iter(words[drawn][chosen].tolist())
    return _rewritten(captions, chosen, lambda words, places: [next(others) for _ in places])


def shuffle_words(captions: Sequence[str], share: float, *, seed: int) -> list[str]:
    """Lets words of a caption change places with each other; each touched one goes elsewhere.

    A caption has two words touched or more, or none: one has nowhere to go.

    Args:
        captions, share, seed: as in `drop_words`.
    """
    chosen = touched(_num_words(captions), share, seed=seed, together=2)
    rng = np.random.default_rng((seed, _DRAWN))
    orders = [rng.permutation(len(words_of(caption))) for caption in captions]
    order_of = iter(orders)

    def cycled(words: list[str], places: list[int]) -> list[str]:
        # One round through the touched places, in a random order of them.
        order = next(order_of)
        places_in_turn = sorted(places, key=lambda place: order[place])
        goes_to = dict(zip(places_in_turn, places_in_turn[1:] + places_in_turn[:1], strict=True))
        return [words[goes_to[place]] for place in places]

    return _rewritten(captions, chosen, cycled)


def replace_labels(
    labels: Int[np.ndarray, "image region"],
    share: float,
    *,
    counts: Int[np.ndarray, " image"],
    num_labels: int,
    seed: int,
) -> Int[np.ndarray, "image region"]:
    """Gives regions another label, any of the vocabulary alike.

    Args:
        labels: positions in the vocabulary.
        share: of the real regions, from 0 to 1.
        counts: real regions of each image, the first ones; the others are left alone.
        num_labels: length of the vocabulary, at least 2.
        seed: of the draw.

    Raises:
        ValueError: a vocabulary with no other label in it.
    """
    if num_labels < 2:
        raise ValueError(
            f"a label can only be replaced by another; the vocabulary has {num_labels}"
        )
    real = np.arange(labels.shape[1]) < np.asarray(counts)[:, None]
    chosen = np.zeros(labels.shape, dtype=bool)
    chosen[real] = touched(counts, share, seed=seed)
    rng = np.random.default_rng((seed, _DRAWN))
    others = rng.integers(num_labels - 1, size=labels.shape, dtype=np.int64)
    others += others >= labels  # all but its own
    return np.where(chosen, others, labels).astype(labels.dtype)


def noisy_features(
    features: Float[np.ndarray, "image region feature"], share: float, *, seed: int
) -> Float[np.ndarray, "image region feature"]:
    """Adds normal noise to every number of a feature vector.

        x + share rms(x) z,   z ~ N(0, 1),   rms(x) = |x| / sqrt(feature)

    Args:
        features: may be memory-mapped; the result is in memory, in the same type.
        share: standard deviation of the noise, as a share of the vector's own root mean square; 0
            returns the features themselves.
        seed: of the draw; an image's noise depends on the seed and its position.
    """
    if share == 0:
        return features
    result = np.empty(features.shape, dtype=features.dtype)
    for image, stored in enumerate(features):
        vectors = stored.astype(np.float32)
        # An image's own stream fills region after region: the first ones have the same noise
        # however many are kept.
        noise = np.random.default_rng((seed, _DRAWN, image)).standard_normal(
            vectors.shape, dtype=np.float32
        )
        rms = np.sqrt(np.square(vectors).mean(axis=1, keepdims=True))
        result[image] = vectors + share * rms * noise
    return result


def _num_words(captions: Sequence[str]) -> Int[np.ndarray, " caption"]:
    return np.array([len(words_of(caption)) for caption in captions], dtype=np.int64)


def _rewritten(
    captions: Sequence[str],
    chosen: Bool[np.ndarray, " position"],
    change: Callable[[list[str], list[int]], list[str]],
) -> list[str]:
    """The captions with their chosen words changed; the others as they are, to the letter.

    Args:
        captions: texts.
        chosen: of the words of all captions, one caption after the other.
        change: from a caption's words and the places of the chosen ones, in order, to the texts
            that take these places; called for every caption.
    """
    result, first = [], 0
    for caption in captions:
        spans = [match.span() for match in _WORD.finditer(caption)]
        places = np.flatnonzero(chosen[first : first + len(spans)]).tolist()
        first += len(spans)
        texts = change([caption[start:stop] for start, stop in spans], places)
        for place, text in zip(reversed(places), reversed(texts), strict=True):
            start, stop = spans[place]
            caption = caption[:start] + text + caption[stop:]
        # A word that is left out leaves two spaces.
        result.append(" ".join(caption.split()) if "" in texts else caption)
    return result


__all__ = [
    "drop_words",
    "noisy_features",
    "replace_labels",
    "replace_words",
    "shuffle_words",
    "touched",
    "words_of",
]
