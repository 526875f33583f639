"""The local score of CPFEAN and its gradient, from a block of cosines, for processors.

Axes:  image, caption   of the block     region, word   of all of them, one after the other
       row              words            column         regions

`cpfean.model.scorers.prominent.ProminentAlignment` has the equations, docs/model.md the derivation;
symbols are theirs. What is done here is the same for one pair at a time, from the pair's corner of
S, which is small enough to stay in the fastest cache. Two things are left out because they cancel
in a cosine: the normalization of both softmaxes, but for P where n needs it.

A vector holds regions. What lies beyond an image's last region is read along, the next image's
first or the slack of a row, and takes no part.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, NamedTuple

import numba
import numpy as np

from cpfean.folders import can_be_written, code_folder, say_once
from cpfean.kernels.simd import (
    VECTOR_BITS,
    absolute,
    exp,
    largest,
    load,
    maximum,
    splat,
    sqrt,
    store,
    total,
    where_above,
)

# Numbers in the widest vector: so many columns beyond the last region must exist in every row.
SLACK = VECTOR_BITS // 32

SOFT, HARD, OFF = 0, 1, 2
_CLOSED = math.log(1e-6)  # log g of a closed hard gate
_TINY = 1e-12  # least squared length, and least sum of gates
_FAR = -1e30  # log g of what is no region

# Without "reassoc": LLVM would sum over the words in vectors where it finds, while running, that
# the scratch arrays are 256 bytes apart, and one by one where not. The last bit would depend on
# where malloc had put them.
_FAST = {"contract", "nsz", "arcp"}


class Block(NamedTuple):
    """What the scores of a block of images and captions are made of.

    All floating arrays are of one type, float32 or float64, and contiguous.

    Attributes:
        cosines: S, flat: row k starts at k stride.
        stride: columns of a row, at least SLACK more than there are regions.
        word_offsets: (caption + 1) first row of each caption, and the end.
        region_offsets: (image + 1) first column of each image, and the end.
        region_gram: (image, most regions, most regions) K.
        word_gram: (caption, most words, most words) G.
        thresholds: (image, most regions) theta.
        lead: (caption, most words) log(s) / tau, what a salient word has ahead for every region.
        constants: (kappa, tau, lambda, beta).
        gate: SOFT, HARD or OFF.
    """

    cosines: np.ndarray
    stride: int
    word_offsets: np.ndarray
    region_offsets: np.ndarray
    region_gram: np.ndarray
    word_gram: np.ndarray
    thresholds: np.ndarray
    lead: np.ndarray
    constants: np.ndarray
    gate: int


class Gradients(NamedTuple):
    """Gradients of a block's arrays, of their shapes.

    Attributes:
        cosines: laid out as S is; overwritten.
        region_gram, word_gram, thresholds, constants: added to.
    """

    cosines: np.ndarray
    region_gram: np.ndarray
    word_gram: np.ndarray
    thresholds: np.ndarray
    constants: np.ndarray


class _Scratch(NamedTuple):
    """What is known of the pair at hand; each row is as wide as whole vectors.

    Words are taken four at a time in places, hence three rows more than there are words.

    Attributes:
        region_gram: K of the image.
        d_region_gram: its gradient, over all captions of the block.
        real: 1 for a region, 0 beyond the last.
        thresholds: theta.
        cosines: S of the pair, 0 beyond its regions.
        prominence: P, before it is normalized: e.
        attention: A, likewise: a.
        attended: a K.
        relevance: m.
        log_gate, log_rest: g = exp(log_gate) log_rest.
        gates: g.
        slope: d log g / dx, x = kappa (m - theta).
        share: g / z, z the sum of e over the words.
        of_regions: cos(v_r, d_r).
        length_regions: 1 / |d_r|; below 0 where it is held at its most.
        ties: 1 / number of words that reach m.
        d_log_gate: its gradient; later that of x.
        of_words: cos(c_k, w_k).
        inner_words: <c_k, w_k>.
        squared_words: |c_k|^2.
        named_by: n.
        d_named_by: its gradient.
    """

    region_gram: np.ndarray
    d_region_gram: np.ndarray
    real: np.ndarray
    thresholds: np.ndarray
    cosines: np.ndarray
    prominence: np.ndarray
    attention: np.ndarray
    attended: np.ndarray
    relevance: np.ndarray
    log_gate: np.ndarray
    log_rest: np.ndarray
    gates: np.ndarray
    slope: np.ndarray
    share: np.ndarray
    of_regions: np.ndarray
    length_regions: np.ndarray
    ties: np.ndarray
    d_log_gate: np.ndarray
    of_words: np.ndarray
    inner_words: np.ndarray
    squared_words: np.ndarray
    named_by: np.ndarray
    d_named_by: np.ndarray


class _Pair(NamedTuple):
    """Where a pair is.

    Attributes:
        image, caption: of the block.
        corner: where in the block's cosines its first word and region are.
        num_regions, num_words: real ones.
        width: numbers in a vector.
        line: columns of a row of scratch: the regions, in whole vectors.
    """

    image: int
    caption: int
    corner: int
    num_regions: int
    num_words: int
    width: int
    line: int


def _kept(function):
    """Keeps what is compiled for the next process: beside this file, or in the cache.

    numba itself would go on to ~/.cache, wherever that is, and refuse to load where it may not
    write there. Without any folder the functions are the same, and are compiled in each process.
    """
    if not numba.config.CACHE_DIR and not can_be_written(Path(__file__).parent / "__pycache__"):
        folder = code_folder()
        if folder is None:
            say_once(
                f"{Path(__file__).parent} and the cache cannot be written: each process compiles "
                "the scores again, half a minute. CPFEAN_CACHE or NUMBA_CACHE_DIR name a folder "
                "for them."
            )
            return function
        numba.config.CACHE_DIR = str(folder)
    try:
        function.enable_caching()
    except RuntimeError:  # NUMBA_CACHE_DIR, of which numba asks more than that it be there
        say_once(
            f"{numba.config.CACHE_DIR} cannot be written: each process compiles the scores again, "
            "half a minute. NUMBA_CACHE_DIR names another folder for them."
        )
    return function


_OPTIONS: dict[str, Any] = {"nogil": True, "error_model": "numpy", "fastmath": _FAST}
# A piece of the kernel becomes a part of whoever calls it, as if it were written there. Without
# numba's run time (`_nrt`) it counts no references to the arrays that it is given: the twenty of
# scratch, counted for each piece of each pair, took a twentieth of the time.
_piece = numba.njit(**_OPTIONS | {"forceinline": True, "_nrt": False})


@_kept
@numba.njit(**_OPTIONS)
def local_scores(block, scores, first_image, first_caption):
    """Scores a block of pairs.

    Args:
        block: a `Block`.
        scores: (all images, all captions) result.
        first_image, first_caption: where in `scores` the block starts.
    """
    scratch = _scratch_of(block)
    for image in range(len(block.region_offsets) - 1):
        _open_image(block, image, scratch)
        for caption in range(len(block.word_offsets) - 1):
            pair = _pair_of(block, image, caption)
            _, relevant = _compare_regions(block, pair, scratch, False)
            _attend(block, pair, scratch)
            _measure_contexts(pair, scratch, False)
            _, weighted = _weigh_words(block, pair, scratch)
            score = 0.5 * (weighted + relevant)
            scores[first_image + image, first_caption + caption] = score


@_kept
@numba.njit(**_OPTIONS)
def local_gradients(block, gradients, upstream, first_image, first_caption):
    """Propagates the gradient of a block's scores. Pairs without one cost next to nothing.

    Args:
        block: a `Block`.
        gradients: `Gradients`.
        upstream: (all images, all captions) gradient of the scores.
        first_image, first_caption: where in it the block starts.
    """
    scratch = _scratch_of(block)
    for image in range(len(block.region_offsets) - 1):
        _open_image(block, image, scratch)
        for caption in range(len(block.word_offsets) - 1):
            pair = _pair_of(block, image, caption)
            u = float(upstream[first_image + image, first_caption + caption])
            if u == 0.0:
                _clear(block, pair, gradients)
                continue
            # The score is made again: nothing of it was kept.
            sum_gates, relevant = _compare_regions(block, pair, scratch, True)
            _attend(block, pair, scratch)
            _measure_contexts(pair, scratch, True)
            sum_weights, weighted = _weigh_words(block, pair, scratch)
            u = 0.5 * u  # half the gradient for either side
            _weigh_words_back(block, pair, scratch, gradients, u, sum_weights, weighted)
            _compare_regions_back(block, pair, scratch, gradients, u, sum_gates, relevant)
            _attend_back(block, pair, scratch, gradients, u, sum_weights)
            if block.gate != OFF:
                _gate_back(block, pair, scratch, gradients)
        _close_image(block, image, scratch, gradients)


@numba.njit(**_OPTIONS)
def _scratch_of(block):
    """Scratch for any pair of the block."""
    kind = block.cosines.dtype
    width = VECTOR_BITS // 8 // block.cosines.itemsize
    columns = (block.region_gram.shape[1] + width - 1) // width * width
    rows = block.word_gram.shape[1] + 3
    return _Scratch(
        np.zeros(columns * columns, kind),
        np.zeros(columns * columns, kind),
        np.zeros(columns, kind),
        np.zeros(columns, kind),
        np.zeros(rows * columns, kind),
        np.zeros(rows * columns, kind),
        np.zeros(rows * columns, kind),
        np.zeros(rows * columns, kind),
        np.zeros(columns, kind),
        np.zeros(columns, kind),
        np.zeros(columns, kind),
        np.zeros(columns, kind),
        np.zeros(columns, kind),
        np.zeros(columns, kind),
        np.zeros(columns, kind),
        np.zeros(columns, kind),
        np.zeros(columns, kind),
        np.zeros(columns, kind),
        np.zeros(rows),
        np.zeros(rows),
        np.zeros(rows),
        np.zeros(rows),
        np.zeros(rows),
    )


@_piece
def _pair_of(block, image, caption):
    """Where a pair of the block is."""
    width = VECTOR_BITS // 8 // block.cosines.itemsize
    column = block.region_offsets[image]
    row = block.word_offsets[caption]
    num_regions = block.region_offsets[image + 1] - column
    return _Pair(
        image,
        caption,
        row * block.stride + column,
        num_regions,
        block.word_offsets[caption + 1] - row,
        width,
        (num_regions + width - 1) // width * width,
    )


@_piece
def _open_image(block, image, scratch):
    """Takes over what all pairs of an image share; its rows end with whole vectors."""
    width = VECTOR_BITS // 8 // block.cosines.itemsize
    num_regions = block.region_offsets[image + 1] - block.region_offsets[image]
    line = (num_regions + width - 1) // width * width
    for r in range(line):
        inside = r < num_regions
        scratch.real[r] = 1 if inside else 0
        scratch.thresholds[r] = block.thresholds[image, r] if inside else 0
        for s in range(num_regions):
            scratch.region_gram[s * line + r] = block.region_gram[image, s, r] if inside else 0
            scratch.d_region_gram[s * line + r] = 0


@_piece
def _close_image(block, image, scratch, gradients):
    """Hands on the gradient of K, summed over the captions."""
    width = VECTOR_BITS // 8 // block.cosines.itemsize
    num_regions = block.region_offsets[image + 1] - block.region_offsets[image]
    line = (num_regions + width - 1) // width * width
    for s in range(num_regions):
        for r in range(num_regions):
            gradients.region_gram[image, s, r] += scratch.d_region_gram[s * line + r]


@_piece
def _clear(block, pair, gradients):
    """No gradient for the cosines of a pair."""
    for k in range(pair.num_words):
        for o in range(0, pair.line, pair.width):
            at = pair.corner + k * block.stride + o
            store(gradients.cosines, at, splat(0.0, gradients.cosines))


@_piece
def _compare_regions(block, pair, scratch, differentiate):
    """Gates, and the side of the regions: which word is prominent, and how close it is.

    Returns:
        The sum of the gates, and the mean of cos(v_r, d_r) with them for weights.
    """
    kappa, tau = block.constants[0], block.constants[1]
    line, num_words, real = pair.line, pair.num_words, scratch.real
    sum_gates = 0.0
    relevant = 0.0
    for o in range(0, line, pair.width):
        counted = load(real, o)
        m = splat(_FAR, real)
        for k in range(num_words):
            # A neighbour's cosine times no weight would be NaN if it is not finite.
            found = load(block.cosines, pair.corner + k * block.stride + o)
            s = where_above(counted, 0.0, found, 0.0)
            store(scratch.cosines, k * line + o, s)
            m = maximum(s + block.lead[pair.caption, k], m)
        if block.gate == OFF:
            log_g = where_above(counted, 0.0, 0.0, splat(_FAR, real))
            rest = counted
        else:
            x = (m - load(scratch.thresholds, o)) * kappa
            t = exp(0.0 - absolute(x))
            closing = where_above(x, 0.0, t, 1.0) / (t + 1.0)  # 1 - sigmoid(x)
            if block.gate == SOFT:
                log_g = where_above(x, 0.0, 0.0, x)
                rest = counted / (t + 1.0)
            else:
                log_g = where_above(x, 0.0, 0.0, splat(_CLOSED, real))
                rest = counted
            log_g = where_above(counted, 0.0, log_g, _FAR)
            store(scratch.slope, o, closing)
        g = exp(log_g) * rest
        z = splat(0.0, real)
        inner = splat(0.0, real)
        squared = splat(0.0, real)
        for k in range(num_words):
            s = load(scratch.cosines, k * line + o)
            p = exp((s + block.lead[pair.caption, k] - m) * tau)
            store(scratch.prominence, k * line + o, p)
            z = z + p
            inner = inner + p * s
            # p' G p: G is symmetric, so half of it is enough.
            half = splat(0.0, real)
            for j in range(k):
                e = load(scratch.prominence, j * line + o)
                half = half + e * block.word_gram[pair.caption, k, j]
            squared = squared + p * (half * 2.0 + p * block.word_gram[pair.caption, k, k])
        length = 1.0 / sqrt(where_above(squared, _TINY, squared, _TINY))
        cosine = inner * length
        sum_gates += total(g)
        relevant += total(g * cosine)
        store(scratch.log_gate, o, log_g)
        store(scratch.log_rest, o, rest)
        store(scratch.gates, o, g)
        store(scratch.share, o, g / z)
        if differentiate:
            store(scratch.relevance, o, m)
            store(scratch.of_regions, o, cosine)
            # A length held at its least does not change: no gradient.
            held = where_above(squared, _TINY, length, 0.0 - length)
            store(scratch.length_regions, o, held)
    return sum_gates, relevant / max(sum_gates, _TINY)


@_piece
def _attend(block, pair, scratch):
    """The side of the words: the regions that a word attends to, and n."""
    lam = block.constants[2]
    line, width, real = pair.line, pair.width, scratch.real
    for k in range(pair.num_words):
        top = splat(_FAR, real)
        for o in range(0, line, width):
            s = load(scratch.cosines, k * line + o)
            top = maximum(s * lam + load(scratch.log_gate, o), top)
        highest = largest(top)
        inner = splat(0.0, real)
        named = splat(0.0, real)
        for o in range(0, line, width):
            s = load(scratch.cosines, k * line + o)
            w = exp(s * lam + load(scratch.log_gate, o) - highest) * load(scratch.log_rest, o)
            store(scratch.attention, k * line + o, w)
            inner = inner + w * s
            named = named + load(scratch.prominence, k * line + o) * load(scratch.share, o)
        scratch.inner_words[k] = total(inner)
        scratch.named_by[k] = total(named)


@_piece
def _measure_contexts(pair, scratch, differentiate):
    """|c_k|^2 = a_k' K a_k, for four words at a time.

    What is left of earlier pairs beyond the last word is computed along and never read.
    """
    line, width, num_regions = pair.line, pair.width, pair.num_regions
    gram, a, attended, real = scratch.region_gram, scratch.attention, scratch.attended, scratch.real
    for k in range(0, pair.num_words, 4):
        length_0 = splat(0.0, real)
        length_1 = splat(0.0, real)
        length_2 = splat(0.0, real)
        length_3 = splat(0.0, real)
        for o in range(0, line, width):
            t0 = splat(0.0, real)
            t1 = splat(0.0, real)
            t2 = splat(0.0, real)
            t3 = splat(0.0, real)
            # K is symmetric: without a gradient, what lies before these columns counts twice and
            # what lies behind them not at all.
            before = 0 if differentiate else o
            for r in range(before):
                column = load(gram, r * line + o)
                t0 = t0 + column * a[k * line + r]
                t1 = t1 + column * a[(k + 1) * line + r]
                t2 = t2 + column * a[(k + 2) * line + r]
                t3 = t3 + column * a[(k + 3) * line + r]
            t0 = t0 * 2.0
            t1 = t1 * 2.0
            t2 = t2 * 2.0
            t3 = t3 * 2.0
            until = num_regions if differentiate else min(o + width, num_regions)
            for r in range(before, until):
                column = load(gram, r * line + o)
                t0 = t0 + column * a[k * line + r]
                t1 = t1 + column * a[(k + 1) * line + r]
                t2 = t2 + column * a[(k + 2) * line + r]
                t3 = t3 + column * a[(k + 3) * line + r]
            length_0 = length_0 + t0 * load(a, k * line + o)
            length_1 = length_1 + t1 * load(a, (k + 1) * line + o)
            length_2 = length_2 + t2 * load(a, (k + 2) * line + o)
            length_3 = length_3 + t3 * load(a, (k + 3) * line + o)
            if differentiate:
                store(attended, k * line + o, t0)
                store(attended, (k + 1) * line + o, t1)
                store(attended, (k + 2) * line + o, t2)
                store(attended, (k + 3) * line + o, t3)
        scratch.squared_words[k] = total(length_0)
        scratch.squared_words[k + 1] = total(length_1)
        scratch.squared_words[k + 2] = total(length_2)
        scratch.squared_words[k + 3] = total(length_3)


@_piece
def _weigh_words(block, pair, scratch):
    """cos(c_k, w_k).

    Returns:
        The sum of the words' weights 1 + beta n_k, and the mean of the cosines with them.
    """
    beta = block.constants[3]
    sum_weights = 0.0
    weighted = 0.0
    for k in range(pair.num_words):
        weight = 1.0 + beta * scratch.named_by[k]
        cosine = scratch.inner_words[k] / math.sqrt(max(scratch.squared_words[k], _TINY))
        scratch.of_words[k] = cosine
        sum_weights += weight
        weighted += weight * cosine
    return sum_weights, weighted / sum_weights


@_piece
def _weigh_words_back(block, pair, scratch, gradients, u, sum_weights, weighted):
    """The gradients of beta and n."""
    beta = block.constants[3]
    d_beta = 0.0
    for k in range(pair.num_words):
        d_weight = u * (scratch.of_words[k] - weighted) / sum_weights
        d_beta += d_weight * scratch.named_by[k]
        scratch.d_named_by[k] = beta * d_weight
    gradients.constants[3] += d_beta


@_piece
def _compare_regions_back(block, pair, scratch, gradients, u, sum_gates, relevant):
    """What the side of the regions and n give to S, G and log g; and how many words share m."""
    tau = block.constants[1]
    line, num_words, real = pair.line, pair.num_words, scratch.real
    e, d_named_by = scratch.prominence, scratch.d_named_by
    some_gates = max(sum_gates, _TINY)
    held = u * relevant if sum_gates > _TINY else 0.0
    for o in range(0, line, pair.width):
        g = load(scratch.gates, o)
        cosine = load(scratch.of_regions, o)
        length = load(scratch.length_regions, o)
        free = where_above(length, 0.0, 1.0, splat(0.0, real))
        length = absolute(length)
        d_cosine = g * (u / some_gates)
        d_inner = d_cosine * length
        d_squared = d_inner * cosine * length * free * -0.5
        d_gate = (cosine * u - held) / some_gates
        share = load(scratch.share, o)
        # D_r = sum_k P_kr dn_k, times g.
        mean = splat(0.0, real)
        m = load(scratch.relevance, o)
        reaching = splat(0.0, real)
        for k in range(num_words):
            p = load(e, k * line + o)
            mean = mean + p * d_named_by[k]
            s = load(scratch.cosines, k * line + o) + block.lead[pair.caption, k]
            reaching = reaching + where_above(m, s, 0.0, splat(1.0, real))
        mean = mean * share
        store(scratch.ties, o, 1.0 / reaching)
        # d log g = g dg, with the n part; the part of A is added by `_attend_back`.
        d_log = g * d_gate + mean
        level = mean / where_above(g, 0.0, g, 1.0)  # D_r
        for k in range(num_words):
            p = load(e, k * line + o)
            s = load(scratch.cosines, k * line + o)
            product = splat(0.0, real)
            for j in range(num_words):
                product = product + load(e, j * line + o) * block.word_gram[pair.caption, k, j]
            d_p = d_inner * s + d_squared * product * 2.0
            d_s = p * d_inner + p * d_p * tau
            d_s = d_s + p * share * (d_named_by[k] - level) * tau
            store(gradients.cosines, pair.corner + k * block.stride + o, d_s)
            scaled = d_squared * p
            for j in range(k + 1):
                part = total(scaled * load(e, j * line + o))
                gradients.word_gram[pair.caption, k, j] += part
                if j < k:
                    gradients.word_gram[pair.caption, j, k] += part
        store(scratch.d_log_gate, o, d_log)


@_piece
def _attend_back(block, pair, scratch, gradients, u, sum_weights):
    """What the side of the words gives to S, K and log g."""
    lam, beta = block.constants[2], block.constants[3]
    line, width = pair.line, pair.width
    a, d_gram, d_log_gate = scratch.attention, scratch.d_region_gram, scratch.d_log_gate
    for k in range(pair.num_words):
        squared = max(scratch.squared_words[k], _TINY)
        weight = (1.0 + beta * scratch.named_by[k]) / sum_weights
        d_inner = u * weight / math.sqrt(squared)
        d_squared = -0.5 * u * weight * scratch.of_words[k] / squared
        if scratch.squared_words[k] <= _TINY:
            d_squared = 0.0
        for o in range(0, line, width):
            at = pair.corner + k * block.stride + o
            w = load(a, k * line + o)
            s = load(scratch.cosines, k * line + o)
            d_w = s * d_inner + load(scratch.attended, k * line + o) * (2.0 * d_squared)
            d_logit = w * d_w
            store(d_log_gate, o, load(d_log_gate, o) + d_logit)
            d_s = load(gradients.cosines, at) + w * d_inner + d_logit * lam
            store(gradients.cosines, at, d_s)
            # dK += dq a a'
            w = w * d_squared
            for r in range(pair.num_regions):
                place = r * line + o
                store(d_gram, place, load(d_gram, place) + w * a[k * line + r])


@_piece
def _gate_back(block, pair, scratch, gradients):
    """What the gates give to S, through m, to kappa and to theta."""
    kappa = block.constants[0]
    line = pair.line
    d_kappa = 0.0
    for o in range(0, line, pair.width):
        d_x = load(scratch.d_log_gate, o) * load(scratch.slope, o) * load(scratch.real, o)
        m = load(scratch.relevance, o)
        store(scratch.d_log_gate, o, d_x)
        d_kappa += total(d_x * (m - load(scratch.thresholds, o)))
        d_m = d_x * kappa * load(scratch.ties, o)
        for k in range(pair.num_words):
            at = pair.corner + k * block.stride + o
            s = load(scratch.cosines, k * line + o) + block.lead[pair.caption, k]
            reaches = where_above(m, s, 0.0, d_m)
            store(gradients.cosines, at, load(gradients.cosines, at) + reaches)
    gradients.constants[0] += d_kappa
    for r in range(pair.num_regions):
        gradients.thresholds[pair.image, r] -= kappa * scratch.d_log_gate[r]
