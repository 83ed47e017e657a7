"""Logits by tiles: the softmax's parts of each tile, the logits' gradient in place, and the products with it.

Rows are found through a permutation that puts the tokens that count first, so that no tile works for the others, yet nobody
has to wait for their number.
"""

from __future__ import annotations

import triton
import triton.language as tl

from vlmops.ops._shared.triton_math import tanh

__all__ = ["combine_kernel", "dlogits_kernel", "logits_kernel", "product_kernel", "rows_kernel"]


@triton.jit
def rows_kernel(
    TARGETS, GRAD, ROWS, COUNT, TOP, tokens, ignore_index, REDUCTION: tl.constexpr, HAS_GRAD: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """ROWS [T]: tokens that count in their order, then the others; COUNT [1]: how many count.

    TOP [1]: the factor common to all gradients: d result / d loss of a token for a mean or a sum, the largest of them for
    "none". One program runs over all tokens: they are few bytes beside the rows.
    """
    count = tl.program_id(0)
    top = 0.0
    for t0 in range(0, tokens, BLOCK):
        t = t0 + tl.arange(0, BLOCK)
        here = (t < tokens) & (tl.load(TARGETS + t, mask=t < tokens, other=0) != ignore_index)
        count += tl.sum(here.to(tl.int32), 0)
        if HAS_GRAD and REDUCTION == "none":
            top = tl.maximum(top, tl.max(tl.abs(tl.load(GRAD + t, mask=here, other=0.0)), 0))
    tl.store(COUNT, count)
    if REDUCTION == "none":
        top = tl.where((top > 0) & (top < float("inf")), top, 1.0)
    else:
        top = 1.0
        if HAS_GRAD:
            top = tl.load(GRAD)
        if REDUCTION == "mean":
            top = top / tl.maximum(count, 1).to(tl.float32)
    tl.store(TOP, top)
    seen = count * 0
    for t0 in range(0, tokens, BLOCK):
        t = t0 + tl.arange(0, BLOCK)
        here = (t < tokens) & (tl.load(TARGETS + t, mask=t < tokens, other=0) != ignore_index)
        number = seen + tl.cumsum(here.to(tl.int32), 0)
        tl.store(ROWS + tl.where(here, number - 1, count + t - number), t, mask=t < tokens)
        seen += tl.sum(here.to(tl.int32), 0)


@triton.jit
def _place(tile, tiles_m, tiles_n, GROUP: tl.constexpr):
    """Row and column of a tile: GROUP rows of tiles at a time, so that neighbours share both operands in the L2 cache."""
    group = tile // (GROUP * tiles_n)
    rows_here = tl.minimum(tiles_m - group * GROUP, GROUP)
    inside = tile % (GROUP * tiles_n)
    return group * GROUP + inside % rows_here, inside // rows_here


@triton.jit
def _finite(x):
    """x, 0 in the place of an infinity: what exponentials are taken relative to."""
    return tl.where(tl.abs(x) == float("inf"), 0.0, x)


@triton.jit
def _clamped_targets(TARGETS, row, ok, V):
    """int32 targets of these tokens within [0, V)."""
    return tl.minimum(tl.maximum(tl.load(TARGETS + row, mask=ok, other=0), 0), V - 1).to(tl.int32)


@triton.jit
def logits_kernel(
    HIDDEN, WEIGHT, BIAS, TARGETS, ROWS, COUNT, SHARES, MAXIMA, SUMS, TOTALS, PICKED, first, rows, V, k_units, h_units,
    w_units, l_units, splits, per_split, softcap,
    K_UNIT: tl.constexpr, H_UNIT: tl.constexpr, W_UNIT: tl.constexpr, HAS_BIAS: tl.constexpr, SOFTCAP: tl.constexpr,
    SMOOTH: tl.constexpr, STORE: tl.constexpr, EVEN_K: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    GROUP: tl.constexpr,
):  # fmt: skip
    """Of a row tile and ``per_split`` vocabulary tiles of logits x: the softmax's parts, and (STORE) exp(x - row maximum).

    MAXIMA, SUMS (of exp(x - maximum)) and TOTALS (of x, where SMOOTH) are [splits, rows], PICKED (the target's logit) is
    [rows], SHARES (those exponentials) [rows, l_units * 16]: rounded, they are as exact as the probabilities they become,
    which logits are not. With STORE a split is one tile. Sizes come in units, so that the compiler knows what divides
    them and loads 16 bytes at a time.
    """
    K = k_units * K_UNIT
    tile_m, split = _place(tl.program_id(0), tl.cdiv(rows, BM), splits, GROUP)
    count = tl.minimum(tl.load(COUNT) - first, rows)
    m = tile_m * BM + tl.arange(0, BM)
    if tile_m * BM < count:
        ok = m < count
        row = tl.load(ROWS + first + m, mask=ok, other=0).to(tl.int64)
        target = _clamped_targets(TARGETS, row, ok, V)
        top, total = tl.full((BM,), float("-inf"), tl.float32), tl.zeros((BM,), tl.float32)
        plain = tl.zeros((BM,), tl.float32)
        begin = split * per_split
        for tile in range(begin, tl.minimum(begin + per_split, tl.cdiv(V, BN))):
            n = tile * BN + tl.arange(0, BN)
            inside = n < V
            a_at = HIDDEN + row[:, None] * h_units * H_UNIT
            b_at = WEIGHT + n[None, :].to(tl.int64) * w_units * W_UNIT
            x = tl.zeros((BM, BN), tl.float32)
            for k0 in range(0, K, BK):
                k = k0 + tl.arange(0, BK)
                if EVEN_K:
                    a = tl.load(a_at + k[None, :], mask=ok[:, None], other=0.0)
                    b = tl.load(b_at + k[:, None], mask=inside[None, :], other=0.0)
                else:
                    a = tl.load(a_at + k[None, :], mask=ok[:, None] & (k < K)[None, :], other=0.0)
                    b = tl.load(b_at + k[:, None], mask=inside[None, :] & (k < K)[:, None], other=0.0)
                x = tl.dot(a, b, x, input_precision="ieee")
            if HAS_BIAS:
                x += tl.load(BIAS + n, mask=inside, other=0.0).to(tl.float32)[None, :]
            if SOFTCAP:
                x = softcap * tanh(x / softcap)
            if SMOOTH:
                plain += tl.sum(tl.where(inside[None, :], x, 0.0), 1)
            hit = n[None, :] == target[:, None]
            picked = tl.sum(tl.where(hit, x, 0.0), 1)
            tl.store(PICKED + m, picked, mask=ok & (target >= tile * BN) & (target < tile * BN + BN))
            x = tl.where(inside[None, :], x, float("-inf"))
            higher = tl.maximum(top, tl.max(x, 1))
            base = _finite(higher)
            x = tl.exp(x - base[:, None])
            total = total * tl.exp(top - base) + tl.sum(x, 1)
            top = higher
            if STORE:
                at = SHARES + m[:, None].to(tl.int64) * (l_units * 16) + n[None, :]
                tl.store(at, x.to(SHARES.dtype.element_ty), mask=ok[:, None] & (n < l_units * 16)[None, :])
        part = split.to(tl.int64) * rows + m
        tl.store(MAXIMA + part, top, mask=ok)
        tl.store(SUMS + part, total, mask=ok)
        if SMOOTH:
            tl.store(TOTALS + part, plain, mask=ok)


@triton.jit
def combine_kernel(
    MAXIMA, SUMS, TOTALS, PICKED, ROWS, COUNT, LOSS, NORMS, first, rows, V, splits, smoothing, z_loss, SMOOTH: tl.constexpr,
    BR: tl.constexpr, BS: tl.constexpr,
):  # fmt: skip
    """NORMS [2, rows], maximum and sum of exp(x - maximum), and, at their tokens' places, LOSS [T].

    Both from the parts of all splits, always in the same order; apart, because their log-sum-exp of large logits has no
    digits left for a small loss.
    """
    m = tl.program_id(0) * BR + tl.arange(0, BR)
    count = tl.minimum(tl.load(COUNT) - first, rows)
    ok = m < count
    top, total = tl.full((BR,), float("-inf"), tl.float32), tl.zeros((BR,), tl.float32)
    plain = tl.zeros((BR,), tl.float32)
    if tl.program_id(0) * BR < count:
        for s0 in range(0, splits, BS):
            s = s0 + tl.arange(0, BS)
            at = s[:, None].to(tl.int64) * rows + m[None, :]
            mask = (s < splits)[:, None] & ok[None, :]
            part = tl.load(MAXIMA + at, mask=mask, other=float("-inf"))
            higher = tl.maximum(top, tl.max(part, 0))
            base = _finite(higher)
            sums = tl.load(SUMS + at, mask=mask, other=0.0)
            total = total * tl.exp(top - base) + tl.sum(sums * tl.exp(part - base[None, :]), 0)
            top = higher
            if SMOOTH:
                plain += tl.sum(tl.load(TOTALS + at, mask=mask, other=0.0), 0)
    base, log_total = _finite(top), tl.log(tl.where(ok, total, 1.0))
    picked = tl.load(PICKED + m, mask=ok, other=0.0)
    loss = base - picked + log_total + z_loss * (base + log_total) * (base + log_total)
    if SMOOTH:
        loss += smoothing * (picked - plain / V)
    row = tl.load(ROWS + first + m, mask=m < rows, other=0)
    tl.store(LOSS + row, tl.where(ok, loss, 0.0), mask=m < rows)
    tl.store(NORMS + m, base, mask=ok)
    tl.store(NORMS + rows + m, total, mask=ok)


@triton.jit
def dlogits_kernel(
    SHARES, MAXIMA, NORMS, PICKED, TARGETS, ROWS, COUNT, GRAD, TOP, DBIAS, first, rows, V, l_units, softcap, smoothing, z_loss,
    SOFTCAP: tl.constexpr, HAS_GRAD: tl.constexpr, NEED_BIAS: tl.constexpr, MORE: tl.constexpr, BN: tl.constexpr,
    BR: tl.constexpr,
):  # fmt: skip
    """d loss / d (hidden @ weight^T + bias) in the place of SHARES; any numbers in a row's padding.

    TOP is left out (float16 would underflow), except of DBIAS [V]: with NEED_BIAS one program has all rows of its
    columns and adds to what earlier pieces gave (MORE).
    """
    tile = tl.program_id(0)
    n = tile * BN + tl.arange(0, BN)
    inside = n < l_units * 16
    count = tl.minimum(tl.load(COUNT) - first, rows)
    factor = tl.load(TOP)
    dbias = tl.zeros((BN,), tl.float32)
    for r0 in range(tl.program_id(1) * BR, count, tl.num_programs(1) * BR):
        m = r0 + tl.arange(0, BR)
        ok = m < count
        row = tl.load(ROWS + first + m, mask=ok, other=0)
        hit = n[None, :] == _clamped_targets(TARGETS, row, ok, V)[:, None]
        base = _finite(tl.load(MAXIMA + tile.to(tl.int64) * rows + m, mask=ok, other=0.0))
        top = tl.load(NORMS + m, mask=ok, other=0.0)
        total = tl.load(NORMS + rows + m, mask=ok, other=1.0)
        share = tl.exp(base - top) / total * (1.0 + 2.0 * z_loss * (top + tl.log(total)))
        at = SHARES + m[:, None].to(tl.int64) * (l_units * 16) + n[None, :]
        mask = ok[:, None] & inside[None, :]
        e = tl.load(at, mask=mask, other=0.0).to(tl.float32)
        d = e * share[:, None] - smoothing / V
        d -= tl.where(hit, 1.0 - smoothing, 0.0)
        if SOFTCAP:  # the logit again from its exponential; the target's as it was, for that may have underflowed
            x = tl.where(
                hit, tl.load(PICKED + m, mask=ok, other=0.0)[:, None], tl.log(tl.maximum(e, 1e-38)) + base[:, None]
            )
            x = tl.maximum(x / softcap, -1.0)
            d *= 1.0 - x * x
        if HAS_GRAD:
            d *= (tl.load(GRAD + row, mask=ok, other=0.0) / factor)[:, None]
        if NEED_BIAS:
            dbias += tl.sum(tl.where(ok[:, None], d, 0.0), 0)
        tl.store(at, d.to(SHARES.dtype.element_ty), mask=mask)
    if NEED_BIAS:
        dbias *= factor
        if MORE:
            dbias += tl.load(DBIAS + n, mask=n < V, other=0.0)
        tl.store(DBIAS + n, dbias, mask=n < V)


@triton.jit
def product_kernel(
    D, B, SUM, OUT, ROWS, COUNT, TOP, first, rows, V, n_units, l_units, b_units,
    WEIGHT: tl.constexpr, MORE: tl.constexpr, LAST: tl.constexpr, N_UNIT: tl.constexpr, B_UNIT: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """TOP times D [rows, V] times the weight B [V, K], at the tokens' places of OUT [T, K] (zeros where none counts).

    WEIGHT: OUT [V, K] = SUM (MORE: what earlier pieces gave) + TOP times D^T times the piece's hidden rows B [rows, K].
    """
    N = n_units * N_UNIT
    count = tl.minimum(tl.load(COUNT) - first, rows)
    if WEIGHT:
        M = V
    else:
        M = rows
    tile_m, tile_n = _place(tl.program_id(0), tl.cdiv(M, BM), tl.cdiv(N, BN), GROUP)
    m, n = tile_m * BM + tl.arange(0, BM), tile_n * BN + tl.arange(0, BN)
    if WEIGHT:
        depth = count
    else:
        depth = tl.where(tile_m * BM < count, V, 0)  # where nobody counts: zeros, without a product
    if not MORE or LAST or count > 0:
        acc = tl.zeros((BM, BN), tl.float32)
        for k0 in range(0, depth, BK):
            k = k0 + tl.arange(0, BK)
            if WEIGHT:
                at = D + k[:, None].to(tl.int64) * (l_units * 16) + m[None, :]
                a = tl.trans(tl.load(at, mask=(k < depth)[:, None] & (m < l_units * 16)[None, :], other=0.0))
            else:
                at = D + m[:, None].to(tl.int64) * (l_units * 16) + k[None, :]
                a = tl.load(at, mask=(m < count)[:, None] & (k < l_units * 16)[None, :], other=0.0)
            b_at = B + k[:, None].to(tl.int64) * b_units * B_UNIT + n[None, :]
            b = tl.load(b_at, mask=(k < depth)[:, None] & (n < N)[None, :], other=0.0)
            acc = tl.dot(a, b, acc, input_precision="ieee")
        acc *= tl.load(TOP)
        if WEIGHT:
            to = m.to(tl.int64)
        else:
            to = tl.load(ROWS + first + m, mask=m < M, other=0).to(tl.int64)
        to = to[:, None] * N + n[None, :]
        mask = (m < M)[:, None] & (n < N)[None, :]
        if MORE:
            acc += tl.load(SUM + to, mask=mask, other=0.0).to(tl.float32)
        tl.store(OUT + to, acc.to(OUT.dtype.element_ty), mask=mask)
