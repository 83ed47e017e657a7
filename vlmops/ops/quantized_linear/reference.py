"""The oracle: the weight that the codes stand for, one formula, in float64."""

from __future__ import annotations

import torch
from torch import Tensor

from vlmops.ops._shared.activations import activate
from vlmops.ops._shared.quantisation import dequantized, finite_max, power_of_two_scale, round_e4m3


def forward(
    x: Tensor, data: Tensor, scale: Tensor, zero: Tensor | None, kind: str, group_size: int, columns: int,
    bias: Tensor | None, activation: str, gate: Tensor | None, row_mask: Tensor | None, residual: Tensor | None,
    quantize_activations: bool,
) -> Tensor:  # fmt: skip
    """[..., N] in x's dtype."""
    rows = x.double()
    if quantize_activations:
        size = power_of_two_scale(finite_max(rows.detach(), -1, keepdim=True))
        # Straight-through: the gradient of rounding is taken as 1.
        rows = rows + (round_e4m3(rows.detach() / size) * size - rows.detach())
    y = rows @ dequantized(data, scale, zero, kind, group_size, columns, torch.float64).t()
    if bias is not None:
        y = y + bias.double()
    y = activate(y, activation)
    if gate is not None:
        y = y * torch.tanh(gate.double())
    if row_mask is not None:
        y = y.masked_fill(~row_mask[..., None], 0.0)
    if residual is not None:
        y = y + residual.double()
    return y.to(x.dtype)
