"""The oracle: one formula, in float64."""

from __future__ import annotations

import torch
from torch import Tensor

from vlmops.ops._shared.activations import activate


def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, gate: Tensor | None, row_mask: Tensor | None,
    residual: Tensor | None, inference: bool,
) -> Tensor:  # fmt: skip
    """[..., N] in x's dtype."""
    y = x.double() @ weight.double().t()
    if bias is not None:
        y = y + bias.double()
    y = activate(y, activation)
    if gate is not None:
        y = y * torch.tanh(gate.double())
    if row_mask is not None:
        y = y * row_mask[..., None]
    if residual is not None:
        y = y + residual.double()
    return y.to(x.dtype)
