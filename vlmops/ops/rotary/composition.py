"""Plain PyTorch, and the gradient every backend uses: the rotation back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from vlmops.ops._shared.rope import apply_rope, rotate


def forward(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """[T, H, D] in x's dtype."""
    return apply_rope(x, cos, sin, interleaved).contiguous()


def backward(
    grads: Sequence[Tensor | None], outs: Sequence[Tensor], args: Sequence[Any], needs: Sequence[bool]
) -> list[Tensor | None]:
    """The transpose of the rotation: grad * cos - rotate(grad * sin)."""
    (grad,) = grads
    assert grad is not None
    x, cos, sin, interleaved = args
    wide = grad.float() if grad.dtype.itemsize < 4 else grad
    c, s = cos.to(wide.dtype)[:, None], sin.to(wide.dtype)[:, None]
    return [(wide * c - rotate(wide * s, interleaved)).to(x.dtype)]
