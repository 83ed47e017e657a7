"""Triton: the whole epilogue in the product's registers; few rows stream the weight; gradients without atomics."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vlmops.backends import triton_runtime
from vlmops.backends.triton_runtime import Config
from vlmops.ops._shared.strides import dense_rows
from vlmops.ops._shared.triton_gemm_launch import (
    Epilogue,
    Gathered,
    Product,
    flatten,
    gemm,
    why_not_gemm,
)
from vlmops.ops._shared.triton_math import cdiv
from vlmops.ops.linear.triton_kernels import activation_gradient_gemm, row_sums_gemm, scale_gradient_kernel
from vlmops.ops.norms.triton import column_sum


def supports(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, gate: Tensor | None, row_mask: Tensor | None,
             residual: Tensor | None, inference: bool) -> str | None:  # fmt: skip
    """Why these kernels cannot run these arguments; None if they can."""
    return why_not_gemm(x, weight, bias, gate, residual)


def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, gate: Tensor | None, row_mask: Tensor | None,
    residual: Tensor | None, inference: bool,
) -> Tensor:  # fmt: skip
    """[..., N] in x's dtype."""
    epilogue = Epilogue(
        bias=bias, activation=activation, gate=gate, row_mask=None if row_mask is None else row_mask.reshape(-1),
        residual=None if residual is None else flatten(residual),
    )  # fmt: skip
    return gemm(flatten(x), weight, epilogue).view(*x.shape[:-1], weight.shape[0])


def backward(
    grads: Sequence[Tensor | None], outs: Sequence[Tensor], args: Sequence[Any], needs: Sequence[bool]
) -> list[Tensor | None]:
    """Gradients of x, weight, bias, gate, residual; the product is computed again only for an activation's derivative."""
    x, weight, bias, activation, gate, row_mask, _, _ = args
    need_x, need_weight, need_bias, need_gate, need_residual = needs
    (grad,) = grads
    assert grad is not None
    found: list[Tensor | None] = [None] * 5
    found[4] = grad.clone() if need_residual else None  # an op may not return its own argument
    if not any(needs[:4]):
        return found
    rows, flat = flatten(x), dense_rows(flatten(grad))
    kind = "" if gate is None else "scalar" if gate.numel() == 1 else "vector"
    opened = None if gate is None else torch.tanh(gate.float())
    mask = None if row_mask is None else row_mask.reshape(-1).view(torch.uint8)
    if activation:
        dz, found[2], each = activation_gradient(
            rows, weight, bias, activation, gate, kind, mask, flat, need_bias, need_gate
        )
        found[0] = gemm(dz, weight.t()) if need_x else None
        found[1] = gemm(dz.t(), rows.t()) if need_weight else None
    else:
        masked, scaled, sums = scale_gradient(
            flat, mask, gate, kind, need_x and kind == "vector", need_bias or (need_gate and bias is not None)
        )
        if need_x:
            found[0] = gemm(scaled, weight.t(), Epilogue(gate=gate if kind == "scalar" else None))
        found[1], each = weight_gradient(masked, rows, weight, gate, kind, need_weight, need_gate)
        if each is not None and sums is not None and bias is not None:
            each = each + sums * bias
        if need_bias and sums is not None:
            found[2] = sums if opened is None else sums * opened
    if each is not None and opened is not None:
        each = (1 - opened * opened) * each
        found[3] = (each.sum() if kind == "scalar" else each).reshape(gate.shape)
    found[0] = None if found[0] is None else found[0].view(x.shape)
    return found


def activation_gradient(
    rows: Tensor, weight: Tensor, bias: Tensor | None, activation: str, factor: Tensor | None, kind: str,
    mask: Tensor | None, grad: Tensor, need_bias: bool, need_factor: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """The gradient of z = rows W^T + bias through mask factor act(z), [M, N]; its column sums; those of grad mask act(z)."""
    p = Product(rows, weight)
    dz = grad.new_empty(p.m, p.n)
    bias = None if bias is None else bias.contiguous()
    factor = None if factor is None else factor.contiguous()
    mask = None if mask is None else mask.contiguous()

    def run(config: Config) -> tuple[Tensor, Tensor]:
        parts = cdiv(p.m, config["BM"])
        sums = [grad.new_empty(parts if need else 0, p.n, dtype=torch.float32) for need in (need_bias, need_factor)]
        triton_runtime.launch(
            activation_gradient_gemm, (p.tiles(config),), *p.operands(config), dz if bias is None else bias,
            dz if factor is None else factor, dz if mask is None else mask, grad, dz, *sums, p.m, p.n, *p.steps, *p.picture,
            grad.stride(0), ACTIVATION=activation, HAS_BIAS=bias is not None, FACTOR_KIND=kind, HAS_MASK=mask is not None,
            NEED_BIAS=need_bias, NEED_FACTOR=need_factor, config=config, **p.constants(config),
        )  # fmt: skip
        return sums[0], sums[1]

    key = f"{p.key} {activation} {kind} {need_bias} {need_factor}"
    bias_sums, factor_sums = run(triton_runtime.pick("linear_activation", key, p.configs(extra=1), run, grad.device))
    return dz, column_sum(bias_sums) if need_bias else None, column_sum(factor_sums) if need_factor else None


def weight_gradient(
    grad: Tensor, rows: Tensor | Gathered, weight: Tensor, factor: Tensor | None, kind: str, need_weight: bool,
    need_factor: bool,
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    """factor (grad^T rows) in the weight's dtype, and the row sums of weight (grad^T rows), float32 [N].

    Args:
        grad: [M, N] before the factor.
        rows: [M, K].
        factor, kind: what multiplied the product's columns, as ``column_factor`` takes it; "" for nothing.
    """
    columns = rows if isinstance(rows, Gathered) else rows.t()
    if not (need_weight or need_factor):
        return None, None
    if factor is None:
        return gemm(grad.t(), columns), None
    p = Product(grad.t(), columns)
    weight, factor = dense_rows(weight), factor.contiguous()
    out = grad.new_empty((p.m, p.n) if need_weight else 0)

    def run(config: Config) -> Tensor:
        sums = grad.new_empty(cdiv(p.n, config["BN"]), p.m, dtype=torch.float32)
        triton_runtime.launch(
            row_sums_gemm, (p.tiles(config),), *p.operands(config), factor, weight, out, sums, p.m, p.n, *p.steps,
            *p.picture, weight.stride(0), FACTOR_KIND=kind, NEED_OUT=need_weight, config=config, **p.constants(config),
        )  # fmt: skip
        return sums

    sums = run(triton_runtime.pick("row_sums", f"{p.key} {kind}", p.configs(extra=1), run, grad.device))
    return out if need_weight else None, column_sum(sums) if need_factor else None


def scale_gradient(
    grad: Tensor, mask: Tensor | None, factor: Tensor | None, kind: str, need_scaled: bool, need_sum: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """grad mask, grad mask factor (grad mask itself unless ``need_scaled``), column sums of grad mask; at most one pass.

    Args:
        grad: [M, N], unit stride in a row.
        mask: uint8 [M] or None.
        factor, kind: as ``column_factor`` takes them.
    """
    m, n = grad.shape
    if mask is None and not need_scaled and not need_sum:
        return grad, grad, None
    masked = grad if mask is None else grad.new_empty(m, n)
    scaled = grad.new_empty(m, n) if need_scaled else masked
    br, bc = 16, 128
    wanted = max(1, 4 * triton_runtime.processors(grad) // max(1, cdiv(n, bc)))
    chunk = br * max(1, cdiv(cdiv(m, br), wanted))
    sums = grad.new_empty(max(1, cdiv(m, chunk)) if need_sum else 0, n, dtype=torch.float32)
    triton_runtime.launch(
        scale_gradient_kernel, (max(1, cdiv(m, chunk)), cdiv(n, bc)), grad, grad if mask is None else mask.contiguous(),
        grad if factor is None else factor.contiguous(), masked, scaled, sums, m, n, chunk, grad.stride(0), FACTOR_KIND=kind,
        HAS_MASK=mask is not None, NEED_MASKED=mask is not None, NEED_SCALED=need_scaled, NEED_SUM=need_sum, BR=br, BC=bc,
        warps=4,
    )  # fmt: skip
    return masked, scaled, column_sum(sums) if need_sum else None
