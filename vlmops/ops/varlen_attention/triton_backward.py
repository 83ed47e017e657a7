"""The backward kernels, without atomics: dk and dv by key tile, dq by query tile.

Scores are computed again from q, k and lse; nothing of size queries x keys exists.
"""

from __future__ import annotations

import triton
import triton.language as tl

from vlmops.ops._shared.triton_attention import grad_kv, grad_q, load_tile, splits, store_tile
from vlmops.ops._shared.triton_schedule import segment
from vlmops.ops.varlen_attention.triton_forward import key_bounds

__all__ = ["varlen_dkdv_kernel", "varlen_dq_kernel"]


@triton.jit
def varlen_dkdv_kernel(
    Q, K, V, DO, LSE, DELTA, DK, DV, SLOTS, CU_Q, CU_K, PREFIXES, total_q, total_k, slots, kv_heads, group, q_stride,
    q_head, k_stride, k_head, v_stride, v_head, do_stride, do_head, scale, log2_scale, softcap, left, right,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, PREFIX: tl.constexpr,
    SOFTCAP: tl.constexpr, UNIT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """DK, DV [Tk, Hkv, D]: a tile of keys of one head against all query rows of its group that see it."""
    q_stride, q_head, k_stride, k_head = q_stride * UNIT, q_head * UNIT, k_stride * UNIT, k_head * UNIT
    v_stride, v_head, do_stride, do_head = v_stride * UNIT, v_head * UNIT, do_stride * UNIT, do_head * UNIT
    slot, head = tl.program_id(0), tl.program_id(1)
    i = tl.load(SLOTS + slot)
    if i >= 0:
        n0 = tl.load(SLOTS + slots + slot)
        q_start, q_len = segment(CU_Q, i, total_q)
        k_start, k_len = segment(CU_K, i, total_k)
        shift = k_len - q_len
        last_key = tl.minimum(n0 + BN, k_len) - 1
        prefix = 0
        if PREFIX:
            prefix = tl.minimum(tl.load(PREFIXES + i), k_len).to(tl.int32)
        # Rows that some key of the tile is seen by, and those that see all of them.
        start, full_start, end, full_end = q_len * 0, q_len * 0, q_len, q_len
        lo, hi = -(1 << 29), 1 << 29
        if RIGHT:
            start = tl.minimum(tl.maximum(n0 - right - shift, 0), q_len)
            full_start = tl.minimum(tl.maximum(last_key - right - shift, 0), q_len)
            hi = shift + right + 1
        if LEFT:
            end = tl.minimum(tl.maximum(last_key + left - shift + 1, start), q_len)
            full_end = tl.minimum(tl.maximum(n0 + left - shift + 1, 0), q_len)
            lo = shift - left
        if PREFIX:
            if n0 < prefix:
                start, end, full_start, full_end = q_len * 0, q_len, q_len * 0, q_len * 0
                if last_key < prefix:
                    full_end = q_len
        if not LEFT:  # no border behind: a half-filled last tile of rows is all zeros and needs no mask
            full_end = tl.where(full_end >= q_len, tl.cdiv(q_len, BM) * BM + BM, full_end)
        enter, leave, last = splits(start, full_start, full_end, end, BM)
        leave = tl.minimum(leave, enter + tl.cdiv(tl.maximum(end - enter, 0), BM) * BM)
        k_at = K + k_start.to(tl.int64) * k_stride + head * k_head
        v_at = V + k_start.to(tl.int64) * v_stride + head * v_head
        k0 = load_tile(k_at, n0, k_len, k_stride, BN, 0, D0, D, True)
        v0 = load_tile(v_at, n0, k_len, v_stride, BN, 0, D0, D, True)
        dk0, dv0 = tl.zeros((BN, D0), tl.float32), tl.zeros((BN, D0), tl.float32)
        k1, v1, dk1, dv1 = k0, v0, dk0, dv0
        if D1 > 0:
            k1 = load_tile(k_at, n0, k_len, k_stride, BN, D0, D1, D, True)
            v1 = load_tile(v_at, n0, k_len, v_stride, BN, D0, D1, D, True)
            dk1, dv1 = tl.zeros((BN, D1), tl.float32), tl.zeros((BN, D1), tl.float32)
        keys = n0 + tl.arange(0, BN)
        for g in range(0, group):
            q_number = head * group + g
            q_at = Q + q_start.to(tl.int64) * q_stride + q_number * q_head
            do_at = DO + q_start.to(tl.int64) * do_stride + q_number * do_head
            lse_at = LSE + q_number.to(tl.int64) * total_q + q_start
            delta_at = DELTA + q_number.to(tl.int64) * total_q + q_start
            if RIGHT or PREFIX:
                dk0, dk1, dv0, dv1 = grad_kv(
                    k0, k1, v0, v1, dk0, dk1, dv0, dv1, keys, q_at, do_at, lse_at, delta_at, q_stride, do_stride, start,
                    enter, q_len, lo, hi, prefix, log2_scale, softcap, D, D0, D1, BM, True, PREFIX, SOFTCAP, False,
                )  # fmt: skip
            dk0, dk1, dv0, dv1 = grad_kv(
                k0, k1, v0, v1, dk0, dk1, dv0, dv1, keys, q_at, do_at, lse_at, delta_at, q_stride, do_stride, enter,
                leave, q_len, lo, hi, prefix, log2_scale, softcap, D, D0, D1, BM, False, PREFIX, SOFTCAP, False,
            )  # fmt: skip
            if LEFT or PREFIX:
                dk0, dk1, dv0, dv1 = grad_kv(
                    k0, k1, v0, v1, dk0, dk1, dv0, dv1, keys, q_at, do_at, lse_at, delta_at, q_stride, do_stride, leave,
                    last, q_len, lo, hi, prefix, log2_scale, softcap, D, D0, D1, BM, True, PREFIX, SOFTCAP, False,
                )  # fmt: skip
        at = (k_start.to(tl.int64) * kv_heads + head) * D
        store_tile(DK + at, dk0 * scale, n0, k_len, kv_heads * D, BN, 0, D0, D)
        store_tile(DV + at, dv0, n0, k_len, kv_heads * D, BN, 0, D0, D)
        if D1 > 0:
            store_tile(DK + at, dk1 * scale, n0, k_len, kv_heads * D, BN, D0, D1, D)
            store_tile(DV + at, dv1, n0, k_len, kv_heads * D, BN, D0, D1, D)


@triton.jit
def varlen_dq_kernel(
    Q, K, V, DO, LSE, DELTA, DQ, SLOTS, CU_Q, CU_K, PREFIXES, total_q, total_k, slots, heads, group, q_stride, q_head,
    k_stride, k_head, v_stride, v_head, do_stride, do_head, scale, log2_scale, softcap, left, right,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, PREFIX: tl.constexpr,
    SOFTCAP: tl.constexpr, UNIT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """DQ [Tq, H, D]: the forward's loop over keys again."""
    q_stride, q_head, k_stride, k_head = q_stride * UNIT, q_head * UNIT, k_stride * UNIT, k_head * UNIT
    v_stride, v_head, do_stride, do_head = v_stride * UNIT, v_head * UNIT, do_stride * UNIT, do_head * UNIT
    slot, head = tl.program_id(0) // heads, tl.program_id(0) % heads
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
        inside = rows < q_len
        lo, hi = tl.full((BM,), 0, tl.int32), tl.full((BM,), 0, tl.int32) + k_len
        if LEFT:
            lo = rows + shift - left
        if RIGHT:
            hi = rows + shift + right + 1
        q_at = Q + q_start.to(tl.int64) * q_stride + head * q_head
        do_at = DO + q_start.to(tl.int64) * do_stride + head * do_head
        k_at = K + k_start.to(tl.int64) * k_stride + (head // group) * k_head
        v_at = V + k_start.to(tl.int64) * v_stride + (head // group) * v_head
        lse_at = head.to(tl.int64) * total_q + q_start + rows
        lse = tl.load(LSE + lse_at, mask=inside, other=0.0) * 1.4426950408889634
        lse = tl.where(lse == float("-inf"), 0.0, lse)
        delta = tl.load(DELTA + lse_at, mask=inside, other=0.0)
        q0 = load_tile(q_at, row0, q_len, q_stride, BM, 0, D0, D, True)
        do0 = load_tile(do_at, row0, q_len, do_stride, BM, 0, D0, D, True)
        dq0 = tl.zeros((BM, D0), tl.float32)
        q1, do1, dq1 = q0, do0, dq0
        if D1 > 0:
            q1 = load_tile(q_at, row0, q_len, q_stride, BM, D0, D1, D, True)
            do1 = load_tile(do_at, row0, q_len, do_stride, BM, D0, D1, D, True)
            dq1 = tl.zeros((BM, D1), tl.float32)
        if LEFT:
            dq0, dq1 = grad_q(
                q0, q1, do0, do1, dq0, dq1, lse, delta, k_at, v_at, k_stride, v_stride, start, enter, k_len, lo, hi,
                prefix, log2_scale, softcap, D, D0, D1, BN, True, PREFIX, SOFTCAP,
            )  # fmt: skip
        dq0, dq1 = grad_q(
            q0, q1, do0, do1, dq0, dq1, lse, delta, k_at, v_at, k_stride, v_stride, enter, leave, k_len, lo, hi, prefix,
            log2_scale, softcap, D, D0, D1, BN, False, PREFIX, SOFTCAP,
        )  # fmt: skip
        dq0, dq1 = grad_q(
            q0, q1, do0, do1, dq0, dq1, lse, delta, k_at, v_at, k_stride, v_stride, leave, last, k_len, lo, hi, prefix,
            log2_scale, softcap, D, D0, D1, BN, True, PREFIX, SOFTCAP,
        )  # fmt: skip
        at = DQ + (q_start.to(tl.int64) * heads + head) * D
        store_tile(at, dq0 * scale, row0, q_len, heads * D, BM, 0, D0, D)
        if D1 > 0:
            store_tile(at, dq1 * scale, row0, q_len, heads * D, BM, D0, D1, D)
