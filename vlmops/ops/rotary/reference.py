"""The oracle: one rotation matrix per pair, written out, in float64."""

from __future__ import annotations

import torch
from torch import Tensor


def forward(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """[T, H, D] in x's dtype."""
    work, c, s = x.double(), cos.double()[:, None], sin.double()[:, None]
    half = x.shape[-1] // 2
    out = torch.empty_like(work)
    first, second = (slice(0, None, 2), slice(1, None, 2)) if interleaved else (slice(0, half), slice(half, None))
    a, b = work[..., first], work[..., second]
    out[..., first] = a * c[..., first] - b * s[..., first]
    out[..., second] = b * c[..., second] + a * s[..., second]
    return out.to(x.dtype)
