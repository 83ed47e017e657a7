"""Gradients of a projection: products whose epilogue holds the activation's derivative, or the sums for gate and scale.

Column sums are written as one float32 row for each tile of rows and added up afterwards in a fixed order: no atomics.
"""

from __future__ import annotations

import triton
import triton.language as tl

from vlmops.ops._shared.triton_gemm import column_factor, product
from vlmops.ops._shared.triton_math import activate, activate_backward

__all__ = ["activation_gradient_gemm", "row_sums_gemm", "scale_gradient_kernel"]


@triton.jit
def activation_gradient_gemm(
    A, B, A_MORE, B_MORE, BIAS, FACTOR, ROW_MASK, GRAD, OUT, SUM_BIAS, SUM_FACTOR, M, N, k_units, la_units, lb_units,
    i_units, height, width, g_stride,
    CHANNELS: tl.constexpr, GATHER_A: tl.constexpr, GATHER_B: tl.constexpr, A_T: tl.constexpr, B_T: tl.constexpr,
    TMA: tl.constexpr, EVEN_K: tl.constexpr, PAIR: tl.constexpr, K_UNIT: tl.constexpr, LA_UNIT: tl.constexpr,
    LB_UNIT: tl.constexpr, I_UNIT: tl.constexpr, ACTIVATION: tl.constexpr, HAS_BIAS: tl.constexpr, FACTOR_KIND: tl.constexpr,
    HAS_MASK: tl.constexpr, NEED_BIAS: tl.constexpr, NEED_FACTOR: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    BK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """With z = A B + bias, computed again: OUT [M, N] = grad mask factor act'(z), the gradient of z, and its sums.

    SUM_BIAS [tiles, N] are the column sums of OUT over each tile of rows, SUM_FACTOR those of grad mask act(z).
    """
    acc, _, row, column, tile_m, _ = product(
        tl.program_id(0), A, B, A_MORE, B_MORE, M, N, k_units * K_UNIT, tl.cast(la_units, tl.int64) * LA_UNIT,
        tl.cast(lb_units, tl.int64) * LB_UNIT, tl.cast(i_units, tl.int64) * I_UNIT, height, width, CHANNELS, GATHER_A,
        GATHER_B, A_T, B_T, TMA, EVEN_K, PAIR, BM, BN, BK, GROUP,
    )  # fmt: skip
    row_ok, column_ok = row < M, column < N
    mask = row_ok[:, None] & column_ok[None, :]
    if HAS_BIAS:
        acc += tl.load(BIAS + column, mask=column_ok, other=0.0).to(tl.float32)[None, :]
    at = row[:, None].to(tl.int64)
    grad = tl.load(GRAD + at * g_stride + column[None, :], mask=mask, other=0.0).to(tl.float32)
    if HAS_MASK:
        grad = tl.where((tl.load(ROW_MASK + row, mask=row_ok, other=0) != 0)[:, None], grad, 0.0)
    sums = tl.cast(tile_m, tl.int64) * N + column
    if NEED_FACTOR:
        tl.store(SUM_FACTOR + sums, tl.sum(tl.where(mask, grad * activate(acc, ACTIVATION), 0.0), 0), mask=column_ok)
    if FACTOR_KIND == "scalar":
        grad *= column_factor(FACTOR, FACTOR_KIND, column, column_ok)
    elif FACTOR_KIND != "":
        grad *= column_factor(FACTOR, FACTOR_KIND, column, column_ok)[None, :]
    grad *= activate_backward(acc, ACTIVATION)
    tl.store(OUT + at * N + column[None, :], grad.to(OUT.dtype.element_ty), mask=mask)
    if NEED_BIAS:
        tl.store(SUM_BIAS + sums, tl.sum(tl.where(mask, grad, 0.0), 0), mask=column_ok)


@triton.jit
def row_sums_gemm(
    A, B, A_MORE, B_MORE, FACTOR, WEIGHT, OUT, SUM, M, N, k_units, la_units, lb_units, i_units, height, width, w_stride,
    CHANNELS: tl.constexpr, GATHER_A: tl.constexpr, GATHER_B: tl.constexpr, A_T: tl.constexpr, B_T: tl.constexpr,
    TMA: tl.constexpr, EVEN_K: tl.constexpr, PAIR: tl.constexpr, K_UNIT: tl.constexpr, LA_UNIT: tl.constexpr,
    LB_UNIT: tl.constexpr, I_UNIT: tl.constexpr, FACTOR_KIND: tl.constexpr, NEED_OUT: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """A weight's gradient and its factor's from one product: OUT [M, N] = factor A B, and sum over N of WEIGHT (A B).

    With y = factor (x W^T), A B = grad^T x: the sum of grad (x W^T) over rows is that of W (grad^T x) over columns, so the
    factor's gradient needs no second product. SUM [tiles of columns, M].
    """
    acc, _, row, column, _, tile_n = product(
        tl.program_id(0), A, B, A_MORE, B_MORE, M, N, k_units * K_UNIT, tl.cast(la_units, tl.int64) * LA_UNIT,
        tl.cast(lb_units, tl.int64) * LB_UNIT, tl.cast(i_units, tl.int64) * I_UNIT, height, width, CHANNELS, GATHER_A,
        GATHER_B, A_T, B_T, TMA, EVEN_K, PAIR, BM, BN, BK, GROUP,
    )  # fmt: skip
    row_ok, column_ok = row < M, column < N
    mask = row_ok[:, None] & column_ok[None, :]
    at = row[:, None].to(tl.int64)
    weight = tl.load(WEIGHT + at * w_stride + column[None, :], mask=mask, other=0.0).to(tl.float32)
    tl.store(SUM + tl.cast(tile_n, tl.int64) * M + row, tl.sum(tl.where(mask, weight * acc, 0.0), 1), mask=row_ok)
    if NEED_OUT:
        if FACTOR_KIND == "scalar":
            acc *= column_factor(FACTOR, FACTOR_KIND, row, row_ok)
        else:
            acc *= column_factor(FACTOR, FACTOR_KIND, row, row_ok)[:, None]
        tl.store(OUT + at * N + column[None, :], acc.to(OUT.dtype.element_ty), mask=mask)


@triton.jit
def scale_gradient_kernel(
    GRAD, ROW_MASK, FACTOR, MASKED, SCALED, SUM, rows, width, chunk, g_stride,
    FACTOR_KIND: tl.constexpr, HAS_MASK: tl.constexpr, NEED_MASKED: tl.constexpr, NEED_SCALED: tl.constexpr,
    NEED_SUM: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """MASKED = grad mask, SCALED = grad mask factor, both [rows, width]; SUM [chunks, width] of grad mask. One pass."""
    column = tl.program_id(1) * BC + tl.arange(0, BC)
    column_ok = column < width
    factor = tl.full((BC,), 1.0, tl.float32)
    if NEED_SCALED:
        factor *= column_factor(FACTOR, FACTOR_KIND, column, column_ok)
    total = tl.zeros((BC,), tl.float32)
    first = tl.program_id(0) * chunk
    for r0 in range(first, tl.minimum(first + chunk, rows), BR):
        row = r0 + tl.arange(0, BR)
        row_ok = row < rows
        mask = row_ok[:, None] & column_ok[None, :]
        at = row[:, None].to(tl.int64)
        grad = tl.load(GRAD + at * g_stride + column[None, :], mask=mask, other=0.0).to(tl.float32)
        if HAS_MASK:
            grad = tl.where((tl.load(ROW_MASK + row, mask=row_ok, other=0) != 0)[:, None], grad, 0.0)
        if NEED_MASKED:
            tl.store(MASKED + at * width + column[None, :], grad.to(MASKED.dtype.element_ty), mask=mask)
        if NEED_SCALED:
            scaled = grad * factor[None, :]
            tl.store(SCALED + at * width + column[None, :], scaled.to(SCALED.dtype.element_ty), mask=mask)
        if NEED_SUM:
            total += tl.sum(grad, 0)
    if NEED_SUM:
        tl.store(SUM + tl.program_id(0).to(tl.int64) * width + column, total, mask=column_ok)
