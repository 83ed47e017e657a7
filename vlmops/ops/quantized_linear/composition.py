"""Plain PyTorch: the weight dequantised into x's dtype, then ``linear``'s own composition and gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vlmops.ops._shared.quantisation import dequantized, finite_max, power_of_two_scale, round_e4m3
from vlmops.ops.linear import composition as linear


def forward(
    x: Tensor, data: Tensor, scale: Tensor, zero: Tensor | None, kind: str, group_size: int, columns: int,
    bias: Tensor | None, activation: str, gate: Tensor | None, row_mask: Tensor | None, residual: Tensor | None,
    quantize_activations: bool,
) -> Tensor:  # fmt: skip
    """[..., N] in x's dtype."""
    if quantize_activations:
        x = rounded_rows(x)
    weight = _weight(x.dtype, data, scale, zero, kind, group_size, columns)
    return linear.forward(x, weight, bias, activation, gate, row_mask, residual, True)


def _weight(
    dtype: torch.dtype, data: Tensor, scale: Tensor, zero: Tensor | None, kind: str, group_size: int, columns: int
) -> Tensor:
    """[N, K] in ``dtype``."""
    wide = torch.promote_types(dtype, torch.float32)
    return dequantized(data, scale, zero, kind, group_size, columns, wide).to(dtype)


def rounded_rows(x: Tensor) -> Tensor:
    """x [..., K] with each row rounded to e4m3 times a power of two: x's dtype holds it exactly."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    size = power_of_two_scale(finite_max(wide, -1, keepdim=True))
    return (round_e4m3(wide / size) * size).to(x.dtype)


def backward(
    grads: Sequence[Tensor | None], outs: Sequence[Tensor], args: Sequence[Any], needs: Sequence[bool]
) -> list[Tensor | None]:
    """Gradients of x, bias, gate, residual."""
    x, data, scale, zero, kind, group_size, columns, bias, activation, gate, row_mask, residual, quantize = args
    weight = _weight(x.dtype, data, scale, zero, kind, group_size, columns)
    x = rounded_rows(x) if quantize else x
    found = linear.backward(
        grads, outs, (x, weight, bias, activation, gate, row_mask, residual, False), [needs[0], False, *needs[1:]]
    )
    return [found[0], *found[2:]]
