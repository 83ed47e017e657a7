"""Rotary position embedding as an op of its own, and the tables of the field's vision towers.

Inside an attention it is better fused (``varlen_attention(rope=...)``); this is for everything else.
"""

from __future__ import annotations

from typing import Any, overload

from torch import Tensor

from vlmops.ops._shared import checks
from vlmops.ops._shared.registry import Op
from vlmops.ops.rotary.tables import mrope_tables, pixtral_rotary_tables, vision_rotary_tables

__all__ = ["mrope_tables", "pixtral_rotary_tables", "rotary", "vision_rotary_tables"]


def _fake(x: Tensor, k: Tensor | None, *args: Any) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(0 if k is None else k.shape)


OP = Op(
    __name__,
    "(Tensor x, Tensor? k, Tensor cos, Tensor sin, bool interleaved) -> (Tensor, Tensor)",
    differentiable=["x", "k"],
    fake=_fake,
    tiny=lambda x, *_: x.numel() < 1 << 14,
)


@overload
def rotary(x: Tensor, cos: Tensor, sin: Tensor, *, k: None = None, interleaved: bool = False) -> Tensor: ...


@overload
def rotary(x: Tensor, cos: Tensor, sin: Tensor, *, k: Tensor, interleaved: bool = False) -> tuple[Tensor, Tensor]: ...


def rotary(
    x: Tensor, cos: Tensor, sin: Tensor, *, k: Tensor | None = None, interleaved: bool = False
) -> Tensor | tuple[Tensor, Tensor]:
    """x * cos + rotate(x) * sin on each head, in float32, rounded to x's dtype.

    Args:
        x: [T, H, D], any token and head strides (q and k side by side in one tensor are one call).
        cos, sin: [T, R] floating point, R even and at most D; no gradient. The first R elements of a head turn, the
            rest stays (partial rotary embedding).
        k: [T, Hk, D] of x's dtype, turned in the same pass.
        interleaved: rotation pairs are (2i, 2i + 1) instead of (i, i + R/2).

    Returns:
        [T, H, D] contiguous in x's dtype; with ``k``, a pair of that and [T, Hk, D].

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape or device.

    Source: RoFormer (Su et al., 2021); rounding as transformers' ``apply_rotary_pos_emb_vision``.
    """
    checks.check_tensor("x", x, dim=3, layout="[T, H, D]")
    checks.check_floating("x", x)
    tokens, _, dim = x.shape
    for name, table in (("cos", cos), ("sin", sin)):
        checks.check_tensor(name, table, dim=2, layout="[T, R]")
        checks.check_floating(name, table)
        checks.check_shape(name, table, (tokens, cos.shape[1]))
        checks.check_same_device(name, table, x.device, "x")
    turned = cos.shape[1]
    if turned % 2 or turned == 0 or turned > dim:
        raise ValueError(f"cos: expected [T, R] with an even R of at most {dim}, got {checks.describe(cos)}")
    if k is not None:
        checks.check_tensor("k", k, dim=3, layout="[T, Hk, D]")
        checks.check_shape("k", k, (tokens, None, dim), f"[{tokens}, Hk, {dim}] like x")
        checks.check_dtype("k", k, x.dtype, "x")
        checks.check_same_device("k", k, x.device, "x")
    first, second = OP(x, k, cos, sin, interleaved)
    return first if k is None else (first, second)
