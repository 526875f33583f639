"""Steps of CPFEAN's local score that its Triton kernels share: a tile, equation by equation.

Axes:  C   captions of a tile, next to each other        L   word places of each, a power of two
       R   region places of the tile's one image, a power of two

`cpfean.model.scorers.prominent.ProminentAlignment` has the equations, docs/model.md the derivation;
symbols are theirs. Both softmaxes stay unnormalized, as there: a for A, e for P, and p = |c|^2,
q = |d|^2 as they come from a and e. Exponentials are powers of two, which is what a GPU has.

Masks. A word place without a word has a lead of -inf, hence e = 0; a region place without a region
has a log gate of -inf, hence g = 0 and a = 0. S is 0 at both: a slot of S without a region comes
from a product with 0, so that loads go by slots, eight at a time, and not by regions. Nothing else
has to know of either.

Types. All is float32 but the factors of small products, which are float16 where HALF: a and e, in
[0, 1], and K and G. The rounded a and e then stand for the weights everywhere, so that each cosine
is that of a context with slightly other weights, and not a quotient of two that disagree.
"""

import math

import triton
import triton.language as tl

SOFT, HARD, OFF = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
TINY = tl.constexpr(1e-12)  # least squared length, and least sum of gates
LOG2_E = tl.constexpr(math.log2(math.e))
LOG2_CLOSED = tl.constexpr(math.log2(1e-6))  # of g, where a hard gate is closed

# Arguments that a kernel is not compiled anew for when they are 1, or multiples of 16: all whole
# numbers, and tensors that are parts of others. S and K are aligned wherever a block begins.
COUNTS = [
    *("num_images", "num_captions", "images_each", "tiles_each", "slot_eights", "most_words"),
    *("stride_scores", "stride_upstream"),
]
PARTS = [
    *("G_ptr", "theta_ptr", "lead_ptr", "word_start_ptr", "num_regions_ptr"),
    *("scores_ptr", "upstream_ptr"),
]


@triton.jit
def load_constants(constants_ptr):
    """kappa, tau, lambda and beta."""
    kappa = tl.load(constants_ptr)
    tau = tl.load(constants_ptr + 1)
    lam = tl.load(constants_ptr + 2)
    beta = tl.load(constants_ptr + 3)
    return kappa, tau, lam, beta


@triton.jit
def locate_captions(word_start_ptr, begin, num_captions, C: tl.constexpr):
    """The captions of a tile, which are there, and their first words and how many those are.

    Beyond the last caption that one is computed again and left out by `there`.
    """
    place = begin + tl.arange(0, C)
    caption = tl.minimum(place, num_captions - 1)
    start = tl.load(word_start_ptr + caption)
    return caption, place < num_captions, start, tl.load(word_start_ptr + caption + 1) - start


@triton.jit
def locate_words(word_start_ptr, begin, num_captions, C: tl.constexpr, L: tl.constexpr):
    """The row of S of each word place (C L), and whether there is one.

    Made flat and not reshaped, so that the compiler sees that rows of S are aligned.
    """
    flat = tl.arange(0, C * L)
    caption = tl.minimum(begin + flat // L, num_captions - 1)
    start = tl.load(word_start_ptr + caption)
    count = tl.load(word_start_ptr + caption + 1) - start
    real = (flat % L < count) & (begin + flat // L < num_captions)
    return start + flat % L - tl.load(word_start_ptr), real


@triton.jit
def load_leads(lead_ptr, caption, word, most_words, L: tl.constexpr):
    """log(s) / tau (C, L); -inf where there is no word."""
    at = caption[:, None] * most_words + tl.arange(0, L)[None, :]
    return tl.load(lead_ptr + at, mask=word, other=float("-inf"))


@triton.jit
def load_word_grams(G_ptr, caption, word, most_words, L: tl.constexpr):
    """G (C, L, L)."""
    words = tl.arange(0, L)
    square = words[:, None] * most_words + words[None, :]
    at = (caption * most_words * most_words)[:, None, None] + square[None, :, :]
    return tl.load(G_ptr + at, mask=word[:, :, None] & word[:, None, :], other=0.0)


@triton.jit
def load_region_gram(K_ptr, image, slots, R: tl.constexpr):
    """K (R, R)."""
    r = tl.arange(0, R)
    at = image * slots * slots + r[:, None] * slots + r[None, :]
    return tl.load(K_ptr + at, mask=(r < slots)[:, None] & (r < slots)[None, :], other=0.0)


@triton.jit
def place_in_cosines(row, real, image, slots, columns, R: tl.constexpr):
    """Where a tile is in S (C L, R), and a mask of what of it is S."""
    r = tl.arange(0, R)
    at = (row * columns)[:, None] + (image * slots + r)[None, :]
    return at, real[:, None] & (r < slots)[None, :]


@triton.jit
def load_cosines(
    S_ptr, at, mask, C: tl.constexpr, L: tl.constexpr, R: tl.constexpr, HALF: tl.constexpr
):  # fmt: skip
    """S (C, L, R)."""
    tile = tl.load(S_ptr + at, mask=mask, other=0.0)
    if HALF:
        # A product with the unit matrix changes nothing, but leaves S where the products below
        # leave theirs, which spares the barriers of a change of layout.
        r = tl.arange(0, R)
        one = tl.where(r[:, None] == r[None, :], 1.0, 0.0).to(tl.float16)
        tile = tl.dot(tile.to(tl.float16), one)
    return tl.reshape(tile, (C, L, R))


@triton.jit
def multiply(x, y, HALF: tl.constexpr):
    """A small product, summed in float32."""
    if HALF:
        result = tl.dot(x.to(tl.float16), y.to(tl.float16))
    else:
        result = tl.dot(x, y, input_precision="tf32x3")
    return result


@triton.jit
def rounded(weights, HALF: tl.constexpr):
    """Weights as the products take them."""
    if HALF:
        weights = weights.to(tl.float16).to(tl.float32)
    return weights


@triton.jit
def inverse(x):
    """1 / x of an x from 1 on, in two instructions; a division takes seven, and care of any x."""
    root = tl.rsqrt(x)
    return root * root


@triton.jit
def open_gates(m, theta, region, kappa, GATE: tl.constexpr):
    """log2_gate, rest and g (C, R): g = 2^log2_gate rest, rest in [1/2, 1], without a logarithm.

    g_r = sigmoid(kappa (m_r - theta_r)) = exp(min(x_r, 0)) / (1 + exp(-|x_r|))
    """
    if GATE == OFF:
        log2_gate = m * 0.0
        rest = log2_gate + 1.0
    else:
        x = (m - theta[None, :]) * kappa
        if GATE == SOFT:
            log2_gate = tl.minimum(x, 0.0) * LOG2_E
            rest = inverse(1.0 + tl.exp2(-tl.abs(x) * LOG2_E))
        else:
            log2_gate = tl.where(x > 0.0, 0.0, LOG2_CLOSED)
            rest = log2_gate * 0.0 + 1.0
    log2_gate = tl.where(region[None, :], log2_gate, float("-inf"))
    return log2_gate, rest, tl.exp2(log2_gate) * rest


@triton.jit
def find_prominent(ahead, m, tau, HALF: tl.constexpr):
    """e (C, L, R), and its sum z (C, R) over the words.

    e_kr = exp(tau (S_kr - m_r)) s_k

    The rounding of tau m_r is the same for all words of a region, and cancels.
    """
    tau_2 = tau * LOG2_E
    e = rounded(tl.exp2(ahead * tau_2 - (m * tau_2)[:, None, :]), HALF)
    return e, tl.sum(e, axis=1)


@triton.jit
def compare_regions(S, e, G, HALF: tl.constexpr):
    """The side of the regions: G e (C, L, R), <v, d> (C, R), and q = |d|^2.

    q_r = e_r' G e_r
    """
    Ge = multiply(G, e, HALF)
    return Ge, tl.sum(e * S, axis=1), tl.sum(e * Ge, axis=1)


@triton.jit
def attend(
    S, log2_gate, rest, K, lam,
    C: tl.constexpr, L: tl.constexpr, R: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """The side of the words: a (C, L, R), a K, <w, c> (C, L), and p = |c|^2.

    a_kr = exp(lambda S_kr + log_gate_r - max_r(...)) rest_r,    p_k = a_k K a_k'
    """
    logit = S * (lam * LOG2_E) + log2_gate[:, None, :]
    a = tl.exp2(logit - tl.max(logit, axis=2)[:, :, None])
    a = rounded(a * rest[:, None, :], HALF)
    aK = tl.reshape(multiply(tl.reshape(a, (C * L, R)), K, HALF), (C, L, R))
    return a, aK, tl.sum(a * S, axis=2), tl.sum(a * aK, axis=2)


@triton.jit
def weigh_words(e, z, g, beta, word, PROMINENCE: tl.constexpr):
    """n and y (C, L), y the weight of a word before division by their sum.

    n_k = sum_r g_r e_kr / z_r,    y_k = 1 + beta n_k
    """
    if PROMINENCE:
        n = tl.sum(e * (g * inverse(z))[:, None, :], axis=2)
    else:
        n = tl.where(word, 0.0, 0.0)
    return n, tl.where(word, 1.0 + beta * n, 0.0)
