"""A few whole rows a program: residual add, statistics, normalisation in one pass; gradients of the weights in two stages."""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["column_sum_kernel", "norm_backward_kernel", "norm_forward_kernel"]


@triton.jit
def _statistics(h, mask, width, eps, CENTER: tl.constexpr):
    """Centred rows (0 outside ``mask``) and their 1 / sqrt(variance + eps), float32."""
    if CENTER:
        h = tl.where(mask, h - (tl.sum(h, 1) / width)[:, None], 0.0)
    return h, tl.rsqrt(tl.sum(h * h, 1) / width + eps)


@triton.jit
def norm_forward_kernel(
    X, RESIDUAL, WEIGHT, BIAS, OUT, TOTAL, rows, x_stride, r_stride, eps, offset,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, HAS_RESIDUAL: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr,
    CENTER: tl.constexpr, ROUND_FIRST: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """OUT [T, C] = norm of x (+ residual), TOTAL [T, C] = x + residual rounded to x's dtype.

    ROUND_FIRST: the row is rounded to x's dtype before it meets the weight (Llama's RMSNorm), else after.
    """
    row = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    column = tl.arange(0, BLOCK)
    mask = (row < rows)[:, None] & (column < WIDTH)[None, :]
    x = tl.load(X + row[:, None] * x_stride + column[None, :], mask=mask, other=0.0)
    if HAS_RESIDUAL:
        r = tl.load(RESIDUAL + row[:, None] * r_stride + column[None, :], mask=mask, other=0.0)
        x = (x.to(tl.float32) + r.to(tl.float32)).to(x.dtype)
        tl.store(TOTAL + row[:, None] * WIDTH + column[None, :], x, mask=mask)
    h, rstd = _statistics(x.to(tl.float32), mask, WIDTH, eps, CENTER)
    y = h * rstd[:, None]
    if HAS_WEIGHT:
        w = tl.load(WEIGHT + column, mask=column < WIDTH, other=0.0).to(tl.float32)
        if ROUND_FIRST:
            y = y.to(x.dtype).to(tl.float32)
        y = y * (w + offset)[None, :]
    if HAS_BIAS:
        y += tl.load(BIAS + column, mask=column < WIDTH, other=0.0).to(tl.float32)[None, :]
    tl.store(OUT + row[:, None] * WIDTH + column[None, :], y.to(OUT.dtype.element_ty), mask=mask)


@triton.jit
def norm_backward_kernel(
    GRAD, GRAD_TOTAL, H, WEIGHT, DX, DW, DB, rows, g_stride, t_stride, h_stride, eps, offset,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, HAS_TOTAL: tl.constexpr, HAS_WEIGHT: tl.constexpr, NEED_X: tl.constexpr,
    NEED_W: tl.constexpr, NEED_B: tl.constexpr, CENTER: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """DX [T, C] and each program's part of the weight's and the bias's gradient, DW and DB [programs, C] float32.

    With xhat = (h - mean) r and g = grad w: dx = r (g - mean(g) - xhat mean(g xhat)), the first mean only where rows are
    centred.
    """
    column = tl.arange(0, BLOCK)
    w = tl.full((BLOCK,), 1.0, tl.float32)
    if HAS_WEIGHT:
        w = tl.load(WEIGHT + column, mask=column < WIDTH, other=0.0).to(tl.float32) + offset
    dw, db = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    for r0 in range(tl.program_id(0) * BR, rows, tl.num_programs(0) * BR):
        row = tl.cast(r0, tl.int64) + tl.arange(0, BR)
        mask = (row < rows)[:, None] & (column < WIDTH)[None, :]
        grad = tl.load(GRAD + row[:, None] * g_stride + column[None, :], mask=mask, other=0.0).to(tl.float32)
        h = tl.load(H + row[:, None] * h_stride + column[None, :], mask=mask, other=0.0).to(tl.float32)
        h, rstd = _statistics(h, mask, WIDTH, eps, CENTER)
        xhat = h * rstd[:, None]
        if NEED_W:
            dw += tl.sum(grad * xhat, 0)
        if NEED_B:
            db += tl.sum(grad, 0)
        if NEED_X:
            g = tl.where(mask, grad * w[None, :], 0.0)
            inner = g - xhat * (tl.sum(g * xhat, 1) / WIDTH)[:, None]
            if CENTER:
                inner = inner - (tl.sum(g, 1) / WIDTH)[:, None]
            dx = inner * rstd[:, None]
            if HAS_TOTAL:
                dx += tl.load(GRAD_TOTAL + row[:, None] * t_stride + column[None, :], mask=mask, other=0.0).to(
                    tl.float32
                )
            tl.store(DX + row[:, None] * WIDTH + column[None, :], dx.to(DX.dtype.element_ty), mask=mask)
    part = tl.program_id(0) * WIDTH + column
    if NEED_W:
        tl.store(DW + part, dw, mask=column < WIDTH)
    if NEED_B:
        tl.store(DB + part, db, mask=column < WIDTH)


@triton.jit
def column_sum_kernel(X, OUT, rows, width, BR: tl.constexpr, BC: tl.constexpr):
    """OUT [C] = X [rows, C] summed over rows, float32, always in the same order."""
    column = tl.program_id(0) * BC + tl.arange(0, BC)
    total = tl.zeros((BC,), tl.float32)
    for r0 in range(0, rows, BR):
        row = r0 + tl.arange(0, BR)
        mask = (row < rows)[:, None] & (column < width)[None, :]
        total += tl.sum(tl.load(X + row[:, None] * width + column[None, :], mask=mask, other=0.0).to(tl.float32), 0)
    tl.store(OUT + column, total.to(OUT.dtype.element_ty), mask=column < width)
