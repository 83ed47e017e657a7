"""Plain PyTorch: torch's LayerNorm; RMSNorm in few passes, on a CPU over pieces that stay in the cache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

PIECE = 1 << 20  # elements: 4 MiB of float32 temporaries, which stay in the cache


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
    total = x.new_empty(0) if residual is None else x + residual
    h = x if residual is None else total
    if center:
        return _layer_norm(h, weight, bias, eps), total
    return _rms_norm(h, weight, eps, offset), total


def _layer_norm(h: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    if all(p is None or p.dtype == h.dtype for p in (weight, bias)):
        return F.layer_norm(h, h.shape[-1:], weight, bias, eps).contiguous()
    work = torch.promote_types(h.dtype, torch.float32)  # torch's kernels do not take every mixture
    weight, bias = (p if p is None else p.to(work) for p in (weight, bias))
    return F.layer_norm(h.to(work), h.shape[-1:], weight, bias, eps).to(h.dtype)


def _rms_norm(h: Tensor, weight: Tensor | None, eps: float, offset: float) -> Tensor:
    rounded_first = offset == 0.0
    if weight is None:
        dtype, w = h.dtype, None
    elif rounded_first:
        dtype, w = torch.promote_types(weight.dtype, h.dtype), weight
    else:
        dtype, w = h.dtype, weight.to(torch.promote_types(h.dtype, torch.float32)) + offset
    rows = max(1, PIECE // h.shape[1])
    if h.device.type != "cpu" or h.shape[0] <= rows:
        return _rms_rows(h, w, eps, rounded_first).to(dtype)
    out = torch.empty(h.shape, dtype=dtype, device=h.device)
    for first in range(0, h.shape[0], rows):
        out[first : first + rows] = _rms_rows(h[first : first + rows], w, eps, rounded_first)
    return out


def _rms_rows(h: Tensor, w: Tensor | None, eps: float, rounded_first: bool) -> Tensor:
    hf = h.to(torch.promote_types(h.dtype, torch.float32))
    y = hf * torch.rsqrt(hf.square().mean(-1, keepdim=True) + eps)
    if rounded_first:
        y = y.to(h.dtype)
    return y if w is None else y * w


def backward(
    grads: Sequence[Tensor | None], outs: Sequence[Tensor], args: Sequence[Any], needs: Sequence[bool]
) -> list[Tensor | None]:
    """The formulas, statistics again from the saved input.

    With y = xhat * w + b, xhat = (h - mean) * r and g = grad * w: dh = r * (g - mean(g) - xhat * mean(g * xhat)), the
    first mean only where rows are centred; dw = sum(grad * xhat), db = sum(grad). x + residual adds its own gradient.
    """
    x, residual, weight, _, eps, offset, center = args
    grad_out, grad_total = grads
    h = x if residual is None else outs[0]
    work = torch.promote_types(h.dtype, torch.float32)
    if grad_out is None:
        return [grad_total if needs[0] else None, None, None]
    g = grad_out.to(work)
    xhat = h.to(work)
    if center:
        xhat = xhat - xhat.mean(-1, keepdim=True)
    r = torch.rsqrt(xhat.square().mean(-1, keepdim=True) + eps)
    xhat = xhat * r
    dw = (g * xhat).sum(0) if needs[1] else None
    db = g.sum(0) if needs[2] else None
    if not needs[0]:
        return [None, dw, db]
    if weight is not None:
        g = g * (weight.to(work) + offset)
    inner = g - xhat * (g * xhat).mean(-1, keepdim=True)
    if center:
        inner = inner - g.mean(-1, keepdim=True)
    dh = inner * r
    if grad_total is not None and residual is not None:
        dh = dh + grad_total
    return [dh, dw, db]
