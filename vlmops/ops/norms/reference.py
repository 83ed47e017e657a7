"""The oracle: the definition in float64."""

from __future__ import annotations

import torch
from torch import Tensor


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
    dtype = x.dtype if weight is None or center or offset else torch.promote_types(weight.dtype, x.dtype)
    total = x.new_empty(0) if residual is None else x + residual
    h = (x if residual is None else total).double()
    if center:
        h = h - h.mean(-1, keepdim=True)
    y = h * torch.rsqrt(h.square().mean(-1, keepdim=True) + eps)
    if weight is not None:
        y = y * (offset + weight.double())
    if bias is not None:
        y = y + bias.double()
    return y.to(dtype), total
