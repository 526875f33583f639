"""CPFEAN's local scores on a GPU, from a block of cosines S that a matrix product has left.

Axes:  as in `cpfean.kernels.triton_pairs`: C captions, L word places, R region places.
"""

import triton
import triton.language as tl

from cpfean.kernels.triton_pairs import (
    COUNTS,
    PARTS,
    TINY,
    attend,
    compare_regions,
    find_prominent,
    load_constants,
    load_cosines,
    load_leads,
    load_region_gram,
    load_word_grams,
    locate_captions,
    locate_words,
    open_gates,
    place_in_cosines,
    weigh_words,
)


@triton.jit(do_not_specialize=COUNTS, do_not_specialize_on_alignment=PARTS)
def score_pairs(
    S_ptr, K_ptr, G_ptr, theta_ptr, lead_ptr, constants_ptr, word_start_ptr, num_regions_ptr,
    scores_ptr, stride_scores, num_images, num_captions, images_each, slot_eights, most_words,
    C: tl.constexpr, L: tl.constexpr, R: tl.constexpr,
    GATE: tl.constexpr, PROMINENCE: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """Scores a block. A program keeps C captions and goes through some images.

    Args:
        S_ptr: (all words of the block, num_images slots), a caption's words one after the other.
        K_ptr: (num_images, slots, slots).
        G_ptr: (num_captions, most_words, most_words).
        theta_ptr: (num_images, slots).
        lead_ptr: (num_captions, most_words) log(s) / tau.
        constants_ptr: kappa, tau, lambda and beta.
        word_start_ptr: (num_captions + 1) first word of each caption, and the end, counted from
            anywhere.
        num_regions_ptr: (num_images) real regions; they come first.
        scores_ptr, stride_scores: result, (num_images, num_captions) with this row stride.
        images_each: images of a program.
        slot_eights: an eighth of the slots, the columns of an image in S.
        most_words: word places in G and `lead`.
    """
    slots = slot_eights * 8  # so written, the compiler sees that loads of eight are aligned
    columns = num_images * slots
    kappa, tau, lam, beta = load_constants(constants_ptr)
    begin = tl.program_id(0) * C
    caption, there, _start, count = locate_captions(word_start_ptr, begin, num_captions, C)
    word = tl.arange(0, L)[None, :] < count[:, None]
    row, real = locate_words(word_start_ptr, begin, num_captions, C, L)
    lead = load_leads(lead_ptr, caption, word, most_words, L)
    G = load_word_grams(G_ptr, caption, word, most_words, L)
    r = tl.arange(0, R)
    first_image = tl.program_id(1) * images_each
    for image in range(first_image, tl.minimum(first_image + images_each, num_images)):
        theta = tl.load(theta_ptr + image * slots + r, mask=r < slots, other=0.0)
        region = r < tl.load(num_regions_ptr + image)
        K = load_region_gram(K_ptr, image, slots, R)
        at, mask = place_in_cosines(row, real, image, slots, columns, R)
        S = load_cosines(S_ptr, at, mask, C, L, R, HALF)

        # m_r = max_k (S_rk + log(s_k) / tau)
        ahead = S + lead[:, :, None]
        m = tl.max(ahead, axis=1)
        log2_gate, rest, g = open_gates(m, theta, region, kappa, GATE)

        # sum_r g_r cos(v_r, d_r) / sum_r g_r
        e, z = find_prominent(ahead, m, tau, HALF)
        _Ge, inner, q = compare_regions(S, e, G, HALF)
        of_regions = inner * tl.rsqrt(tl.maximum(q, TINY))
        relevant = tl.sum(g * of_regions, axis=1) / tl.maximum(tl.sum(g, axis=1), TINY)

        # sum_k om_k cos(c_k, w_k)
        _n, y = weigh_words(e, z, g, beta, word, PROMINENCE)
        _a, _aK, inner, p = attend(S, log2_gate, rest, K, lam, C, L, R, HALF)
        of_words = inner * tl.rsqrt(tl.maximum(p, TINY))
        weighted = tl.sum(y * of_words, axis=1) / tl.sum(y, axis=1)

        place = image * tl.cast(stride_scores, tl.int64) + caption
        tl.store(scores_ptr + place, 0.5 * weighted + 0.5 * relevant, mask=there)
