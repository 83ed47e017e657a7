"""Attention tiles shared by varlen, cross and perceiver attention: online softmax over a run of keys, and its gradients.

One rule of visibility covers every mask: query row i sees the keys of its segment in [lo[i], hi[i]) and those before
``prefix``. A causal, windowed or per-token range mask is only a way to compute lo and hi.

A head of D elements is cut into at most two power-of-two chunks D0 + D1 (72 -> 64 + 16, 80 -> 64 + 16, 96 -> 64 + 32)
instead of being padded to 128. Scores live in log2 units (FlashAttention-2, Dao 2023): exp2 is one instruction.
"""

from __future__ import annotations

import triton
import triton.language as tl

from vlmops.ops._shared.triton_math import tanh

__all__ = ["LN2", "LOG2E", "attend", "chunks", "finish", "grad_kv", "grad_q", "load_tile", "splits", "store_tile"]

LOG2E = 1.4426950408889634
LN2 = 0.6931471805599453
MAX_HEAD_DIM = 256


def chunks(dim: int) -> tuple[int, int]:
    """Widths D0, D1 (0 for none) that hold a head of this size: D0 the largest power of two in it, at least 16."""
    first = 1 << (max(16, dim).bit_length() - 1)
    rest = max(0, dim - first)
    return first, 0 if rest == 0 else max(16, 1 << (rest - 1).bit_length())


@triton.jit
def load_tile(P, first, limit, stride, ROWS: tl.constexpr, AT: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr,
              MASK: tl.constexpr):  # fmt: skip
    """Rows first .. first + ROWS, elements AT .. AT + WIDTH of heads of D; zeros past D and, with MASK, past ``limit``."""
    rows, columns = tl.arange(0, ROWS), AT + tl.arange(0, WIDTH)
    at = P + tl.cast(first, tl.int64) * stride + rows[:, None] * stride + columns[None, :]
    if MASK:
        if AT + WIDTH > D:
            tile = tl.load(at, mask=(first + rows < limit)[:, None] & (columns < D)[None, :], other=0.0)
        else:
            tile = tl.load(at, mask=(first + rows < limit)[:, None], other=0.0)
    else:
        if AT + WIDTH > D:
            tile = tl.load(at, mask=(columns < D)[None, :], other=0.0)
        else:
            tile = tl.load(at)
    return tile


@triton.jit
def store_tile(P, tile, first, limit, stride, ROWS: tl.constexpr, AT: tl.constexpr, WIDTH: tl.constexpr,
               D: tl.constexpr):  # fmt: skip
    """The other way, in the dtype of ``P``."""
    rows, columns = tl.arange(0, ROWS), AT + tl.arange(0, WIDTH)
    at = P + tl.cast(first, tl.int64) * stride + rows[:, None] * stride + columns[None, :]
    tl.store(at, tile.to(P.dtype.element_ty), mask=(first + rows < limit)[:, None] & (columns < D)[None, :])


@triton.jit
def splits(start, full_start, full_end, end, STEP: tl.constexpr):
    """Where the loop over [start, end) in STEPs enters and leaves the tiles that lie in [full_start, full_end)."""
    enter = start + tl.cdiv(tl.maximum(full_start - start, 0), STEP) * STEP
    leave = enter + tl.maximum(full_end - enter, 0) // STEP * STEP
    return enter, leave, tl.maximum(end, enter)


@triton.jit
def _visible(keys, lo, hi, prefix, PREFIX: tl.constexpr):
    """Which keys which rows see; keys and lo, hi broadcast against each other."""
    seen = (keys >= lo) & (keys < hi)
    if PREFIX:
        seen = seen | (keys < prefix)
    return seen


@triton.jit
def attend(
    q0, q1, acc0, acc1, top, total, K, V, k_stride, v_stride, first, last, limit, lo, hi, prefix, scale, softcap,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, BN: tl.constexpr, MASK: tl.constexpr, PREFIX: tl.constexpr,
    SOFTCAP: tl.constexpr,
):  # fmt: skip
    """Online softmax over keys first .. last in steps of BN.

    Args:
        q0, q1: [BM, D0], [BM, D1] query chunks (q1 is not looked at without D1).
        acc0, acc1, top, total: running output chunks, row maxima (log2 units) and row sums.
        K, V: at the head and at key 0 of the segment.
        limit: keys of the segment; with MASK the loop may run past it.
        lo, hi: [BM]; ``prefix`` a number. Looked at with MASK only.
        scale: in log2 units (times log2 e), or plain with SOFTCAP.
    """
    for n0 in range(first, last, BN):
        k0 = load_tile(K, n0, limit, k_stride, BN, 0, D0, D, MASK)
        s = tl.dot(q0, tl.trans(k0), input_precision="ieee")
        if D1 > 0:
            k1 = load_tile(K, n0, limit, k_stride, BN, D0, D1, D, MASK)
            s = tl.dot(q1, tl.trans(k1), s, input_precision="ieee")
        s = s * scale
        if SOFTCAP:
            s = softcap * tanh(s / softcap) * 1.4426950408889634
        if MASK:
            keys = n0 + tl.arange(0, BN)
            seen = _visible(keys[None, :], lo[:, None], hi[:, None], prefix, PREFIX) & (keys < limit)[None, :]
            s = tl.where(seen, s, float("-inf"))
        highest = tl.maximum(top, tl.max(s, 1))
        base = tl.where(highest == float("-inf"), 0.0, highest)  # a row that has seen no key yet
        p = tl.exp2(s - base[:, None])
        keep = tl.exp2(top - base)
        total = total * keep + tl.sum(p, 1)
        v0 = load_tile(V, n0, limit, v_stride, BN, 0, D0, D, MASK)
        acc0 = tl.dot(p.to(v0.dtype), v0, acc0 * keep[:, None], input_precision="ieee")
        if D1 > 0:
            v1 = load_tile(V, n0, limit, v_stride, BN, D0, D1, D, MASK)
            acc1 = tl.dot(p.to(v1.dtype), v1, acc1 * keep[:, None], input_precision="ieee")
        top = highest
    return acc0, acc1, top, total


@triton.jit
def finish(acc0, acc1, top, total):
    """Output chunks and natural-log lse; a row that saw no key gives 0 and -inf."""
    empty = total == 0.0
    share = 1.0 / tl.where(empty, 1.0, total)
    lse = tl.where(empty, float("-inf"), (top + tl.log2(tl.where(empty, 1.0, total))) * 0.6931471805599453)
    return acc0 * share[:, None], acc1 * share[:, None], lse


@triton.jit
def _weights(s, lse, scale, softcap, SOFTCAP: tl.constexpr):
    """Softmax weights from raw products and lse (log2 units), and the factor of the score's own derivative."""
    s = s * scale
    slope = 1.0
    if SOFTCAP:
        t = tanh(s / softcap)
        slope = 1.0 - t * t
        s = softcap * t * 1.4426950408889634
    return tl.exp2(s - lse), slope


@triton.jit
def grad_q(
    q0, q1, do0, do1, dq0, dq1, lse, delta, K, V, k_stride, v_stride, first, last, limit, lo, hi, prefix, scale, softcap,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, BN: tl.constexpr, MASK: tl.constexpr, PREFIX: tl.constexpr,
    SOFTCAP: tl.constexpr,
):  # fmt: skip
    """dq += ds k over keys first .. last; lse in log2 units, delta [BM], the final scale is the caller's."""
    for n0 in range(first, last, BN):
        k0 = load_tile(K, n0, limit, k_stride, BN, 0, D0, D, MASK)
        v0 = load_tile(V, n0, limit, v_stride, BN, 0, D0, D, MASK)
        s = tl.dot(q0, tl.trans(k0), input_precision="ieee")
        dp = tl.dot(do0, tl.trans(v0), input_precision="ieee")
        if D1 > 0:
            k1 = load_tile(K, n0, limit, k_stride, BN, D0, D1, D, MASK)
            v1 = load_tile(V, n0, limit, v_stride, BN, D0, D1, D, MASK)
            s = tl.dot(q1, tl.trans(k1), s, input_precision="ieee")
            dp = tl.dot(do1, tl.trans(v1), dp, input_precision="ieee")
        p, slope = _weights(s, lse[:, None], scale, softcap, SOFTCAP)
        ds = p * (dp - delta[:, None]) * slope
        if MASK:
            keys = n0 + tl.arange(0, BN)
            seen = _visible(keys[None, :], lo[:, None], hi[:, None], prefix, PREFIX) & (keys < limit)[None, :]
            ds = tl.where(seen, ds, 0.0)
        ds = ds.to(k0.dtype)
        dq0 = tl.dot(ds, k0, dq0, input_precision="ieee")
        if D1 > 0:
            dq1 = tl.dot(ds, k1, dq1, input_precision="ieee")
    return dq0, dq1


@triton.jit
def grad_kv(
    k0, k1, v0, v1, dk0, dk1, dv0, dv1, keys, Q, DO, LSE, DELTA, q_stride, do_stride, first, last, limit, lo, hi, prefix,
    scale, softcap,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, BM: tl.constexpr, MASK: tl.constexpr, PREFIX: tl.constexpr,
    SOFTCAP: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """dk += ds^T q, dv += p^T do over query rows first .. last, transposed so that no accumulator is turned.

    Args:
        keys: [BN] numbers of the keys within their segment.
        Q, DO, LSE, DELTA: at the head and at row 0 of the segment.
        lo, hi: with MASK: what must be added to a row's number to get its own lo and hi (``ROWS`` False), or pointers
            to each row's lo and hi, relative to the segment as keys is (``ROWS`` True).
    """
    for m0 in range(first, last, BM):
        rows = m0 + tl.arange(0, BM)
        inside = rows < limit
        lse = tl.load(LSE + rows, mask=inside, other=0.0) * 1.4426950408889634
        delta = tl.load(DELTA + rows, mask=inside, other=0.0)
        # A row that saw no key has lse -inf; nothing is visible to it, and exp2 must not meet inf - inf.
        lse = tl.where(lse == float("-inf"), 0.0, lse)
        q0 = load_tile(Q, m0, limit, q_stride, BM, 0, D0, D, True)
        do0 = load_tile(DO, m0, limit, do_stride, BM, 0, D0, D, True)
        s = tl.dot(k0, tl.trans(q0), input_precision="ieee")
        dp = tl.dot(v0, tl.trans(do0), input_precision="ieee")
        if D1 > 0:
            q1 = load_tile(Q, m0, limit, q_stride, BM, D0, D1, D, True)
            do1 = load_tile(DO, m0, limit, do_stride, BM, D0, D1, D, True)
            s = tl.dot(k1, tl.trans(q1), s, input_precision="ieee")
            dp = tl.dot(v1, tl.trans(do1), dp, input_precision="ieee")
        p, slope = _weights(s, lse[None, :], scale, softcap, SOFTCAP)
        if MASK:
            if ROWS:
                row_lo = tl.load(lo + rows, mask=inside, other=0)
                row_hi = tl.load(hi + rows, mask=inside, other=0)
            else:
                row_lo, row_hi = rows + lo, rows + hi
            seen = _visible(keys[:, None], row_lo[None, :], row_hi[None, :], prefix, PREFIX) & inside[None, :]
            p = tl.where(seen, p, 0.0)
        ds = (p * (dp - delta[None, :]) * slope).to(q0.dtype)
        p = p.to(do0.dtype)
        dv0 = tl.dot(p, do0, dv0, input_precision="ieee")
        dk0 = tl.dot(ds, q0, dk0, input_precision="ieee")
        if D1 > 0:
            dv1 = tl.dot(p, do1, dv1, input_precision="ieee")
            dk1 = tl.dot(ds, q1, dk1, input_precision="ieee")
    return dk0, dk1, dv0, dv1
