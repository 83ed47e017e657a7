"""Native CPU kernels: one pass over memory, residual add included (csrc/cpu/kernels/norms.cpp)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vlmops.backends import native

native.define(
    "norm(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, float eps, float offset, bool center) "
    "-> (Tensor, Tensor)"
)
native.define(
    "norm_backward(Tensor grad, Tensor? grad_total, Tensor h, Tensor? weight, float eps, float offset, bool center, "
    "bool need_x, bool need_weight, bool need_bias) -> (Tensor, Tensor, Tensor)"
)
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def supports(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    offset: float,
    center: bool,
) -> str | None:
    """Why this kernel cannot run these arguments; None if it can."""
    if x.device.type != "cpu":
        return f"a tensor on {x.device}"
    if x.dtype not in _DTYPES:
        return f"{str(x.dtype)[6:]} (float32, bfloat16 and float16 only)"
    if center and x.shape[-1] == 1:
        return "LayerNorm of one channel, whose gradient 0 a fused multiply-add misses by rounding"
    params = {p.dtype for p in (weight, bias) if p is not None}
    if len(params) > 1 or not params <= {x.dtype, torch.float32}:
        return "weight and bias of another dtype than x's or float32"
    if not center and offset == 0.0 and params and params != {x.dtype}:
        return "a float32 weight on low-precision rows, whose result is float32"
    return None if native.available() else native.reason()


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
    native.load()
    x = x.contiguous()
    residual = None if residual is None else residual.contiguous()
    weight = None if weight is None else weight.contiguous()
    bias = None if bias is None else bias.contiguous()
    return torch.ops.vlmops_cpu.norm(x, residual, weight, bias, eps, offset, center)


def backward(
    grads: Sequence[Tensor | None], outs: Sequence[Tensor], args: Sequence[Any], needs: Sequence[bool]
) -> list[Tensor | None]:
    """Statistics again from the saved row, which is in the cache by then."""
    x, residual, weight, _, eps, offset, center = args
    grad_out, grad_total = grads
    if grad_out is None:
        return [grad_total if needs[0] else None, None, None]
    native.load()
    h = (x if residual is None else outs[0]).contiguous()
    grad_total = None if residual is None or grad_total is None else grad_total.contiguous()
    weight = None if weight is None else weight.contiguous()
    dx, dw, db = torch.ops.vlmops_cpu.norm_backward(
        grad_out.contiguous(), grad_total, h, weight, eps, offset, center, *needs
    )
    return [grad if need else None for grad, need in zip((dx, dw, db), needs, strict=True)]
