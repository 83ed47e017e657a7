"""Plain PyTorch, and the gradient: the rotation back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vlmops.ops._shared.rope import apply_rope, rotate


def forward(x: Tensor, k: Tensor | None, cos: Tensor, sin: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    """[T, H, D] in x's dtype, of x and of k (empty without one)."""
    return _turn(x, cos, sin, interleaved), x.new_empty(0) if k is None else _turn(k, cos, sin, interleaved)


def _turn(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    turned = cos.shape[1]
    if turned == x.shape[2]:
        return apply_rope(x, cos, sin, interleaved).contiguous()
    return torch.cat([apply_rope(x[..., :turned], cos, sin, interleaved), x[..., turned:]], dim=-1)


def _turn_back(grad: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """The transpose of the rotation: grad * cos - rotate(grad * sin)."""
    turned = cos.shape[1]
    wide = grad[..., :turned].to(torch.float64 if grad.dtype == torch.float64 else torch.float32)
    c, s = cos.to(wide.dtype)[:, None], sin.to(wide.dtype)[:, None]
    back = (wide * c - rotate(wide * s, interleaved)).to(grad.dtype)
    return back if turned == grad.shape[2] else torch.cat([back, grad[..., turned:]], dim=-1)


def backward(
    grads: Sequence[Tensor | None], outs: Sequence[Tensor], args: Sequence[Any], needs: Sequence[bool]
) -> list[Tensor | None]:
    """Gradients of x and k."""
    _, _, cos, sin, interleaved = args
    return [
        _turn_back(grad, cos, sin, interleaved) if need and grad is not None else None
        for grad, need in zip(grads, needs, strict=True)
    ]
