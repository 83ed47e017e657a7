"""Kernels of fp8 attention: a scale a head, heads rounded into rows and v into columns, online softmax over e4m3 tiles.

Both products of e4m3 tiles want the summed dimension to be contiguous. For v that is the keys, so v is written turned, [D, keys],
each sequence at a multiple of 16: loads of 16 bytes then stay aligned wherever sequences begin.
"""

from __future__ import annotations

import triton
import triton.language as tl

from vlmops.ops._shared.triton_attention import finish, load_tile, splits, store_tile
from vlmops.ops._shared.triton_float8 import finite_max, power_of_two_scale, round_e4m3
from vlmops.ops._shared.triton_schedule import segment
from vlmops.ops.varlen_attention.triton_forward import key_bounds

__all__ = ["fp8_forward_kernel", "head_max_kernel", "round_heads_kernel", "turn_heads_kernel"]


@triton.jit
def head_max_kernel(
    X, PARTS, total, x_stride, x_head, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, UNIT: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """PARTS [H, programs]: the largest finite magnitude among every programs-th tile of tokens."""
    part, parts, head = tl.program_id(0), tl.num_programs(0), tl.program_id(1)
    stride = x_stride * UNIT
    at = X + head.to(tl.int64) * (x_head * UNIT)
    largest = tl.zeros((ROWS,), tl.float32)
    for first in range(part * ROWS, total, parts * ROWS):
        x = load_tile(at, first, total, stride, ROWS, 0, D0, D, True).to(tl.float32)
        largest = tl.maximum(largest, finite_max(x, 1))
        if D1 > 0:
            x = load_tile(at, first, total, stride, ROWS, D0, D1, D, True).to(tl.float32)
            largest = tl.maximum(largest, finite_max(x, 1))
    tl.store(PARTS + head * parts + part, tl.max(largest, 0))


@triton.jit
def _head_scale(PARTS, head, parts, PARTS_BLOCK: tl.constexpr):
    """A head's power of two and its reciprocal from the partial maxima."""
    i = tl.arange(0, PARTS_BLOCK)
    return power_of_two_scale(tl.max(tl.load(PARTS + head * parts + i, mask=i < parts, other=0.0), 0))


@triton.jit
def round_heads_kernel(
    X, PARTS, OUT, SCALE, total, parts, x_stride, x_head, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    UNIT: tl.constexpr, NATIVE: tl.constexpr, PARTS_BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """OUT [H, T, D0 + D1] e4m3, zeros past D, and SCALE [H]."""
    first, head = tl.program_id(0) * ROWS, tl.program_id(1)
    scale, inverse = _head_scale(PARTS, head, parts, PARTS_BLOCK)
    if first == 0:
        tl.store(SCALE + head, scale)
    stride = x_stride * UNIT
    at = X + head.to(tl.int64) * (x_head * UNIT)
    to = OUT + head.to(tl.int64) * total * (D0 + D1)
    x = load_tile(at, first, total, stride, ROWS, 0, D0, D, True).to(tl.float32)
    store_tile(to, round_e4m3(x * inverse, NATIVE), first, total, D0 + D1, ROWS, 0, D0, D0 + D1)
    if D1 > 0:
        x = load_tile(at, first, total, stride, ROWS, D0, D1, D, True).to(tl.float32)
        store_tile(to, round_e4m3(x * inverse, NATIVE), first, total, D0 + D1, ROWS, D0, D1, D0 + D1)


@triton.jit
def _turned_start(start, i):
    """Where sequence i, whose tokens begin at ``start``, begins in the turned v: a multiple of 16, room for all before it."""
    return (start // 16 + i) * 16


@triton.jit
def turn_heads_kernel(
    X, PARTS, OUT, SCALE, SLOTS, CU, total, slots, parts, blocks, x_stride, x_head,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, UNIT: tl.constexpr, NATIVE: tl.constexpr,
    PARTS_BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """OUT [H, D0 + D1, 16 blocks] e4m3: tokens along the last dimension, zeros past D and up to 16 tokens after a sequence."""
    slot, head = tl.program_id(0), tl.program_id(1)
    scale, inverse = _head_scale(PARTS, head, parts, PARTS_BLOCK)
    if slot == 0:
        tl.store(SCALE + head, scale)
    i = tl.load(SLOTS + slot)
    if i >= 0:
        first = tl.load(SLOTS + slots + slot)
        start, length = segment(CU, i, total)
        width = tl.cast(blocks, tl.int64) * 16
        token = first + tl.arange(0, ROWS)
        stride = x_stride * UNIT
        at = X + start.to(tl.int64) * stride + head.to(tl.int64) * (x_head * UNIT)
        to = OUT + head.to(tl.int64) * (D0 + D1) * width + _turned_start(start, i) + token[None, :]
        inside = (token < tl.cdiv(length, 16) * 16)[None, :]
        x = load_tile(at, first, length, stride, ROWS, 0, D0, D, True).to(tl.float32)
        tl.store(to + tl.arange(0, D0)[:, None] * width, round_e4m3(tl.trans(x) * inverse, NATIVE), mask=inside)
        if D1 > 0:
            x = load_tile(at, first, length, stride, ROWS, D0, D1, D, True).to(tl.float32)
            row = D0 + tl.arange(0, D1)[:, None]
            tl.store(to + row * width, round_e4m3(tl.trans(x) * inverse, NATIVE), mask=inside)


@triton.jit
def _values(V, n0, limit, width, BN: tl.constexpr, AT: tl.constexpr, WIDTH: tl.constexpr, MASK: tl.constexpr):
    """[BN, WIDTH] of the turned v, whose rows are ``width`` apart; zeros stand between ``limit`` and the next multiple of 16."""
    key = n0 + tl.arange(0, BN)
    at = V + (AT + tl.arange(0, WIDTH))[:, None] * width + key[None, :]
    if MASK:
        tile = tl.load(at, mask=(key < tl.cdiv(limit, 16) * 16)[None, :], other=0.0)
    else:
        tile = tl.load(at)
    return tl.trans(tile)


@triton.jit
def _attend(
    q0, q1, acc0, acc1, top, total, K, V, width, first, last, limit, lo, hi, scale,
    D0: tl.constexpr, D1: tl.constexpr, DV: tl.constexpr, BN: tl.constexpr, MASK: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    """Online softmax over keys first .. last. ``top`` [BM] is a whole number of log2 units, ``total`` counts 256 p."""
    for n0 in range(first, last, BN):
        s = tl.dot(q0, tl.trans(load_tile(K, n0, limit, D0 + D1, BN, 0, D0, D0 + D1, MASK)))
        if D1 > 0:
            s = tl.dot(q1, tl.trans(load_tile(K, n0, limit, D0 + D1, BN, D0, D1, D0 + D1, MASK)), s)
        s = s * scale
        if MASK:
            key = n0 + tl.arange(0, BN)[None, :]
            s = tl.where((key >= lo[:, None]) & (key < hi[:, None]) & (key < limit), s, float("-inf"))
        highest = tl.maximum(top, tl.ceil(tl.max(s, 1)))
        base = tl.where(highest == float("-inf"), 0.0, highest)  # a row that has seen no key yet
        p = tl.exp2(s - (base - 8.0)[:, None])  # at most 2^8
        keep = tl.exp2(top - base)
        total = total * keep + tl.sum(p, 1)
        p = round_e4m3(p, NATIVE)
        # Hopper adds e4m3 products in fewer bits than float32: each tile's sum goes to full ones.
        v0 = _values(V, n0, limit, width, BN, 0, D0, MASK)
        acc0 = tl.dot(p, v0, acc0 * keep[:, None], max_num_imprecise_acc=BN)
        if DV > 0:
            v1 = _values(V, n0, limit, width, BN, D0, DV, MASK)
            acc1 = tl.dot(p, v1, acc1 * keep[:, None], max_num_imprecise_acc=BN)
        top = highest
    return acc0, acc1, top, total


@triton.jit
def fp8_forward_kernel(
    Q, K, V, Q_SCALE, K_SCALE, V_SCALE, OUT, LSE, SLOTS, CU_Q, CU_K, total_q, total_k, slots, blocks, heads, group, scale, left,
    right,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, DV: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr,
    NATIVE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """OUT [Tq, H, D], LSE [H, Tq]: a (tile of query rows, head) a program.

    Q [H, Tq, D0 + D1], K [H / group, Tk, D0 + D1] and V [H / group, D0 + DV, 16 blocks] are e4m3 numbers; ``scale`` is in log2
    units.
    """
    slot, head = tl.program_id(0) // heads, tl.program_id(0) % heads
    i = tl.load(SLOTS + slot)
    if i >= 0:
        row0 = tl.load(SLOTS + slots + slot)
        q_start, q_len = segment(CU_Q, i, total_q)
        k_start, k_len = segment(CU_K, i, total_k)
        shift = k_len - q_len
        start, full_start, full_end, end = key_bounds(
            row0, tl.minimum(row0 + BM, q_len), shift, k_len, left, right, 0, LEFT, RIGHT, False
        )
        enter, leave, last = splits(start // 16 * 16, full_start, full_end, end, BN)
        rows = row0 + tl.arange(0, BM)
        lo, hi = tl.full((BM,), 0, tl.int32), tl.full((BM,), 0, tl.int32) + k_len
        if LEFT:
            lo = rows + shift - left
        if RIGHT:
            hi = rows + shift + right + 1
        key_head = (head // group).to(tl.int64)
        width = tl.cast(blocks, tl.int64) * 16
        q_at = Q + (head.to(tl.int64) * total_q + q_start) * (D0 + D1)
        k_at = K + (key_head * total_k + k_start) * (D0 + D1)
        v_at = V + key_head * (D0 + DV) * width + _turned_start(k_start, i)
        scale *= tl.load(Q_SCALE + head) * tl.load(K_SCALE + key_head)
        q0 = load_tile(q_at, row0, q_len, D0 + D1, BM, 0, D0, D0 + D1, True)
        q1, acc1 = q0, tl.zeros((BM, D0), tl.float32)
        if D1 > 0:
            q1 = load_tile(q_at, row0, q_len, D0 + D1, BM, D0, D1, D0 + D1, True)
        if DV > 0:
            acc1 = tl.zeros((BM, DV), tl.float32)
        acc0 = tl.zeros((BM, D0), tl.float32)
        top, total = tl.full((BM,), float("-inf"), tl.float32), tl.zeros((BM,), tl.float32)
        if LEFT:
            acc0, acc1, top, total = _attend(
                q0, q1, acc0, acc1, top, total, k_at, v_at, width, start // 16 * 16, enter, k_len, lo, hi, scale, D0, D1, DV, BN,
                True, NATIVE,
            )  # fmt: skip
        acc0, acc1, top, total = _attend(
            q0, q1, acc0, acc1, top, total, k_at, v_at, width, enter, leave, k_len, lo, hi, scale, D0, D1, DV, BN, False, NATIVE
        )  # fmt: skip
        acc0, acc1, top, total = _attend(
            q0, q1, acc0, acc1, top, total, k_at, v_at, width, leave, last, k_len, lo, hi, scale, D0, D1, DV, BN, True, NATIVE
        )  # fmt: skip
        acc0, acc1, lse = finish(acc0, acc1, top - 8.0, total)
        v_scale = tl.load(V_SCALE + key_head)
        out_at = OUT + (q_start.to(tl.int64) * heads + head) * D
        store_tile(out_at, acc0 * v_scale, row0, q_len, heads * D, BM, 0, D0, D)
        if DV > 0:
            store_tile(out_at, acc1 * v_scale, row0, q_len, heads * D, BM, D0, DV, D)
        tl.store(LSE + head.to(tl.int64) * total_q + q_start + rows, lse, mask=rows < q_len)
