"""The gradient of CPFEAN's local scores on a GPU, from a block of cosines S.

Axes:  as in `cpfean.kernels.triton_pairs`: C captions, L word places, R region places.

docs/model.md derives it ("Blocks, the kernel and its gradient"); symbols are its. There are two
kernels, since what belongs to an image, dK, is a sum over captions and what belongs to a caption,
dG, is a sum over images. Each sum is made by one program in a fixed order, or by several whose
parts the caller adds up, also in a fixed order: nothing is added atomically, and a gradient is the
same at every call.

Either half needs fewer registers, too, than one kernel for both: on an H100, with up to 64 regions
and 32 words and products of half the bits, the first does not spill. The second spills 0.5 KB a
thread as Triton 3.7 builds it, and 5 KB with more than 16 words; in float32, and beyond those
sizes, either may spill. With hardest negatives that is bearable: 3 B of B x B pairs have a
gradient, and tiles without one are passed over.

    words_backward     a program has an image and goes through captions: what comes through A, om
    regions_backward   a program has captions and goes through images: what comes through P, g

The first leaves the second dn (its u, its beta) and its part of d log g, and in dS its part of dS.
Of a tile without any upstream gradient, dS is set to 0 and nothing else is done.
"""

import triton
import triton.language as tl

from cpfean.kernels.triton_pairs import (
    COUNTS,
    LOG2_E,
    OFF,
    PARTS,
    TINY,
    attend,
    compare_regions,
    find_prominent,
    inverse,
    load_constants,
    load_cosines,
    load_leads,
    load_region_gram,
    load_word_grams,
    locate_captions,
    locate_words,
    multiply,
    open_gates,
    place_in_cosines,
    weigh_words,
)


@triton.jit(do_not_specialize=COUNTS, do_not_specialize_on_alignment=PARTS)
def words_backward(
    S_ptr, K_ptr, theta_ptr, lead_ptr, constants_ptr, word_start_ptr, num_regions_ptr,
    upstream_ptr, stride_upstream, num_images, num_captions, tiles_each, slot_eights, most_words,
    dS_ptr, dn_ptr, dlog_ptr, dK_ptr, dbeta_ptr,
    C: tl.constexpr, L: tl.constexpr, R: tl.constexpr,
    GATE: tl.constexpr, PROMINENCE: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """The side of the words. Program (i, j) has image i and the j-th share of the tiles.

    Args (beyond those of `score_pairs`):
        upstream_ptr, stride_upstream: (num_images, num_captions) gradient of the scores.
        tiles_each: tiles of C captions that a program goes through.
        dS_ptr: result, as S: what comes through the attention.
        dn_ptr: result, (num_images, all words of the block); unset where there is no upstream.
        dlog_ptr: result, (num_captions, num_images slots) its part of d log g; likewise.
        dK_ptr: result, (shares, num_images, slots, slots).
        dbeta_ptr: result, (shares, num_images).
    """
    slots = slot_eights * 8  # so written, the compiler sees that loads of eight are aligned
    columns = num_images * slots
    kappa, tau, lam, beta = load_constants(constants_ptr)
    image = tl.program_id(0)
    share = tl.program_id(1)
    r = tl.arange(0, R)
    region = r < tl.load(num_regions_ptr + image)
    slot = r < slots
    theta = tl.load(theta_ptr + image * slots + r, mask=slot, other=0.0)
    K = load_region_gram(K_ptr, image, slots, R)
    num_words = tl.load(word_start_ptr + num_captions) - tl.load(word_start_ptr)
    dK = tl.zeros((R, R), tl.float32)
    dbeta = tl.zeros((C,), tl.float32)
    first = share * tiles_each * C
    for begin in range(first, tl.minimum(first + tiles_each * C, num_captions), C):
        caption, there, _start, count = locate_captions(word_start_ptr, begin, num_captions, C)
        word = tl.arange(0, L)[None, :] < count[:, None]
        row, real = locate_words(word_start_ptr, begin, num_captions, C, L)
        at, mask = place_in_cosines(row, real, image, slots, columns, R)
        given = image * tl.cast(stride_upstream, tl.int64) + caption
        u = 0.5 * tl.load(upstream_ptr + given, mask=there, other=0.0)  # half of it for either side
        if tl.max(tl.abs(u), axis=0) > 0.0:
            lead = load_leads(lead_ptr, caption, word, most_words, L)
            S = load_cosines(S_ptr, at, mask, C, L, R, HALF)
            ahead = S + lead[:, :, None]
            m = tl.max(ahead, axis=1)
            log2_gate, rest, g = open_gates(m, theta, region, kappa, GATE)
            e, z = find_prominent(ahead, m, tau, HALF)
            n, y = weigh_words(e, z, g, beta, word, PROMINENCE)
            a, aK, inner, p = attend(S, log2_gate, rest, K, lam, C, L, R, HALF)
            length = tl.rsqrt(tl.maximum(p, TINY))  # 1 / |c_k|
            of_words = inner * length
            Y = tl.sum(y, axis=1)
            om = y / Y[:, None]

            # dy_k = u (C_k - sum_l om_l C_l) / Y,  dn_k = beta dy_k,  dbeta = sum_k n_k dy_k
            mean = tl.sum(om * of_words, axis=1)
            dy = tl.where(word, (u / Y)[:, None] * (of_words - mean[:, None]), 0.0)
            if PROMINENCE:
                dbeta += tl.sum(n * dy, axis=1)
                dn = tl.reshape(beta * dy, (C * L,))
                tl.store(dn_ptr + image * num_words + row, dn, mask=real)

            # da_kr = u om_k (S_kr / sqrt(p_k) - C_k (K a_k')_r / p_k)
            to_inner = u[:, None] * om * length
            # A length held at its least does not change: no gradient.
            to_length = tl.where(p > TINY, to_inner * of_words * length, 0.0)
            dlogit = a * (to_inner[:, :, None] * S - to_length[:, :, None] * aK)
            dS = to_inner[:, :, None] * a + lam * dlogit
            tl.store(dS_ptr + at, tl.reshape(dS, (C * L, R)), mask=mask)
            if GATE != OFF:
                part = dlog_ptr + (caption * columns)[:, None] + (image * slots + r)[None, :]
                of_gates = tl.sum(dlogit, axis=1)
                tl.store(part, of_gates, mask=there[:, None] & slot[None, :])

            # dK += -1/2 u om_k C_k / p_k a_k' a_k
            flat = tl.reshape(a, (C * L, R))
            weight = tl.reshape(-0.5 * to_length, (C * L,))
            dK += multiply(tl.trans(flat * weight[:, None]), flat, HALF)
        else:
            tl.store(dS_ptr + at, tl.zeros((C * L, R), tl.float32), mask=mask)
    place = share * num_images + image
    square = r[:, None] * slots + r[None, :]
    tl.store(dK_ptr + place * slots * slots + square, dK, mask=slot[:, None] & slot[None, :])
    tl.store(dbeta_ptr + place, tl.sum(dbeta, axis=0))


@triton.jit(do_not_specialize=COUNTS, do_not_specialize_on_alignment=PARTS)
def regions_backward(
    S_ptr, G_ptr, theta_ptr, lead_ptr, constants_ptr, word_start_ptr, num_regions_ptr,
    upstream_ptr, stride_upstream, num_images, num_captions, images_each, slot_eights, most_words,
    dS_ptr, dn_ptr, dlog_ptr, dG_ptr, dtheta_ptr, dkappa_ptr,
    C: tl.constexpr, L: tl.constexpr, R: tl.constexpr,
    GATE: tl.constexpr, PROMINENCE: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """The side of the regions. Program (t, j) has tile t of captions and the j-th share of images.

    Args (beyond those of `words_backward`, whose dS, dn and dlog it takes):
        images_each: images that a program goes through.
        dS_ptr: what comes through P and g is added, by the only program that has these pairs.
        dG_ptr: result, (shares, num_captions, L, L).
        dtheta_ptr: result, (tiles, num_images slots).
        dkappa_ptr: result, (tiles, num_images).
    """
    slots = slot_eights * 8  # so written, the compiler sees that loads of eight are aligned
    columns = num_images * slots
    kappa, tau, _lam, _beta = load_constants(constants_ptr)
    tile = tl.program_id(0)
    share = tl.program_id(1)
    caption, there, _start, count = locate_captions(word_start_ptr, tile * C, num_captions, C)
    word = tl.arange(0, L)[None, :] < count[:, None]
    row, real = locate_words(word_start_ptr, tile * C, num_captions, C, L)
    lead = load_leads(lead_ptr, caption, word, most_words, L)
    G = load_word_grams(G_ptr, caption, word, most_words, L)
    num_words = tl.load(word_start_ptr + num_captions) - tl.load(word_start_ptr)
    r = tl.arange(0, R)
    slot = r < slots
    dG = tl.zeros((C, L, L), tl.float32)
    first = share * images_each
    for image in range(first, tl.minimum(first + images_each, num_images)):
        given = image * tl.cast(stride_upstream, tl.int64) + caption
        u = 0.5 * tl.load(upstream_ptr + given, mask=there, other=0.0)
        dtheta = tl.zeros((R,), tl.float32)
        dkappa = 0.0
        if tl.max(tl.abs(u), axis=0) > 0.0:
            region = r < tl.load(num_regions_ptr + image)
            theta = tl.load(theta_ptr + image * slots + r, mask=slot, other=0.0)
            at, mask = place_in_cosines(row, real, image, slots, columns, R)
            S = load_cosines(S_ptr, at, mask, C, L, R, HALF)
            ahead = S + lead[:, :, None]
            m = tl.max(ahead, axis=1)
            _log2_gate, _rest, g = open_gates(m, theta, region, kappa, GATE)
            e, z = find_prominent(ahead, m, tau, HALF)
            Ge, inner, q = compare_regions(S, e, G, HALF)
            length = tl.rsqrt(tl.maximum(q, TINY))  # 1 / |d_r|
            of_regions = inner * length
            total = tl.sum(g, axis=1)
            gamma = tl.maximum(total, TINY)
            u_each = (u / gamma)[:, None]

            # de_kr = u g_r / Gamma (S_kr / sqrt(q_r) - C_r (G e_r)_k / q_r)
            to_inner = u_each * g * length
            to_length = tl.where(q > TINY, to_inner * of_regions * length, 0.0)
            de = to_inner[:, None, :] * S - to_length[:, None, :] * Ge
            dS = to_inner[:, None, :] * e + tau * (e * de)

            # n: D_r = sum_k dn_k e_kr / z_r,  dS += tau g_r e_kr (dn_k - D_r) / z_r
            dlog_g = tl.zeros((C, R), tl.float32)
            if PROMINENCE:
                at_words = dn_ptr + image * num_words + row
                dn = tl.reshape(tl.load(at_words, mask=real, other=0.0), (C, L))
                inverse_z = inverse(z)
                D = tl.sum(dn[:, :, None] * e, axis=1) * inverse_z
                from_n = dn[:, :, None] - D[:, None, :]
                dS += e * (tau * g * inverse_z)[:, None, :] * from_n
                dlog_g += g * D

            if GATE != OFF:
                # d log g_r = sum_k a_kr da_kr + g_r (D_r + u (C_r - rho) / Gamma)
                rho = tl.where(total > TINY, tl.sum(g * of_regions, axis=1) / gamma, 0.0)
                dlog_g += g * u_each * (of_regions - rho[:, None])
                part = dlog_ptr + (caption * columns)[:, None] + (image * slots + r)[None, :]
                dlog_g += tl.load(part, mask=there[:, None] & slot[None, :], other=0.0)
                # dx_r = d log g_r (1 - sigmoid(x_r)), straight through a hard gate too
                x = (m - theta[None, :]) * kappa
                t = tl.exp2(-tl.abs(x) * LOG2_E)
                dx = dlog_g * tl.where(x > 0.0, t, 1.0) * inverse(1.0 + t)
                dx = tl.where(region[None, :], dx, 0.0)
                dtheta -= kappa * tl.sum(dx, axis=0)
                dkappa += tl.sum(tl.sum(dx * (m - theta[None, :]), axis=1), axis=0)
                # Words that reach m share its gradient.
                reaches = tl.where(ahead == m[:, None, :], 1.0, 0.0)
                dS += reaches * (kappa * dx / tl.sum(reaches, axis=1))[:, None, :]

            of_words = tl.load(dS_ptr + at, mask=mask, other=0.0).to(tl.float32)
            tl.store(dS_ptr + at, of_words + tl.reshape(dS, (C * L, R)), mask=mask)

            # dG += -1/2 u g_r C_r / (Gamma q_r) e_r e_r'
            weight = -0.5 * to_length
            dG += multiply(e * weight[:, None, :], tl.permute(e, (0, 2, 1)), HALF)
        if GATE != OFF:
            tl.store(dtheta_ptr + tile * columns + image * slots + r, dtheta, mask=slot)
            tl.store(dkappa_ptr + tile * num_images + image, dkappa)
    words = tl.arange(0, L)
    square = words[:, None] * L + words[None, :]
    place = (share * num_captions + caption) * (L * L)
    at = place[:, None, None] + square[None, :, :]
    tl.store(dG_ptr + at, dG, mask=there[:, None, None])
