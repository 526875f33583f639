"""The local score of CPFEAN and its gradient, from a block of cosines, for processors.

Axes:  image, caption   of the block     region, word   of all of them, one after the other
       row              words            column         regions

`cpfean.model.alignment.ProminentAlignment` has the equations, docs/model.md the derivation; symbols
are theirs. What is done here is the same for one pair at a time, from the pair's corner of S, which
is small enough to stay in the fastest cache. Two things are left out because they cancel in a
cosine: the normalization of both softmaxes, but for P where n needs it.

Regions are the lanes of the vectors. What lies beyond an image's last region is read along, the
next image's first or the slack of a row, and takes no part.
"""

from __future__ import annotations

import math
from pathlib import Path

import numba
import numpy as np

from cpfean.folders import can_be_written, code_folder, say_once
from cpfean.kernels.lanes import (
    BITS,
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

# Lanes of the widest vector: so many columns beyond the last region must exist in every row.
SLACK = BITS // 32

SOFT, HARD, OFF = 0, 1, 2
_CLOSED = math.log(1e-6)  # log g of a closed hard gate
_TINY = 1e-12  # least squared length, and least sum of gates
_FAR = -1e30  # log g of what is no region

# Without "reassoc": LLVM would sum over the words in lanes where it finds, while running, that the
# scratch arrays are 256 bytes apart, and one by one where not. The last bit would depend on where
# malloc had put them.
_FAST = {"contract", "nsz", "arcp"}


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


@_kept
@numba.njit(nogil=True, error_model="numpy")
def local_scores(
    cosines,
    stride,
    word_offsets,
    region_offsets,
    region_gram,
    word_gram,
    thresholds,
    constants,
    gate,
    scores,
    first_image,
    first_caption,
):
    """Scores a block of pairs.

    All floating arrays are of one type, float32 or float64, and contiguous.

    Args:
        cosines: S, flat: row k starts at k stride.
        stride: columns of a row, at least SLACK more than there are regions.
        word_offsets: (caption + 1) first row of each caption, and the end.
        region_offsets: (image + 1) first column of each image, and the end.
        region_gram: (image, most regions, most regions) K.
        word_gram: (caption, most words, most words) G.
        thresholds: (image, most regions) theta.
        constants: (kappa, tau, lambda, beta).
        gate: SOFT, HARD or OFF.
        scores: (all images, all captions) result.
        first_image, first_caption: where in `scores` the block starts.
    """
    block = scores[first_image:, first_caption:]
    gram = np.empty((0, 0, 0), cosines.dtype)
    _pairs(
        cosines,
        stride,
        word_offsets,
        region_offsets,
        region_gram,
        word_gram,
        thresholds,
        constants,
        gate,
        block,
        False,
        cosines,
        gram,
        gram,
        thresholds,
        constants,
    )


@_kept
@numba.njit(nogil=True, error_model="numpy")
def local_gradients(
    cosines,
    stride,
    word_offsets,
    region_offsets,
    region_gram,
    word_gram,
    thresholds,
    constants,
    gate,
    upstream,
    first_image,
    first_caption,
    d_cosines,
    d_region_gram,
    d_word_gram,
    d_thresholds,
    d_constants,
):
    """Propagates the gradient of a block's scores. Pairs without one cost next to nothing.

    Args:
        cosines, stride, word_offsets, region_offsets, region_gram, word_gram, thresholds,
            constants, gate: as for `local_scores`.
        upstream: (all images, all captions) gradient of the scores.
        first_image, first_caption: where in it the block starts.
        d_cosines: gradient of S, laid out as S is; overwritten.
        d_region_gram, d_word_gram, d_thresholds, d_constants: gradients, added to.
    """
    _pairs(
        cosines,
        stride,
        word_offsets,
        region_offsets,
        region_gram,
        word_gram,
        thresholds,
        constants,
        gate,
        upstream[first_image:, first_caption:],
        True,
        d_cosines,
        d_region_gram,
        d_word_gram,
        d_thresholds,
        d_constants,
    )


@_kept
@numba.njit(nogil=True, error_model="numpy", fastmath=_FAST)
def _pairs(
    cosines,
    stride,
    word_offsets,
    region_offsets,
    region_gram,
    word_gram,
    thresholds,
    constants,
    gate,
    block,
    differentiate,
    d_cosines,
    d_region_gram,
    d_word_gram,
    d_thresholds,
    d_constants,
):
    """Both: the scores that a gradient is taken of are made again, so they share their lines.

    Args:
        block: (image, caption) scores to write or, to `differentiate`, their gradient.
    """
    width = BITS // 8 // cosines.itemsize
    kappa, tau, lam, beta = constants[0], constants[1], constants[2], constants[3]

    # Scratch, each row as wide as whole vectors; words are taken four at a time, hence three more.
    columns = (region_gram.shape[1] + width - 1) // width * width
    rows = word_gram.shape[1] + 3
    kind = cosines.dtype
    gram = np.zeros(columns * columns, kind)
    d_gram = np.zeros(columns * columns, kind)
    pair = np.zeros(rows * columns, kind)  # S of the pair, 0 beyond its regions
    e = np.zeros(rows * columns, kind)  # P, before it is normalized
    a = np.zeros(rows * columns, kind)  # A, likewise
    gram_a = np.zeros(rows * columns, kind)  # A K
    theta = np.zeros(columns, kind)
    real = np.zeros(columns, kind)  # 1 for a region
    log_gate = np.zeros(columns, kind)
    log_rest = np.zeros(columns, kind)  # g = exp(log_gate) log_rest
    slope = np.zeros(columns, kind)  # d log g / dx, x = kappa (m - theta)
    gates = np.zeros(columns, kind)
    relevance = np.zeros(columns, kind)  # m
    ties = np.zeros(columns, kind)  # 1 / number of words that reach m
    normalizer = np.zeros(columns, kind)  # sum of e over the words
    of_regions = np.zeros(columns, kind)  # cos(v_r, d_r)
    length_regions = np.zeros(columns, kind)  # 1 / |d_r|
    d_log_gate = np.zeros(columns, kind)
    of_words = np.zeros(rows)  # cos(c_k, w_k)
    inner_words = np.zeros(rows)
    squared_words = np.zeros(rows)  # |c_k|^2
    named_by = np.zeros(rows)  # n
    d_named_by = np.zeros(rows)

    for image in range(len(region_offsets) - 1):
        first = region_offsets[image]
        num_regions = region_offsets[image + 1] - first
        steps = (num_regions + width - 1) // width
        line = steps * width
        for r in range(line):
            real[r] = 1 if r < num_regions else 0
            theta[r] = thresholds[image, r] if r < num_regions else 0
            for s in range(num_regions):
                inside = r < num_regions
                gram[s * line + r] = region_gram[image, s, r] if inside else 0
                d_gram[s * line + r] = 0
        for caption in range(len(word_offsets) - 1):
            u = 0.0
            if differentiate:
                u = float(block[image, caption])
                if u == 0.0:
                    for k in range(word_offsets[caption], word_offsets[caption + 1]):
                        for v in range(steps):
                            at = k * stride + first + v * width
                            store(d_cosines, at, splat(0.0, d_cosines))
                    continue
            start = word_offsets[caption]
            num_words = word_offsets[caption + 1] - start
            corner = start * stride + first
            for k in range(num_words):
                named_by[k] = 0.0

            # Gates, and the side of the regions: which word is prominent, and how close it is.
            sum_gates = 0.0
            relevant = 0.0
            for v in range(steps):
                o = v * width
                counted = load(real, o)
                m = splat(_FAR, real)
                for k in range(num_words):
                    # A neighbour's cosine times no weight would be NaN if it is not finite.
                    s = where_above(counted, 0.0, load(cosines, corner + k * stride + o), 0.0)
                    store(pair, k * line + o, s)
                    m = maximum(s, m)
                if gate == OFF:
                    log_g = where_above(counted, 0.0, 0.0, splat(_FAR, real))
                    rest = counted
                else:
                    x = (m - load(theta, o)) * kappa
                    t = exp(0.0 - absolute(x))
                    closing = where_above(x, 0.0, t, 1.0) / (t + 1.0)  # 1 - sigmoid(x)
                    if gate == SOFT:
                        log_g = where_above(x, 0.0, 0.0, x)
                        rest = counted / (t + 1.0)
                    else:
                        log_g = where_above(x, 0.0, 0.0, splat(_CLOSED, real))
                        rest = counted
                    log_g = where_above(counted, 0.0, log_g, _FAR)
                    store(slope, o, closing)
                g = exp(log_g) * rest
                z = splat(0.0, real)
                inner = splat(0.0, real)
                squared = splat(0.0, real)
                for k in range(num_words):
                    s = load(pair, k * line + o)
                    p = exp((s - m) * tau)
                    store(e, k * line + o, p)
                    z = z + p
                    inner = inner + p * s
                    # p' G p: G is symmetric, so half of it is enough.
                    half = splat(0.0, real)
                    for j in range(k):
                        half = half + load(e, j * line + o) * word_gram[caption, k, j]
                    squared = squared + p * (half * 2.0 + p * word_gram[caption, k, k])
                length = 1.0 / sqrt(where_above(squared, _TINY, squared, _TINY))
                cosine = inner * length
                sum_gates += total(g)
                relevant += total(g * cosine)
                store(log_gate, o, log_g)
                store(log_rest, o, rest)
                store(gates, o, g)
                store(normalizer, o, g / z)
                if differentiate:
                    store(relevance, o, m)
                    store(of_regions, o, cosine)
                    # A length held at its least does not change: no gradient.
                    store(length_regions, o, where_above(squared, _TINY, length, 0.0 - length))
            some_gates = max(sum_gates, _TINY)
            relevant = relevant / some_gates

            # The side of the words: n, and the context that a word attends to.
            for k in range(num_words):
                top = splat(_FAR, real)
                for v in range(steps):
                    s = load(pair, k * line + v * width)
                    top = maximum(s * lam + load(log_gate, v * width), top)
                highest = largest(top)
                inner = splat(0.0, real)
                named = splat(0.0, real)
                for v in range(steps):
                    o = v * width
                    s = load(pair, k * line + o)
                    w = exp(s * lam + load(log_gate, o) - highest) * load(log_rest, o)
                    store(a, k * line + o, w)
                    inner = inner + w * s
                    named = named + load(e, k * line + o) * load(normalizer, o)
                inner_words[k] = total(inner)
                named_by[k] = total(named)

            # |c_k|^2 = a_k' K a_k, for four words at a time; what is left of earlier pairs beyond
            # the last word is computed along and never read.
            for k in range(0, num_words, 4):
                length_0 = splat(0.0, real)
                length_1 = splat(0.0, real)
                length_2 = splat(0.0, real)
                length_3 = splat(0.0, real)
                for v in range(steps):
                    o = v * width
                    t0 = splat(0.0, real)
                    t1 = splat(0.0, real)
                    t2 = splat(0.0, real)
                    t3 = splat(0.0, real)
                    # K is symmetric: without a gradient, what lies before these columns counts
                    # twice and what lies behind them not at all.
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
                        store(gram_a, k * line + o, t0)
                        store(gram_a, (k + 1) * line + o, t1)
                        store(gram_a, (k + 2) * line + o, t2)
                        store(gram_a, (k + 3) * line + o, t3)
                squared_words[k] = total(length_0)
                squared_words[k + 1] = total(length_1)
                squared_words[k + 2] = total(length_2)
                squared_words[k + 3] = total(length_3)

            sum_weights = 0.0
            weighted = 0.0
            for k in range(num_words):
                weight = 1.0 + beta * named_by[k]
                of_words[k] = inner_words[k] / math.sqrt(max(squared_words[k], _TINY))
                sum_weights += weight
                weighted += weight * of_words[k]
            weighted = weighted / sum_weights
            if not differentiate:
                block[image, caption] = 0.5 * (weighted + relevant)
                continue

            # Back, with half the gradient for either side.
            u = 0.5 * u
            d_beta = 0.0
            for k in range(num_words):
                d_weight = u * (of_words[k] - weighted) / sum_weights
                d_beta += d_weight * named_by[k]
                d_named_by[k] = beta * d_weight
            d_constants[3] += d_beta

            held = u * relevant if sum_gates > _TINY else 0.0
            for v in range(steps):
                o = v * width
                g = load(gates, o)
                cosine = load(of_regions, o)
                length = load(length_regions, o)
                free = where_above(length, 0.0, 1.0, splat(0.0, real))
                length = absolute(length)
                d_cosine = g * (u / some_gates)
                d_inner = d_cosine * length
                d_squared = d_inner * cosine * length * free * -0.5
                d_gate = (cosine * u - held) / some_gates
                share = load(normalizer, o)  # g / z
                # D_r = sum_k P_kr dn_k, times g; and how many words share the maximum.
                mean = splat(0.0, real)
                m = load(relevance, o)
                reaching = splat(0.0, real)
                for k in range(num_words):
                    p = load(e, k * line + o)
                    mean = mean + p * d_named_by[k]
                    s = load(pair, k * line + o)
                    reaching = reaching + where_above(m, s, 0.0, splat(1.0, real))
                mean = mean * share
                store(ties, o, 1.0 / reaching)
                # d log g = g dg, with the n part; the part of A is added below.
                d_log = g * d_gate + mean
                level = mean / where_above(g, 0.0, g, 1.0)  # D_r
                for k in range(num_words):
                    p = load(e, k * line + o)
                    s = load(pair, k * line + o)
                    product = splat(0.0, real)
                    for j in range(num_words):
                        product = product + load(e, j * line + o) * word_gram[caption, k, j]
                    d_p = d_inner * s + d_squared * product * 2.0
                    d_s = p * d_inner + p * d_p * tau
                    d_s = d_s + p * share * (d_named_by[k] - level) * tau
                    store(d_cosines, corner + k * stride + o, d_s)
                    scaled = d_squared * p
                    for j in range(k + 1):
                        part = total(scaled * load(e, j * line + o))
                        d_word_gram[caption, k, j] += part
                        if j < k:
                            d_word_gram[caption, j, k] += part
                store(d_log_gate, o, d_log)

            for k in range(num_words):
                squared = max(squared_words[k], _TINY)
                weight = (1.0 + beta * named_by[k]) / sum_weights
                d_inner_k = u * weight / math.sqrt(squared)
                d_squared_k = -0.5 * u * weight * of_words[k] / squared
                if squared_words[k] <= _TINY:
                    d_squared_k = 0.0
                for v in range(steps):
                    o = v * width
                    at = corner + k * stride + o
                    w = load(a, k * line + o)
                    s = load(pair, k * line + o)
                    d_w = s * d_inner_k + load(gram_a, k * line + o) * (2.0 * d_squared_k)
                    d_logit = w * d_w
                    store(d_log_gate, o, load(d_log_gate, o) + d_logit)
                    store(d_cosines, at, load(d_cosines, at) + w * d_inner_k + d_logit * lam)
                    # dK += dq a a'
                    w = w * d_squared_k
                    for r in range(num_regions):
                        place = r * line + o
                        store(d_gram, place, load(d_gram, place) + w * a[k * line + r])

            if gate != OFF:
                d_kappa = 0.0
                for v in range(steps):
                    o = v * width
                    d_x = load(d_log_gate, o) * load(slope, o) * load(real, o)
                    m = load(relevance, o)
                    store(d_log_gate, o, d_x)
                    d_kappa += total(d_x * (m - load(theta, o)))
                    d_m = d_x * kappa * load(ties, o)
                    for k in range(num_words):
                        at = corner + k * stride + o
                        reaches = where_above(m, load(pair, k * line + o), 0.0, d_m)
                        store(d_cosines, at, load(d_cosines, at) + reaches)
                d_constants[0] += d_kappa
                for r in range(num_regions):
                    d_thresholds[image, r] -= kappa * d_log_gate[r]
        if differentiate:
            for s in range(num_regions):
                for r in range(num_regions):
                    d_region_gram[image, s, r] += d_gram[s * line + r]
