"""Triton: a few rows a program, one pass each way; partial sums of the weights' gradients instead of atomics."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vlmops.backends import triton_runtime
from vlmops.backends.triton_runtime import Config
from vlmops.ops._shared.strides import dense_rows
from vlmops.ops._shared.triton_math import cdiv, next_power_of_two
from vlmops.ops.norms.triton_kernels import column_sum_kernel, norm_backward_kernel, norm_forward_kernel

MAX_WIDTH = 16384  # a row lives in the registers of one block; no model's hidden size is longer


def supports(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    offset: float,
    center: bool,
) -> str | None:
    """Why these kernels cannot run these arguments; None if they can."""
    if x.shape[1] > MAX_WIDTH:
        return f"rows of {x.shape[1]} elements (at most {MAX_WIDTH})"
    if any(p is not None and p.dtype == torch.float64 for p in (weight, bias)):
        return "a float64 weight or bias"
    return triton_runtime.why_not(x)


def _configs(x: Tensor, accumulators: int) -> list[Config]:
    """Rows a program and warps: about 16 bytes a thread and load, more threads for longer rows."""
    block = next_power_of_two(x.shape[1])
    rows = max(1, min(16, 2048 // block))
    warps = max(1, min(16, 1 << (rows * block * (1 + accumulators) // 1024).bit_length() >> 1))
    found = [Config.of(BR=rows, warps=warps)]
    for other_rows, other_warps in ((rows, min(16, 2 * warps)), (2 * rows, warps), (max(1, rows // 2), warps)):
        config = Config.of(BR=other_rows, warps=other_warps)
        if config not in found:
            found.append(config)
    return found


def forward(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    offset: float,
    center: bool,
) -> tuple[Tensor, Tensor]:
    """normed [T, C], and x + residual (empty without one)."""
    rows, width = x.shape
    round_first = not center and offset == 0.0
    dtype = torch.promote_types(weight.dtype, x.dtype) if round_first and weight is not None else x.dtype
    x = dense_rows(x)
    residual = None if residual is None else dense_rows(residual)
    weight = None if weight is None else weight.contiguous()
    bias = None if bias is None else bias.contiguous()
    out = x.new_empty(x.shape, dtype=dtype)
    total = x.new_empty(0 if residual is None else x.shape)

    def run(config: Config) -> None:
        triton_runtime.launch(
            norm_forward_kernel, (cdiv(rows, config["BR"]),), x, x if residual is None else residual,
            x if weight is None else weight, x if bias is None else bias, out, total, rows, x.stride(0),
            0 if residual is None else residual.stride(0), eps, offset, WIDTH=width, BLOCK=next_power_of_two(width),
            HAS_RESIDUAL=residual is not None, HAS_WEIGHT=weight is not None, HAS_BIAS=bias is not None, CENTER=center,
            ROUND_FIRST=round_first, config=config,
        )  # fmt: skip

    key = f"{x.dtype} {width} {center} {residual is None} {rows.bit_length()}"
    run(triton_runtime.pick("norms", key, _configs(x, 0), run, x.device))
    return out, total


def backward(
    grads: Sequence[Tensor | None], outs: Sequence[Tensor], args: Sequence[Any], needs: Sequence[bool]
) -> list[Tensor | None]:
    """Statistics again from the saved row; the weights' gradients as partial sums of each program, then their sum."""
    x, residual, weight, _, eps, offset, center = args
    grad_out, grad_total = grads
    if grad_out is None:
        return [grad_total if needs[0] else None, None, None]
    h = dense_rows(x if residual is None else outs[0])
    grad_out = dense_rows(grad_out)
    grad_total = None if residual is None or grad_total is None else dense_rows(grad_total)
    weight = None if weight is None else weight.contiguous()
    rows, width = h.shape
    dx = h.new_empty(h.shape if needs[0] else 0)
    found: list[Tensor | None] = [dx if needs[0] else None, None, None]

    def run(config: Config) -> tuple[Tensor, Tensor]:
        programs = max(1, min(cdiv(rows, config["BR"]), triton_runtime.processors(h) * 4))
        dw, db = (h.new_empty(programs if need else 0, width, dtype=torch.float32) for need in needs[1:])
        triton_runtime.launch(
            norm_backward_kernel, (programs,), grad_out, h if grad_total is None else grad_total, h,
            h if weight is None else weight, dx, dw, db, rows, grad_out.stride(0),
            0 if grad_total is None else grad_total.stride(0), h.stride(0), eps, offset, WIDTH=width,
            BLOCK=next_power_of_two(width), HAS_TOTAL=grad_total is not None, HAS_WEIGHT=weight is not None, NEED_X=needs[0],
            NEED_W=needs[1], NEED_B=needs[2], CENTER=center, config=config,
        )  # fmt: skip
        return dw, db

    configs = _configs(h, 1 + sum(needs[1:]))
    key = f"{h.dtype} {width} {center} {tuple(needs)} {rows.bit_length()}"
    parts = run(triton_runtime.pick("norms_backward", key, configs, run, h.device))
    for i, part in enumerate(parts, 1):
        if needs[i]:
            found[i] = column_sum(part)
    return found


def column_sum(x: Tensor) -> Tensor:
    """float32 [C]: the sum over the rows of x [rows, C]."""
    rows, width = x.shape
    out = x.new_empty(width, dtype=torch.float32)
    triton_runtime.launch(column_sum_kernel, (cdiv(width, 64),), x, out, rows, width, BR=32, BC=64, warps=4)
    return out
