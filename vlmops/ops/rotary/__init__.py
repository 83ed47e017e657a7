"""Rotary position embedding as an op of its own, and the tables of the field's vision towers.

Inside an attention it is better fused (``varlen_attention(rope=...)``); this is for everything else.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vlmops.ops._shared import checks
from vlmops.ops._shared.registry import Op
from vlmops.ops.rotary.tables import mrope_tables, pixtral_rotary_tables, vision_rotary_tables

__all__ = ["mrope_tables", "pixtral_rotary_tables", "rotary", "vision_rotary_tables"]


def _fake(x: Tensor, *args: object) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


OP = Op(
    __name__,
    "(Tensor x, Tensor cos, Tensor sin, bool interleaved) -> Tensor",
    differentiable=["x"],
    fake=_fake,
    tiny=lambda x, *_: x.numel() < 1 << 14,
)


def rotary(x: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False) -> Tensor:
    """x * cos + rotate(x) * sin on each head, in float32, rounded to x's dtype.

    Args:
        x: [T, H, D], any token and head strides (q and k side by side in one tensor are one call); D even.
        cos, sin: [T, D] floating point; no gradient.
        interleaved: rotation pairs are (2i, 2i + 1) instead of (i, i + D/2).

    Returns:
        [T, H, D] contiguous in x's dtype.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape or device.

    Source: RoFormer (Su et al., 2021); rounding as transformers' ``apply_rotary_pos_emb_vision``.
    """
    checks.check_tensor("x", x, dim=3, layout="[T, H, D]")
    checks.check_floating("x", x)
    tokens, _, dim = x.shape
    if dim % 2 or dim == 0:
        raise ValueError(f"x: expected an even head_dim, got {checks.describe(x)}")
    for name, table in (("cos", cos), ("sin", sin)):
        checks.check_tensor(name, table, dim=2, layout="[T, D]")
        checks.check_floating(name, table)
        checks.check_shape(name, table, (tokens, dim))
        checks.check_same_device(name, table, x.device, "x")
    result: Tensor = OP(x, cos, sin, interleaved)
    return result
