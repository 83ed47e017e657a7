"""The forward kernel: one tile of query rows of one head at a time, keys in a loop (FlashAttention-2, Dao 2023)."""

from __future__ import annotations

import triton
import triton.language as tl

from vlmops.ops._shared.triton_attention import attend, finish, load_tile, splits, store_tile
from vlmops.ops._shared.triton_schedule import segment

__all__ = ["key_bounds", "varlen_forward_kernel"]


@triton.jit
def key_bounds(row0, row1, shift, k_len, left, right, prefix, LEFT: tl.constexpr, RIGHT: tl.constexpr,
               PREFIX: tl.constexpr):  # fmt: skip
    """Keys that some row of [row0, row1) may see, [start, end), and those that all of them see, [full_start, full_end).

    Row i sits at key position i + shift and sees ``left`` keys before it and ``right`` after it.
    """
    start, full_start = k_len * 0, k_len * 0
    end, full_end = k_len, k_len
    if RIGHT:
        end = tl.minimum(tl.maximum(row1 + shift + right, 0), k_len)
        full_end = tl.minimum(tl.maximum(row0 + shift + right + 1, 0), k_len)
    if LEFT:
        full_start = tl.minimum(tl.maximum(row1 - 1 + shift - left, 0), k_len)
        if not PREFIX:
            start = tl.minimum(tl.maximum(row0 + shift - left, 0), end)
    if PREFIX:
        end = tl.maximum(end, prefix)
        full_end = tl.maximum(full_end, prefix)
    return start, full_start, full_end, end


@triton.jit
def _forward_tile(
    work, Q, K, V, OUT, LSE, SLOTS, CU_Q, CU_K, PREFIXES, total_q, total_k, slots, heads, group, q_stride, q_head, k_stride,
    k_head, v_stride, v_head, scale, softcap, left, right,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, PREFIX: tl.constexpr,
    SOFTCAP: tl.constexpr, UNIT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """One (tile, head). Strides come in UNITs, so that the compiler knows what divides them and loads 16 bytes at a time."""
    q_stride, q_head, k_stride, k_head = q_stride * UNIT, q_head * UNIT, k_stride * UNIT, k_head * UNIT
    v_stride, v_head = v_stride * UNIT, v_head * UNIT
    slot, head = work // heads, work % heads
    i = tl.load(SLOTS + slot)
    if i >= 0:
        row0 = tl.load(SLOTS + slots + slot)
        q_start, q_len = segment(CU_Q, i, total_q)
        k_start, k_len = segment(CU_K, i, total_k)
        shift = k_len - q_len
        prefix = 0
        if PREFIX:
            prefix = tl.minimum(tl.load(PREFIXES + i), k_len).to(tl.int32)
        start, full_start, full_end, end = key_bounds(
            row0, tl.minimum(row0 + BM, q_len), shift, k_len, left, right, prefix, LEFT, RIGHT, PREFIX
        )
        enter, leave, last = splits(start, full_start, full_end, end, BN)
        rows = row0 + tl.arange(0, BM)
        lo, hi = tl.full((BM,), 0, tl.int32), tl.full((BM,), 0, tl.int32) + k_len
        if LEFT:
            lo = rows + shift - left
        if RIGHT:
            hi = rows + shift + right + 1
        q_at = Q + q_start.to(tl.int64) * q_stride + head * q_head
        k_at = K + k_start.to(tl.int64) * k_stride + (head // group) * k_head
        v_at = V + k_start.to(tl.int64) * v_stride + (head // group) * v_head
        q0 = load_tile(q_at, row0, q_len, q_stride, BM, 0, D0, D, True)
        q1, acc1 = q0, tl.zeros((BM, D0), tl.float32)
        if D1 > 0:
            q1 = load_tile(q_at, row0, q_len, q_stride, BM, D0, D1, D, True)
            acc1 = tl.zeros((BM, D1), tl.float32)
        acc0 = tl.zeros((BM, D0), tl.float32)
        top, total = tl.full((BM,), float("-inf"), tl.float32), tl.zeros((BM,), tl.float32)
        if LEFT:
            acc0, acc1, top, total = attend(
                q0, q1, acc0, acc1, top, total, k_at, v_at, k_stride, v_stride, start, enter, k_len, lo, hi, prefix,
                scale, softcap, D, D0, D1, BN, True, PREFIX, SOFTCAP,
            )  # fmt: skip
        acc0, acc1, top, total = attend(
            q0, q1, acc0, acc1, top, total, k_at, v_at, k_stride, v_stride, enter, leave, k_len, lo, hi, prefix, scale,
            softcap, D, D0, D1, BN, False, PREFIX, SOFTCAP,
        )  # fmt: skip
        acc0, acc1, top, total = attend(
            q0, q1, acc0, acc1, top, total, k_at, v_at, k_stride, v_stride, leave, last, k_len, lo, hi, prefix, scale,
            softcap, D, D0, D1, BN, True, PREFIX, SOFTCAP,
        )  # fmt: skip
        acc0, acc1, lse = finish(acc0, acc1, top, total)
        out_at = OUT + (q_start.to(tl.int64) * heads + head) * D
        store_tile(out_at, acc0, row0, q_len, heads * D, BM, 0, D0, D)
        if D1 > 0:
            store_tile(out_at, acc1, row0, q_len, heads * D, BM, D0, D1, D)
        tl.store(LSE + head.to(tl.int64) * total_q + q_start + rows, lse, mask=rows < q_len)


@triton.jit
def varlen_forward_kernel(
    Q, K, V, OUT, LSE, SLOTS, CU_Q, CU_K, PREFIXES, total_q, total_k, slots, heads, group, q_stride, q_head, k_stride,
    k_head, v_stride, v_head, scale, softcap, left, right,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, PREFIX: tl.constexpr,
    SOFTCAP: tl.constexpr, UNIT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    PERSISTENT: tl.constexpr,
):  # fmt: skip
    """OUT [Tq, H, D], LSE [H, Tq]: a (tile, head) a program, or (PERSISTENT) every num_programs-th."""
    if PERSISTENT:
        for work in range(tl.program_id(0), slots * heads, tl.num_programs(0)):
            _forward_tile(
                work, Q, K, V, OUT, LSE, SLOTS, CU_Q, CU_K, PREFIXES, total_q, total_k, slots, heads, group,
                q_stride, q_head, k_stride, k_head, v_stride, v_head, scale, softcap, left, right, D, D0, D1, LEFT,
                RIGHT, PREFIX, SOFTCAP, UNIT, BM, BN,
            )  # fmt: skip
    else:
        _forward_tile(
            tl.program_id(0), Q, K, V, OUT, LSE, SLOTS, CU_Q, CU_K, PREFIXES, total_q, total_k, slots, heads, group,
            q_stride, q_head, k_stride, k_head, v_stride, v_head, scale, softcap, left, right, D, D0, D1, LEFT,
            RIGHT, PREFIX, SOFTCAP, UNIT, BM, BN,
        )  # fmt: skip
