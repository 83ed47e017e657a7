"""Rotary position embedding in plain PyTorch (RoFormer, Su et al. 2021), both layouts; shared by all that rotate."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["apply_rope", "rotate"]


def rotate(x: Tensor, interleaved: bool) -> Tensor:
    """The rotation partner of each element: halves (x1, x2) -> (-x2, x1), or the same on pairs (2i, 2i + 1)."""
    if interleaved:
        even, odd = x[..., 0::2], x[..., 1::2]
        return torch.stack((-odd, even), dim=-1).flatten(-2)
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """Rotate x [T, H, D] by tables [T, D], in float32 (float64 for float64), rounded back to x's dtype as transformers does."""
    work = torch.float64 if x.dtype == torch.float64 else torch.float32
    xf, c, s = x.to(work), cos.to(work)[:, None], sin.to(work)[:, None]
    return (xf * c + rotate(xf, interleaved) * s).to(x.dtype)
