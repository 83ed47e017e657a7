"""The oracle: one rotation matrix per pair, written out, in float64."""

from __future__ import annotations

import torch
from torch import Tensor


def forward(x: Tensor, k: Tensor | None, cos: Tensor, sin: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    """[T, H, D] in x's dtype, of x and of k (empty without one)."""
    return _turn(x, cos, sin, interleaved), x.new_empty(0) if k is None else _turn(k, cos, sin, interleaved)


def _turn(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    work, c, s = x.double(), cos.double()[:, None], sin.double()[:, None]
    turned = cos.shape[1]
    half = turned // 2
    out = torch.empty_like(work, memory_format=torch.contiguous_format)
    pairs = (slice(0, turned, 2), slice(1, turned, 2)) if interleaved else (slice(0, half), slice(half, turned))
    first, second = pairs
    a, b = work[..., first], work[..., second]
    out[..., first] = a * c[..., first] - b * s[..., first]
    out[..., second] = b * c[..., second] + a * s[..., second]
    out[..., turned:] = work[..., turned:]
    return out.to(x.dtype)
