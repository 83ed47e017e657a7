"""The best plain-PyTorch composition. Its gradient is by recomputation: only the inputs are kept."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from vlmops.ops._shared.activations import activate
from vlmops.ops.mlp.layout import gather_rows


def normalise(x: Tensor, kind: str, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """torch's own fused norms."""
    if kind == "layer_norm":
        return F.layer_norm(x, x.shape[-1:], weight, bias, eps)
    if kind == "rms_norm":
        return F.rms_norm(x, x.shape[-1:], weight, eps)
    return x


def forward(
    x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, w_gate: Tensor | None,
    b_gate: Tensor | None, activation: str, residual: Tensor | None, norm: str, norm_weight: Tensor | None,
    norm_bias: Tensor | None, norm_eps: float, mid_norm: str, mid_weight: Tensor | None, mid_bias: Tensor | None,
    mid_eps: float, layer_scale: Tensor | None, gather: str, height: int, width: int, inference: bool,
) -> Tensor:  # fmt: skip
    """[..., N] in x's dtype."""
    rows = gather_rows(normalise(x, norm, norm_weight, norm_bias, norm_eps), gather, height, width)
    h = F.linear(rows, w1, b1)
    h = activate(h, activation) if w_gate is None else activate(F.linear(rows, w_gate, b_gate), activation) * h
    y = F.linear(normalise(h, mid_norm, mid_weight, mid_bias, mid_eps), w2, b2)
    if layer_scale is not None:
        y = y * layer_scale
    return y if residual is None else residual + y
