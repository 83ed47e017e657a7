"""Every query row has its own run of keys [begin, end); a tile of rows loops over the union of theirs."""

from __future__ import annotations

import triton
import triton.language as tl

from vlmops.ops._shared.triton_attention import attend, finish, grad_kv, grad_q, load_tile, splits, store_tile

__all__ = ["cross_dkdv_kernel", "cross_dq_kernel", "cross_forward_kernel"]


@triton.jit
def _runs(BEGIN, END, rows, total):
    """lo, hi of each row, and over the tile: where some row sees keys, [start, end), and where all do, [full_start, full_end)."""
    far: tl.constexpr = 1 << 30
    inside = rows < total
    lo = tl.load(BEGIN + rows, mask=inside, other=0)
    hi = tl.load(END + rows, mask=inside, other=0)
    end = tl.max(hi, 0)
    start = tl.minimum(tl.min(tl.where(hi > lo, lo, far), 0), end)
    full_start = tl.max(lo, 0)
    full_end = tl.min(tl.where(inside, hi, far), 0)
    return lo, hi, start, full_start, full_end, end


@triton.jit
def cross_forward_kernel(
    Q, K, V, OUT, LSE, BEGIN, END, total_q, total_k, heads, group, q_stride, q_head, k_stride, k_head, v_stride, v_head,
    scale,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, UNIT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """OUT [Tq, H, D], LSE [H, Tq]; neighbouring programs share a tile of rows and with it the keys."""
    q_stride, q_head, k_stride, k_head = q_stride * UNIT, q_head * UNIT, k_stride * UNIT, k_head * UNIT
    v_stride, v_head = v_stride * UNIT, v_head * UNIT
    row0, head = tl.program_id(0) // heads * BM, tl.program_id(0) % heads
    rows = row0 + tl.arange(0, BM)
    lo, hi, start, full_start, full_end, end = _runs(BEGIN, END, rows, total_q)
    enter, leave, last = splits(start, full_start, full_end, end, BN)
    q_at, k_at, v_at = Q + head * q_head, K + (head // group) * k_head, V + (head // group) * v_head
    q0 = load_tile(q_at, row0, total_q, q_stride, BM, 0, D0, D, True)
    acc0 = tl.zeros((BM, D0), tl.float32)
    q1, acc1 = q0, acc0
    if D1 > 0:
        q1 = load_tile(q_at, row0, total_q, q_stride, BM, D0, D1, D, True)
        acc1 = tl.zeros((BM, D1), tl.float32)
    top, total = tl.full((BM,), float("-inf"), tl.float32), tl.zeros((BM,), tl.float32)
    acc0, acc1, top, total = attend(
        q0, q1, acc0, acc1, top, total, k_at, v_at, k_stride, v_stride, start, enter, total_k, lo, hi, 0, scale, 0.0,
        D, D0, D1, BN, True, False, False,
    )  # fmt: skip
    acc0, acc1, top, total = attend(
        q0, q1, acc0, acc1, top, total, k_at, v_at, k_stride, v_stride, enter, leave, total_k, lo, hi, 0, scale, 0.0,
        D, D0, D1, BN, False, False, False,
    )  # fmt: skip
    acc0, acc1, top, total = attend(
        q0, q1, acc0, acc1, top, total, k_at, v_at, k_stride, v_stride, leave, last, total_k, lo, hi, 0, scale, 0.0,
        D, D0, D1, BN, True, False, False,
    )  # fmt: skip
    acc0, acc1, lse = finish(acc0, acc1, top, total)
    store_tile(OUT + head * D, acc0, row0, total_q, heads * D, BM, 0, D0, D)
    if D1 > 0:
        store_tile(OUT + head * D, acc1, row0, total_q, heads * D, BM, D0, D1, D)
    tl.store(LSE + head.to(tl.int64) * total_q + rows, lse, mask=rows < total_q)


@triton.jit
def cross_dq_kernel(
    Q, K, V, DO, LSE, DELTA, DQ, BEGIN, END, total_q, total_k, heads, group, q_stride, q_head, k_stride, k_head, v_stride,
    v_head, do_stride, do_head, scale, log2_scale,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, UNIT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """DQ [Tq, H, D]: the forward's loop again."""
    q_stride, q_head, k_stride, k_head = q_stride * UNIT, q_head * UNIT, k_stride * UNIT, k_head * UNIT
    v_stride, v_head, do_stride, do_head = v_stride * UNIT, v_head * UNIT, do_stride * UNIT, do_head * UNIT
    row0, head = tl.program_id(0) // heads * BM, tl.program_id(0) % heads
    rows = row0 + tl.arange(0, BM)
    inside = rows < total_q
    lo, hi, start, full_start, full_end, end = _runs(BEGIN, END, rows, total_q)
    enter, leave, last = splits(start, full_start, full_end, end, BN)
    q_at, k_at, v_at = Q + head * q_head, K + (head // group) * k_head, V + (head // group) * v_head
    lse = tl.load(LSE + head.to(tl.int64) * total_q + rows, mask=inside, other=0.0) * 1.4426950408889634
    lse = tl.where(lse == float("-inf"), 0.0, lse)
    delta = tl.load(DELTA + head.to(tl.int64) * total_q + rows, mask=inside, other=0.0)
    q0 = load_tile(q_at, row0, total_q, q_stride, BM, 0, D0, D, True)
    do0 = load_tile(DO + head * do_head, row0, total_q, do_stride, BM, 0, D0, D, True)
    dq0 = tl.zeros((BM, D0), tl.float32)
    q1, do1, dq1 = q0, do0, dq0
    if D1 > 0:
        q1 = load_tile(q_at, row0, total_q, q_stride, BM, D0, D1, D, True)
        do1 = load_tile(DO + head * do_head, row0, total_q, do_stride, BM, D0, D1, D, True)
        dq1 = tl.zeros((BM, D1), tl.float32)
    dq0, dq1 = grad_q(
        q0, q1, do0, do1, dq0, dq1, lse, delta, k_at, v_at, k_stride, v_stride, start, enter, total_k, lo, hi, 0,
        log2_scale, 0.0, D, D0, D1, BN, True, False, False,
    )  # fmt: skip
    dq0, dq1 = grad_q(
        q0, q1, do0, do1, dq0, dq1, lse, delta, k_at, v_at, k_stride, v_stride, enter, leave, total_k, lo, hi, 0,
        log2_scale, 0.0, D, D0, D1, BN, False, False, False,
    )  # fmt: skip
    dq0, dq1 = grad_q(
        q0, q1, do0, do1, dq0, dq1, lse, delta, k_at, v_at, k_stride, v_stride, leave, last, total_k, lo, hi, 0,
        log2_scale, 0.0, D, D0, D1, BN, True, False, False,
    )  # fmt: skip
    store_tile(DQ + head * D, dq0 * scale, row0, total_q, heads * D, BM, 0, D0, D)
    if D1 > 0:
        store_tile(DQ + head * D, dq1 * scale, row0, total_q, heads * D, BM, D0, D1, D)


@triton.jit
def cross_dkdv_kernel(
    Q, K, V, DO, LSE, DELTA, DK, DV, BEGIN, END, total_q, total_k, kv_heads, group, q_stride, q_head, k_stride, k_head,
    v_stride, v_head, do_stride, do_head, scale, log2_scale,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, UNIT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    SCAN: tl.constexpr,
):  # fmt: skip
    """DK, DV [Tk, Hkv, D]: a tile of keys against the rows between the first and the last that see it.

    Text follows its image, so those rows are usually a run; where they are not, the mask leaves the others out.
    """
    q_stride, q_head, k_stride, k_head = q_stride * UNIT, q_head * UNIT, k_stride * UNIT, k_head * UNIT
    v_stride, v_head, do_stride, do_head = v_stride * UNIT, v_head * UNIT, do_stride * UNIT, do_head * UNIT
    n0, head = tl.program_id(0) * BN, tl.program_id(1)
    first = tl.full((SCAN,), 1 << 30, tl.int32)
    last = tl.zeros((SCAN,), tl.int32)
    for r0 in range(0, total_q, SCAN):
        row = r0 + tl.arange(0, SCAN)
        lo = tl.load(BEGIN + row, mask=row < total_q, other=0)
        hi = tl.load(END + row, mask=row < total_q, other=0)
        sees = (hi > lo) & (lo < n0 + BN) & (hi > n0)
        first = tl.where(sees, tl.minimum(first, row), first)
        last = tl.where(sees, row + 1, last)
    row_first, row_last = tl.min(first, 0), tl.max(last, 0)
    row_first = tl.minimum(row_first, row_last)
    k_at, v_at = K + head * k_head, V + head * v_head
    k0 = load_tile(k_at, n0, total_k, k_stride, BN, 0, D0, D, True)
    v0 = load_tile(v_at, n0, total_k, v_stride, BN, 0, D0, D, True)
    dk0, dv0 = tl.zeros((BN, D0), tl.float32), tl.zeros((BN, D0), tl.float32)
    k1, v1, dk1, dv1 = k0, v0, dk0, dv0
    if D1 > 0:
        k1 = load_tile(k_at, n0, total_k, k_stride, BN, D0, D1, D, True)
        v1 = load_tile(v_at, n0, total_k, v_stride, BN, D0, D1, D, True)
        dk1, dv1 = tl.zeros((BN, D1), tl.float32), tl.zeros((BN, D1), tl.float32)
    keys = n0 + tl.arange(0, BN)
    for g in range(0, group):
        number = head * group + g
        dk0, dk1, dv0, dv1 = grad_kv(
            k0, k1, v0, v1, dk0, dk1, dv0, dv1, keys, Q + number * q_head, DO + number * do_head,
            LSE + number.to(tl.int64) * total_q, DELTA + number.to(tl.int64) * total_q, q_stride, do_stride, row_first,
            row_last, total_q, BEGIN, END, 0, log2_scale, 0.0, D, D0, D1, BM, True, False, False, True,
        )  # fmt: skip
    store_tile(DK + head * D, dk0 * scale, n0, total_k, kv_heads * D, BN, 0, D0, D)
    store_tile(DV + head * D, dv0, n0, total_k, kv_heads * D, BN, 0, D0, D)
    if D1 > 0:
        store_tile(DK + head * D, dk1 * scale, n0, total_k, kv_heads * D, BN, D0, D1, D)
        store_tile(DV + head * D, dv1, n0, total_k, kv_heads * D, BN, D0, D1, D)
