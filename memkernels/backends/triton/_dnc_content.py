"""What the kernels of dnc_sequence do with an interface vector: its activations and their slopes, and rows by content.

The cosine's three forms differ in where 1e-6 stands: inside both roots, there and beside their product, beside it alone. With masks both
key and row are multiplied by the head's mask, so a row has a norm for every head.
"""

from __future__ import annotations

import triton.language as tl

from memkernels.backends.triton._common import device, lanes, sigmoid, tanh
from memkernels.backends.triton._ntm_bwd import attend_backward, store_tile
from memkernels.backends.triton._ntm_fwd import attend, softmax_in_place, softplus, tile_of, vector_of


@device
def offsets(R, U, W, MASK: tl.constexpr):
    """Where in an interface vector begin: read strengths, write keys, write strengths, erase (add follows), free gates, allocation gates
    (write gates follow), modes, write masks (read masks follow), link sharpness."""
    write_keys = R * W + R
    erase = write_keys + U * W + U
    free = erase + 2 * U * W
    modes = free + R + 2 * U
    masks = modes + R * (2 * U + 1)
    sharpness = masks
    if MASK:
        sharpness += (R + U) * W
    return R * W, write_keys, write_keys + U * W, erase, free, free + R, modes, masks, sharpness


@device
def _kinds(p, R, U, W, MASK: tl.constexpr):
    """Which entries of an interface vector are keys or add, strengths, modes, link sharpness; all others are gates."""
    strengths, write_keys, write_strengths, erase, free, _, modes, masks, sharpness = offsets(R, U, W, MASK)
    vectors = (p < strengths) | ((p >= write_keys) & (p < write_strengths)) | ((p >= erase + U * W) & (p < free))
    strong = ((p >= strengths) & (p < write_keys)) | ((p >= write_strengths) & (p < erase))
    return vectors, strong, (p >= modes) & (p < masks), p >= sharpness


@device
def activated(raw, p, R, U, W, MASK: tl.constexpr, ONEPLUS: tl.constexpr, BOUNDED: tl.constexpr):
    """Entries p of an interface vector, modes but for their softmax."""
    vectors, strong, modes, sharp = _kinds(p, R, U, W, MASK)
    soft = softplus(raw)
    value = tl.where(strong, soft + 1 if ONEPLUS else soft, sigmoid(raw))
    value = tl.where(vectors, tanh(raw) if BOUNDED else raw, value)
    return tl.where(modes, raw, tl.where(sharp, soft + 1, value))


@device
def choose_modes(modes_ptr, R, U, BLOCK_S: tl.constexpr):
    s = lanes(BLOCK_S)
    for r in range(R):
        softmax_in_place(modes_ptr + tl.cast(r, tl.int64) * (2 * U + 1), s, 2 * U + 1)
    tl.debug_barrier()


@device
def interface_slopes(
    draw_ptr, asked_ptr, raw_ptr, R, U, W, P, MASK: tl.constexpr, BOUNDED: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_V: tl.constexpr
):  # fmt: skip
    """The gradient of what an interface vector was before its activations, in place; erase and add had their slopes. raw: of strengths
    and sharpness, "3R+U"."""
    strengths, _, write_strengths, erase, free, _, modes_at, _, sharpness = offsets(R, U, W, MASK)
    for first in range(0, P, BLOCK_V):
        p = first + lanes(BLOCK_V)
        vectors, strong, modes, sharp = _kinds(p, R, U, W, MASK)
        d, value = vector_of(draw_ptr, p, P), vector_of(asked_ptr, p, P)
        at = tl.where(sharp, R + U + p - sharpness, tl.where(p < write_strengths, p - strengths, R + p - write_strengths))
        soft = (strong | sharp) & (p < P)
        raw = tl.load(raw_ptr + tl.where(soft, at, 0), mask=soft, other=0.0)
        slope = tl.where(soft, sigmoid(raw), value * (1 - value))
        if BOUNDED:
            slope = tl.where(vectors, 1 - value * value, slope)
        else:
            slope = tl.where(vectors, 1.0, slope)
        done = modes | ((p >= erase) & (p < free))
        tl.store(draw_ptr + p, d * slope, mask=(p < P) & (done == 0))
    s = lanes(BLOCK_S)
    for r in range(R):
        at = modes_at + tl.cast(r, tl.int64) * (2 * U + 1)
        value, d = vector_of(asked_ptr + at, s, 2 * U + 1), vector_of(draw_ptr + at, s, 2 * U + 1)
        centre = tl.sum(value * d, 0)
        tl.debug_barrier()  # with few modes every warp has all of them, to have the sum: none may find what another one has replaced
        tl.store(draw_ptr + at + s, value * (d - centre), mask=s < 2 * U + 1)
    tl.debug_barrier()


@device
def _root(square, COSINE: tl.constexpr):
    if COSINE == "product":
        return tl.math.sqrt_rn(square)
    else:
        return tl.math.sqrt_rn(square + 1e-6)


@device
def _half_over(root):
    """The slope of the root, 0 at 0."""
    return tl.where(root > 0, tl.math.div_rn(0.5, tl.where(root > 0, root, 1.0)), 0.0)


@device
def _squared(masks_ptr, w, W, MASK: tl.constexpr, BLOCK_W: tl.constexpr):
    if MASK:
        mask = vector_of(masks_ptr, w, W)
        return mask * mask
    else:
        return tl.full([BLOCK_W], 1.0, tl.float32)


@device
def _cosine_norm(of_key, of_row, COSINE: tl.constexpr):
    norm = of_key * of_row
    if COSINE != "roots":
        norm += 1e-6
    return norm


@device
def contents(
    content_ptr, similar_ptr, memory_ptr, keys_ptr, masks_ptr, strengths_ptr, N, W, heads,
    MASK: tl.constexpr, COSINE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Cosines and weights by content of some heads, "heads N"."""
    w = lanes(BLOCK_W)
    for first in range(0, N, BLOCK_N):
        n = first + lanes(BLOCK_N)
        memory = tile_of(memory_ptr, n, w, N, W)
        row = tl.sum(memory * memory, 1)
        for h in range(heads):
            head = tl.cast(h, tl.int64)
            key, squared = vector_of(keys_ptr + head * W, w, W), _squared(masks_ptr + head * W, w, W, MASK, BLOCK_W)
            seen, square = key * squared, row
            if MASK:
                square = tl.sum(memory * memory * squared[None, :], 1)
            norm = _cosine_norm(_root(tl.sum(key * seen, 0), COSINE), _root(square, COSINE), COSINE)
            similar = tl.math.div_rn(tl.sum(memory * seen[None, :], 1), norm)
            tl.store(similar_ptr + head * N + n, similar, mask=n < N)
    tl.debug_barrier()
    for h in range(heads):
        head = tl.cast(h, tl.int64)
        attend(content_ptr + head * N, similar_ptr + head * N, tl.load(strengths_ptr + head), N, BLOCK_V)
    tl.debug_barrier()


@device
def _cosine_backward(
    dmemory_ptr, dkey_ptr, dmask_ptr, dlogit_ptr, similar_ptr, memory_ptr, key_ptr, mask_ptr, strength, N, W,
    MASK: tl.constexpr, COSINE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """Adds the gradient of the memory under one head's key, and writes that of the key and of its mask."""
    w = lanes(BLOCK_W)
    key, squared = vector_of(key_ptr, w, W), _squared(mask_ptr, w, W, MASK, BLOCK_W)
    seen = key * squared
    of_key, dnorm_key = _root(tl.sum(key * seen, 0), COSINE), tl.cast(0.0, tl.float32)
    along, drows = tl.zeros([BLOCK_N, BLOCK_W], tl.float32), tl.zeros([BLOCK_N, BLOCK_W], tl.float32)
    for first in range(0, N, BLOCK_N):
        n = first + lanes(BLOCK_N)
        memory = tile_of(memory_ptr, n, w, N, W)
        square = memory * memory
        of_row = _root(tl.sum(square * squared[None, :] if MASK else square, 1), COSINE)
        ddot = tl.math.div_rn(strength * vector_of(dlogit_ptr, n, N), _cosine_norm(of_key, of_row, COSINE))
        dnorm = ddot * vector_of(similar_ptr, n, N)
        dnorm_key -= tl.sum(dnorm * of_row, 0)
        drow = -dnorm * of_key * _half_over(of_row)
        along += ddot[:, None] * memory
        if MASK:
            drows += drow[:, None] * square
        found = ddot[:, None] * seen[None, :] + 2 * memory * (drow[:, None] * squared[None, :])
        store_tile(dmemory_ptr, tile_of(dmemory_ptr, n, w, N, W) + found, n, w, N, W)
    dsquare, along_all = dnorm_key * _half_over(of_key), tl.sum(along, 0)
    tl.store(dkey_ptr + w, squared * (along_all + 2 * dsquare * key), mask=w < W)
    if MASK:
        dsquared = key * along_all + tl.sum(drows, 0) + dsquare * key * key
        tl.store(dmask_ptr + w, 2 * vector_of(mask_ptr, w, W) * dsquared, mask=w < W)


@device
def contents_backward(
    dmemory_ptr, dkeys_ptr, dmasks_ptr, dstrengths_ptr, dlogit_ptr, content_ptr, similar_ptr, memory_ptr, keys_ptr, masks_ptr,
    strengths_ptr, N, W, heads,
    MASK: tl.constexpr, COSINE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """`dlogit` "heads N" holds the gradients of the weights by content."""
    for h in range(heads):
        head = tl.cast(h, tl.int64)
        own, part = head * N, head * W
        dstrength = attend_backward(dlogit_ptr + own, content_ptr + own, similar_ptr + own, N, BLOCK_V)
        tl.store(dstrengths_ptr + head, dstrength)
        _cosine_backward(
            dmemory_ptr, dkeys_ptr + part, dmasks_ptr + part, dlogit_ptr + own, similar_ptr + own, memory_ptr, keys_ptr + part,
            masks_ptr + part, tl.load(strengths_ptr + head), N, W, MASK, COSINE, BLOCK_N, BLOCK_W,
        )  # fmt: skip
        tl.debug_barrier()
