"""The oracle: one formula after the other, in float64."""

from __future__ import annotations

from torch import Tensor

from vlmops.ops._shared.activations import activate
from vlmops.ops.mlp.layout import gather_rows


def normalise(x: Tensor, kind: str, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """LayerNorm or RMSNorm over the last dimension."""
    if kind == "":
        return x
    if kind == "layer_norm":
        x = x - x.mean(-1, keepdim=True)
    x = x / (x.square().mean(-1, keepdim=True) + eps).sqrt()
    if weight is not None:
        x = x * weight.double()
    return x if bias is None else x + bias.double()


def project(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x W^T + b."""
    y = x @ weight.double().t()
    return y if bias is None else y + bias.double()


def forward(
    x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, w_gate: Tensor | None,
    b_gate: Tensor | None, activation: str, residual: Tensor | None, norm: str, norm_weight: Tensor | None,
    norm_bias: Tensor | None, norm_eps: float, mid_norm: str, mid_weight: Tensor | None, mid_bias: Tensor | None,
    mid_eps: float, layer_scale: Tensor | None, gather: str, height: int, width: int, inference: bool,
) -> Tensor:  # fmt: skip
    """[..., N] in x's dtype."""
    rows = gather_rows(normalise(x.double(), norm, norm_weight, norm_bias, norm_eps), gather, height, width)
    h = project(rows, w1, b1)
    h = activate(h, activation) if w_gate is None else activate(project(rows, w_gate, b_gate), activation) * h
    y = project(normalise(h, mid_norm, mid_weight, mid_bias, mid_eps), w2, b2)
    if layer_scale is not None:
        y = y * layer_scale.double()
    if residual is not None:
        y = y + residual.double()
    return y.to(x.dtype)
