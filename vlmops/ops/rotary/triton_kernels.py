"""The kernel: a block of tokens a program, tables read once for all heads of x and k."""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["rotary_kernel"]


@triton.jit
def _load_pairs(at, mask, HALF: tl.constexpr, PAIRS: tl.constexpr, INTERLEAVED: tl.constexpr):
    """Both elements of each rotation pair in float32 by wide loads; at and mask [a, b, 1] are those of the rows' starts."""
    if INTERLEAVED:  # neighbours: one load, split in registers
        both = tl.arange(0, 2 * PAIRS)
        x = tl.load(at + both, mask=mask & (both < 2 * HALF), other=0.0).to(tl.float32)
        a, b = tl.split(tl.reshape(x, (at.shape[0], at.shape[1], PAIRS, 2)))
    else:
        pair = tl.arange(0, PAIRS)
        a = tl.load(at + pair, mask=mask & (pair < HALF), other=0.0).to(tl.float32)
        b = tl.load(at + HALF + pair, mask=mask & (pair < HALF), other=0.0).to(tl.float32)
    return a, b


@triton.jit
def _store_pairs(to, mask, x, y, HALF: tl.constexpr, PAIRS: tl.constexpr, INTERLEAVED: tl.constexpr):
    """The other way, in the dtype of ``to``."""
    x, y = x.to(to.dtype.element_ty), y.to(to.dtype.element_ty)
    if INTERLEAVED:
        both = tl.arange(0, 2 * PAIRS)
        tl.store(
            to + both, tl.reshape(tl.join(x, y), (x.shape[0], x.shape[1], 2 * PAIRS)), mask=mask & (both < 2 * HALF)
        )
    else:
        pair = tl.arange(0, PAIRS)
        tl.store(to + pair, x, mask=mask & (pair < HALF))
        tl.store(to + HALF + pair, y, mask=mask & (pair < HALF))


@triton.jit
def _turn_heads(
    X, OUT, tokens, inside, stride_t, stride_h, heads, cos_a, cos_b, sin_a, sin_b,
    DIM: tl.constexpr, HALF: tl.constexpr, PAIRS: tl.constexpr, TAIL: tl.constexpr, INTERLEAVED: tl.constexpr,
    INVERSE: tl.constexpr, BH: tl.constexpr,
):  # fmt: skip
    """All heads of one block of tokens; OUT is contiguous [T, heads, DIM]."""
    for first in range(0, heads, BH):
        head = first + tl.arange(0, BH)
        here = inside[:, None, None] & (head < heads)[None, :, None]
        at = X + tokens[:, None, None] * stride_t + head[None, :, None] * stride_h
        a, b = _load_pairs(at, here, HALF, PAIRS, INTERLEAVED)
        if INVERSE:
            x = a * cos_a + b * sin_b
            y = b * cos_b - a * sin_a
        else:
            x = a * cos_a - b * sin_a
            y = b * cos_b + a * sin_b
        to = OUT + (tokens[:, None, None] * heads + head[None, :, None]) * DIM
        _store_pairs(to, here, x, y, HALF, PAIRS, INTERLEAVED)
        if TAIL > 0:  # partial rotary embedding: the rest of the head stays
            rest = tl.arange(0, TAIL)
            keep = here & (rest < DIM - 2 * HALF)
            tl.store(to + 2 * HALF + rest, tl.load(at + 2 * HALF + rest, mask=keep, other=0.0), mask=keep)


@triton.jit
def rotary_kernel(
    X, K, COS, SIN, OUT, OUT_K, total, x_stride_t, x_stride_h, k_stride_t, k_stride_h, cos_stride, sin_stride, heads,
    heads_k,
    DIM: tl.constexpr, HALF: tl.constexpr, PAIRS: tl.constexpr, TAIL: tl.constexpr, INTERLEAVED: tl.constexpr,
    INVERSE: tl.constexpr, BT: tl.constexpr, BH: tl.constexpr,
):  # fmt: skip
    """Rotate BT tokens of x [T, heads, DIM] and k [T, heads_k, DIM] by tables [T, 2 * HALF] (INVERSE: transposed)."""
    tokens = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    inside = tokens < total
    cos_a, cos_b = _load_pairs(
        COS + tokens[:, None, None] * cos_stride, inside[:, None, None], HALF, PAIRS, INTERLEAVED
    )
    sin_a, sin_b = _load_pairs(
        SIN + tokens[:, None, None] * sin_stride, inside[:, None, None], HALF, PAIRS, INTERLEAVED
    )
    _turn_heads(X, OUT, tokens, inside, x_stride_t, x_stride_h, heads, cos_a, cos_b, sin_a, sin_b,
                DIM, HALF, PAIRS, TAIL, INTERLEAVED, INVERSE, BH)  # fmt: skip
    if heads_k > 0:
        _turn_heads(K, OUT_K, tokens, inside, k_stride_t, k_stride_h, heads_k, cos_a, cos_b, sin_a, sin_b,
                    DIM, HALF, PAIRS, TAIL, INTERLEAVED, INVERSE, BH)  # fmt: skip
