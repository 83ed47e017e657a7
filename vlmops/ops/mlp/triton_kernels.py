"""Gradients inside an MLP: the activation's derivative in the epilogue of the product that reaches it, or in one pass."""

from __future__ import annotations

import triton
import triton.language as tl

from vlmops.ops._shared.triton_gemm import product
from vlmops.ops._shared.triton_math import activate, activate_backward

__all__ = ["hidden_gradient_gemm", "hidden_pass_kernel"]


@triton.jit
def _gradients(grad, first, gate, ACTIVATION: tl.constexpr, GATED: tl.constexpr):
    """Gradients of first and gate from that of h = act(gate) first; of first alone from that of h = act(first)."""
    if GATED:
        dfirst, dgate = grad * activate(gate, ACTIVATION), grad * first * activate_backward(gate, ACTIVATION)
    else:
        dfirst = grad * activate_backward(first, ACTIVATION)
        dgate = dfirst
    return dfirst, dgate


@triton.jit
def _hidden(first, gate, ACTIVATION: tl.constexpr, GATED: tl.constexpr):
    """h = act(gate) first, or act(first)."""
    if GATED:
        h = activate(gate, ACTIVATION) * first
    else:
        h = activate(first, ACTIVATION)
    return h


@triton.jit
def hidden_gradient_gemm(
    A, B, A_MORE, B_MORE, FIRST, GATE, H, D_FIRST, D_GATE, SUM_FIRST, SUM_GATE, M, N, k_units, la_units, lb_units, i_units,
    height, width,
    CHANNELS: tl.constexpr, GATHER_A: tl.constexpr, GATHER_B: tl.constexpr, A_T: tl.constexpr, B_T: tl.constexpr,
    TMA: tl.constexpr, EVEN_K: tl.constexpr, PAIR: tl.constexpr, K_UNIT: tl.constexpr, LA_UNIT: tl.constexpr,
    LB_UNIT: tl.constexpr, I_UNIT: tl.constexpr, ACTIVATION: tl.constexpr, GATED: tl.constexpr, NEED_H: tl.constexpr,
    NEED_FIRST: tl.constexpr, NEED_GATE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    GROUP: tl.constexpr,
):  # fmt: skip
    """A B is the gradient of h: D_FIRST and D_GATE [M, N] from it and the saved FIRST and GATE, h itself where NEED_H.

    NEED_FIRST, NEED_GATE: their column sums over each tile of rows, SUM_FIRST and SUM_GATE [tiles, N] float32.
    """
    grad, _, row, column, tile_m, _ = product(
        tl.program_id(0), A, B, A_MORE, B_MORE, M, N, k_units * K_UNIT, tl.cast(la_units, tl.int64) * LA_UNIT,
        tl.cast(lb_units, tl.int64) * LB_UNIT, tl.cast(i_units, tl.int64) * I_UNIT, height, width, CHANNELS, GATHER_A,
        GATHER_B, A_T, B_T, TMA, EVEN_K, PAIR, BM, BN, BK, GROUP,
    )  # fmt: skip
    row_ok, column_ok = row < M, column < N
    mask = row_ok[:, None] & column_ok[None, :]
    at = row[:, None].to(tl.int64) * N + column[None, :]
    first = tl.load(FIRST + at, mask=mask, other=0.0).to(tl.float32)
    gate = first
    if GATED:
        gate = tl.load(GATE + at, mask=mask, other=0.0).to(tl.float32)
    if NEED_H:
        tl.store(H + at, _hidden(first, gate, ACTIVATION, GATED).to(H.dtype.element_ty), mask=mask)
    dfirst, dgate = _gradients(grad, first, gate, ACTIVATION, GATED)
    tl.store(D_FIRST + at, dfirst.to(D_FIRST.dtype.element_ty), mask=mask)
    sums = tl.cast(tile_m, tl.int64) * N + column
    if NEED_FIRST:
        tl.store(SUM_FIRST + sums, tl.sum(tl.where(mask, dfirst, 0.0), 0), mask=column_ok)
    if GATED:
        tl.store(D_GATE + at, dgate.to(D_GATE.dtype.element_ty), mask=mask)
        if NEED_GATE:
            tl.store(SUM_GATE + sums, tl.sum(tl.where(mask, dgate, 0.0), 0), mask=column_ok)


@triton.jit
def hidden_pass_kernel(
    GRAD, FIRST, GATE, H, D_FIRST, D_GATE, SUM_FIRST, SUM_GATE, rows, width, chunk,
    ACTIVATION: tl.constexpr, GATED: tl.constexpr, NEED_H: tl.constexpr, NEED_D: tl.constexpr, NEED_FIRST: tl.constexpr,
    NEED_GATE: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """The same from the gradient of h in memory, or h alone; every matrix [rows, width], sums [chunks, width]."""
    column = tl.program_id(1) * BC + tl.arange(0, BC)
    column_ok = column < width
    sum_first, sum_gate = tl.zeros((BC,), tl.float32), tl.zeros((BC,), tl.float32)
    begin = tl.program_id(0) * chunk
    for r0 in range(begin, tl.minimum(begin + chunk, rows), BR):
        row = r0 + tl.arange(0, BR)
        mask = (row < rows)[:, None] & column_ok[None, :]
        at = row[:, None].to(tl.int64) * width + column[None, :]
        first = tl.load(FIRST + at, mask=mask, other=0.0).to(tl.float32)
        gate = first
        if GATED:
            gate = tl.load(GATE + at, mask=mask, other=0.0).to(tl.float32)
        if NEED_H:
            tl.store(H + at, _hidden(first, gate, ACTIVATION, GATED).to(H.dtype.element_ty), mask=mask)
        if NEED_D:
            grad = tl.load(GRAD + at, mask=mask, other=0.0).to(tl.float32)
            dfirst, dgate = _gradients(grad, first, gate, ACTIVATION, GATED)
            tl.store(D_FIRST + at, dfirst.to(D_FIRST.dtype.element_ty), mask=mask)
            sum_first += tl.sum(dfirst, 0)
            if GATED:
                tl.store(D_GATE + at, dgate.to(D_GATE.dtype.element_ty), mask=mask)
                sum_gate += tl.sum(dgate, 0)
    sums = tl.program_id(0).to(tl.int64) * width + column
    if NEED_FIRST:
        tl.store(SUM_FIRST + sums, sum_first, mask=column_ok)
    if NEED_GATE:
        tl.store(SUM_GATE + sums, sum_gate, mask=column_ok)
