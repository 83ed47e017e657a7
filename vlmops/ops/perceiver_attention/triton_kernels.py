"""Latents over two sources of keys read where they lie: the context of their item, then the item's own latents."""

from __future__ import annotations

import triton
import triton.language as tl

from vlmops.ops._shared.triton_attention import attend, finish, grad_q, load_tile, store_tile
from vlmops.ops._shared.triton_schedule import segment

__all__ = ["perceiver_dq_kernel", "perceiver_forward_kernel"]


@triton.jit
def _attend_all(q0, q1, acc0, acc1, top, total, K, V, k_stride, v_stride, keys, rows,
                scale, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, BN: tl.constexpr):  # fmt: skip
    """All keys of one source: whole tiles without a mask, then the tail."""
    whole = keys // BN * BN
    acc0, acc1, top, total = attend(
        q0, q1, acc0, acc1, top, total, K, V, k_stride, v_stride, 0, whole, keys, rows, rows, 0, scale, 0.0,
        D, D0, D1, BN, False, False, False,
    )  # fmt: skip
    lo, hi = rows * 0, rows * 0 + keys
    acc0, acc1, top, total = attend(
        q0, q1, acc0, acc1, top, total, K, V, k_stride, v_stride, whole, keys, keys, lo, hi, 0, scale, 0.0,
        D, D0, D1, BN, True, False, False,
    )  # fmt: skip
    return acc0, acc1, top, total


@triton.jit
def perceiver_forward_kernel(
    Q, K, V, KL, VL, OUT, LSE, CU, total_q, total_k, latents, tiles, heads, group, q_stride, q_head, k_stride, k_head,
    v_stride, v_head, kl_stride, kl_head, vl_stride, vl_head, scale,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, UNIT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """OUT [n * latents, H, D], LSE [H, n * latents]: a tile of one item's latents of one head a program."""
    q_stride, q_head, k_stride, k_head = q_stride * UNIT, q_head * UNIT, k_stride * UNIT, k_head * UNIT
    v_stride, v_head, kl_stride, kl_head = v_stride * UNIT, v_head * UNIT, kl_stride * UNIT, kl_head * UNIT
    vl_stride, vl_head = vl_stride * UNIT, vl_head * UNIT
    tile, head = tl.program_id(0) // heads, tl.program_id(0) % heads
    item, row0 = tile // tiles, tile % tiles * BM
    start, length = segment(CU, item, total_k)
    rows = row0 + tl.arange(0, BM)
    own = item.to(tl.int64) * latents
    q_at = Q + own * q_stride + head * q_head
    q0 = load_tile(q_at, row0, latents, q_stride, BM, 0, D0, D, True)
    acc0 = tl.zeros((BM, D0), tl.float32)
    q1, acc1 = q0, acc0
    if D1 > 0:
        q1 = load_tile(q_at, row0, latents, q_stride, BM, D0, D1, D, True)
        acc1 = tl.zeros((BM, D1), tl.float32)
    top, total = tl.full((BM,), float("-inf"), tl.float32), tl.zeros((BM,), tl.float32)
    kv = head // group
    k_at, v_at = K + start.to(tl.int64) * k_stride + kv * k_head, V + start.to(tl.int64) * v_stride + kv * v_head
    acc0, acc1, top, total = _attend_all(
        q0, q1, acc0, acc1, top, total, k_at, v_at, k_stride, v_stride, length, rows, scale, D, D0, D1, BN
    )
    k_at, v_at = KL + own * kl_stride + kv * kl_head, VL + own * vl_stride + kv * vl_head
    acc0, acc1, top, total = _attend_all(
        q0, q1, acc0, acc1, top, total, k_at, v_at, kl_stride, vl_stride, latents, rows, scale, D, D0, D1, BN
    )
    acc0, acc1, lse = finish(acc0, acc1, top, total)
    out_at = OUT + (own * heads + head) * D
    store_tile(out_at, acc0, row0, latents, heads * D, BM, 0, D0, D)
    if D1 > 0:
        store_tile(out_at, acc1, row0, latents, heads * D, BM, D0, D1, D)
    tl.store(LSE + head.to(tl.int64) * total_q + own + rows, lse, mask=rows < latents)


@triton.jit
def _grad_all(q0, q1, do0, do1, dq0, dq1, lse, delta, K, V, k_stride, v_stride, keys, rows, scale,
              D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, BN: tl.constexpr):  # fmt: skip
    """dq of one source."""
    whole = keys // BN * BN
    dq0, dq1 = grad_q(
        q0, q1, do0, do1, dq0, dq1, lse, delta, K, V, k_stride, v_stride, 0, whole, keys, rows, rows, 0, scale, 0.0,
        D, D0, D1, BN, False, False, False,
    )  # fmt: skip
    dq0, dq1 = grad_q(
        q0, q1, do0, do1, dq0, dq1, lse, delta, K, V, k_stride, v_stride, whole, keys, keys, rows * 0, rows * 0 + keys, 0,
        scale, 0.0, D, D0, D1, BN, True, False, False,
    )  # fmt: skip
    return dq0, dq1


@triton.jit
def perceiver_dq_kernel(
    Q, K, V, KL, VL, DO, LSE, DELTA, DQ, CU, total_q, total_k, latents, tiles, heads, group, q_stride, q_head, k_stride,
    k_head, v_stride, v_head, kl_stride, kl_head, vl_stride, vl_head, do_stride, do_head, scale, log2_scale,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, UNIT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """DQ [n * latents, H, D] over both sources: lse and the row sums belong to the whole row, so the parts add up."""
    q_stride, q_head, k_stride, k_head = q_stride * UNIT, q_head * UNIT, k_stride * UNIT, k_head * UNIT
    v_stride, v_head, kl_stride, kl_head = v_stride * UNIT, v_head * UNIT, kl_stride * UNIT, kl_head * UNIT
    vl_stride, vl_head, do_stride, do_head = vl_stride * UNIT, vl_head * UNIT, do_stride * UNIT, do_head * UNIT
    tile, head = tl.program_id(0) // heads, tl.program_id(0) % heads
    item, row0 = tile // tiles, tile % tiles * BM
    start, length = segment(CU, item, total_k)
    rows = row0 + tl.arange(0, BM)
    own = item.to(tl.int64) * latents
    lse_at = head.to(tl.int64) * total_q + own + rows
    lse = tl.load(LSE + lse_at, mask=rows < latents, other=0.0) * 1.4426950408889634
    lse = tl.where(lse == float("-inf"), 0.0, lse)
    delta = tl.load(DELTA + lse_at, mask=rows < latents, other=0.0)
    q_at, do_at = Q + own * q_stride + head * q_head, DO + own * do_stride + head * do_head
    q0 = load_tile(q_at, row0, latents, q_stride, BM, 0, D0, D, True)
    do0 = load_tile(do_at, row0, latents, do_stride, BM, 0, D0, D, True)
    dq0 = tl.zeros((BM, D0), tl.float32)
    q1, do1, dq1 = q0, do0, dq0
    if D1 > 0:
        q1 = load_tile(q_at, row0, latents, q_stride, BM, D0, D1, D, True)
        do1 = load_tile(do_at, row0, latents, do_stride, BM, D0, D1, D, True)
        dq1 = tl.zeros((BM, D1), tl.float32)
    kv = head // group
    k_at, v_at = K + start.to(tl.int64) * k_stride + kv * k_head, V + start.to(tl.int64) * v_stride + kv * v_head
    dq0, dq1 = _grad_all(
        q0, q1, do0, do1, dq0, dq1, lse, delta, k_at, v_at, k_stride, v_stride, length, rows, log2_scale, D, D0, D1, BN
    )
    k_at, v_at = KL + own * kl_stride + kv * kl_head, VL + own * vl_stride + kv * vl_head
    dq0, dq1 = _grad_all(
        q0,
        q1,
        do0,
        do1,
        dq0,
        dq1,
        lse,
        delta,
        k_at,
        v_at,
        kl_stride,
        vl_stride,
        latents,
        rows,
        log2_scale,
        D,
        D0,
        D1,
        BN,
    )
    at = DQ + (own * heads + head) * D
    store_tile(at, dq0 * scale, row0, latents, heads * D, BM, 0, D0, D)
    if D1 > 0:
        store_tile(at, dq1 * scale, row0, latents, heads * D, BM, D0, D1, D)
