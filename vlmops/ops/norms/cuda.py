"""CUDA C++: a row lives in the registers of a warp or a block (csrc/cuda/norms.cu); gradients of the weights in two stages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vlmops.backends import cuda_runtime
from vlmops.backends.cuda_runtime import CTYPE, Out, Plan, f32, i32, i64, vector
from vlmops.ops._shared.strides import dense_rows

MAX_WIDTH = 16384  # a row lives in registers; no model's hidden size is longer
WARP = 32
BLOCK = 128
ROWS_A_BLOCK = 32  # of the backward, at least: each block writes a row of every weight's gradient
SUM_THREADS = 512


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
    return cuda_runtime.why_not(x)


def _parameters(
    x: Tensor, weight: Tensor | None, bias: Tensor | None
) -> tuple[Tensor | None, Tensor | None, torch.dtype]:
    """weight and bias contiguous, in one dtype: x's or float32, and that dtype."""
    kinds = {p.dtype for p in (weight, bias) if p is not None}
    dtype = x.dtype if kinds <= {x.dtype} else torch.float32
    weight, bias = (None if p is None else p.to(dtype).contiguous() for p in (weight, bias))
    return weight, bias, dtype


def _shape(width: int, vec: int, most: int) -> tuple[int, int]:
    """(threads of a row, accesses of a thread to it): a warp where ``most`` elements a thread are enough, else a block."""
    for lanes in (WARP, BLOCK, 256, 512, 1024):
        items = -(-width // (lanes * vec))
        if items * vec <= most or lanes == 1024:
            return lanes, items
    raise AssertionError


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
    round_first = not center and offset == 0.0
    dtype = torch.promote_types(weight.dtype, x.dtype) if round_first and weight is not None else x.dtype
    x = dense_rows(x)
    residual = None if residual is None else dense_rows(residual)
    out = x.new_empty(x.shape, dtype=dtype)
    total = x.new_empty(0 if residual is None else x.shape)
    cuda_runtime.run([forward_plan(x, residual, weight, bias, out, total, eps, offset, center, round_first)])
    return out, total


def forward_plan(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, out: Tensor, total: Tensor, eps: float,
    offset: float, center: bool, round_first: bool,
) -> Plan:  # fmt: skip
    """The launch. Rows dense."""
    rows, width = x.shape
    weight, bias, kind = _parameters(x, weight, bias)
    vec = vector([x, residual], [width])
    lanes, items = _shape(width, vec, 32)
    threads = max(lanes, BLOCK)
    return Plan(
        "norms.cu", "norms_forward",
        (("T", CTYPE[x.dtype]), ("W", CTYPE[kind]), ("O", CTYPE[out.dtype]), ("VEC", vec), ("ITEMS", items), ("LANES", lanes)),
        (-(-rows * lanes // threads), 1, 1), threads,
        (x, residual, weight, bias, Out(out), None if residual is None else Out(total), i64(x.stride(0)),
         i64(0 if residual is None else residual.stride(0)), i32(rows), i32(width), f32(eps), f32(offset), i32(int(center)),
         i32(int(round_first))),
    )  # fmt: skip


def backward(
    grads: Sequence[Tensor | None], outs: Sequence[Tensor], args: Sequence[Any], needs: Sequence[bool]
) -> list[Tensor | None]:
    """Statistics again from the saved row; the weights' gradients as a partial sum of each block, then their sum."""
    x, residual, weight, bias, eps, offset, center = args
    grad_out, grad_total = grads
    if grad_out is None:
        return [grad_total if needs[0] else None, None, None]
    h = dense_rows(x if residual is None else outs[0])
    grad_total = None if residual is None or grad_total is None else dense_rows(grad_total)
    found: list[Tensor | None] = [h.new_empty(h.shape) if needs[0] else None, None, None]
    for i, p in ((1, weight), (2, bias)):
        if needs[i]:
            found[i] = p.new_empty(p.shape)
    cuda_runtime.run(backward_plans(dense_rows(grad_out), grad_total, h, weight, found, eps, offset, center))
    return found


def backward_plans(
    grad: Tensor, grad_total: Tensor | None, h: Tensor, weight: Tensor | None, into: Sequence[Tensor | None], eps: float,
    offset: float, center: bool,
) -> list[Plan]:  # fmt: skip
    """The launches: rows, then one sum for each gradient of a weight. ``into``: gradients of x, weight and bias, or None."""
    dx, dw, db = into
    rows, width = h.shape
    weight, _, kind = _parameters(h, weight, None)
    vec = vector([h, grad_total], [width])
    if grad.dtype == h.dtype:
        vec = min(vec, vector([grad], [width]))
    else:  # wider: a vector of h is several accesses to it
        vec = min(vec, max(1, vector([grad], [width]) * grad.element_size() // h.element_size()))
    lanes, items = _shape(width, vec, 16)
    threads = max(lanes, BLOCK)
    at_once = threads // lanes
    many = cuda_runtime.processors(h)
    blocks = max(1, min(-(-rows // at_once), max(many, min(4 * many, rows // ROWS_A_BLOCK))))
    parts = [None if p is None else h.new_empty(blocks, width, dtype=torch.float32) for p in (dw, db)]
    plans = [
        Plan(
            "norms.cu", "norms_backward",
            (("T", CTYPE[h.dtype]), ("W", CTYPE[kind]), ("O", CTYPE[grad.dtype]), ("VEC", vec), ("ITEMS", items),
             ("LANES", lanes), ("BIAS", db is not None)),
            (blocks, 1, 1), threads,
            (grad, grad_total, h, weight, None if dx is None else Out(dx), *(None if p is None else Out(p) for p in parts),
             i64(grad.stride(0)), i64(0 if grad_total is None else grad_total.stride(0)), i64(h.stride(0)), i32(rows),
             i32(width), f32(eps), f32(offset), i32(int(center))),
        )
    ]  # fmt: skip
    return plans + [
        sum_plan(part, to) for part, to in zip(parts, (dw, db), strict=True) if part is not None and to is not None
    ]


def sum_plan(x: Tensor, out: Tensor) -> Plan:
    """out [C] = x [rows, C] float32 summed over the rows."""
    rows, width = x.shape
    return Plan(
        "norms.cu", "norms_column_sum", (("T", CTYPE[out.dtype]),), (-(-width // WARP), 1, 1), SUM_THREADS,
        (x, Out(out), i32(rows), i32(width)),
    )  # fmt: skip
