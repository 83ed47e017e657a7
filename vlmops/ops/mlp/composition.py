"""The best plain-PyTorch composition, and the gradients every backend uses: only the inputs are kept, h is computed again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vlmops.ops._shared.activations import activate, activation_backward
from vlmops.ops.mlp.layout import gather_rows, scatter_rows


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


def normalise_backward(
    grad: Tensor, x: Tensor, kind: str, weight: Tensor | None, bias: Tensor | None, eps: float, needs: Sequence[bool]
) -> list[Tensor | None]:
    """Gradients of x, weight and bias of a norm, where wanted, by torch's own rule."""
    if kind == "":
        return [grad if needs[0] else None, None, None]
    wanted = [i for i, (t, need) in enumerate(zip((x, weight, bias), needs, strict=True)) if need and t is not None]
    found: list[Tensor | None] = [None, None, None]
    if wanted:
        x, weight, bias = (None if t is None else t.detach().requires_grad_() for t in (x, weight, bias))  # type: ignore[assignment]
        with torch.enable_grad():
            out = normalise(x, kind, weight, bias, eps)
        leaves = [t for i, t in enumerate((x, weight, bias)) if i in wanted and t is not None]
        for i, g in zip(wanted, torch.autograd.grad(out, leaves, grad.view(out.shape)), strict=True):
            found[i] = g
    return found


def backward(
    grads: Sequence[Tensor | None], outs: Sequence[Tensor], args: Sequence[Any], needs: Sequence[bool]
) -> list[Tensor | None]:
    """Gradients in the schema's order of differentiable arguments."""
    (x, w1, b1, w2, b2, w_gate, b_gate, activation, _, norm, norm_weight, norm_bias, norm_eps, mid_norm, mid_weight,
     mid_bias, mid_eps, layer_scale, gather, height, width, _) = args  # fmt: skip
    (need_x, need_w1, need_b1, need_w2, need_b2, need_wg, need_bg, need_residual, need_nw, need_nb, need_mw, need_mb,
     need_scale) = needs  # fmt: skip
    (grad,) = grads
    assert grad is not None
    n = w2.shape[0]
    flat = grad.reshape(-1, n)
    rows = gather_rows(normalise(x, norm, norm_weight, norm_bias, norm_eps), gather, height, width)
    rows = rows.reshape(-1, rows.shape[-1])
    first = F.linear(rows, w1, b1)
    gate = None if w_gate is None else F.linear(rows, w_gate, b_gate)
    opened = activate(first if gate is None else gate, activation)
    h = opened if gate is None else opened * first

    result: list[Tensor | None] = [None] * len(needs)
    result[7] = grad.clone() if need_residual else None  # an op may not return its own argument
    if need_w2 or need_scale:
        mid = normalise(h, mid_norm, mid_weight, mid_bias, mid_eps)
        if need_scale:
            result[12] = (flat * F.linear(mid, w2, b2)).sum(0)
    if layer_scale is not None:
        flat = flat * layer_scale
    if need_w2:
        result[3] = flat.t() @ mid
        del mid
    result[4] = flat.sum(0) if need_b2 else None
    before = need_x or need_nw or need_nb  # whether anything in front of the first product wants a gradient
    needs_h = before or need_w1 or need_b1 or need_wg or need_bg
    if not (needs_h or need_mw or need_mb):
        return result
    grad_h, result[10], result[11] = normalise_backward(
        flat @ w2, h, mid_norm, mid_weight, mid_bias, mid_eps, (needs_h, need_mw, need_mb)
    )
    if grad_h is None:
        return result
    del h
    if gate is None:
        grad_first, grad_gate = activation_backward(grad_h, first, activation), None
    else:
        grad_first, grad_gate = grad_h * opened, activation_backward(grad_h * first, gate, activation)
    result[1] = grad_first.t() @ rows if need_w1 else None
    result[2] = grad_first.sum(0) if need_b1 else None
    if grad_gate is not None:
        result[5] = grad_gate.t() @ rows if need_wg else None
        result[6] = grad_gate.sum(0) if need_bg else None
    if before:
        grad_rows = grad_first @ w1
        if grad_gate is not None:
            grad_rows = torch.addmm(grad_rows, grad_gate, w_gate)
        grad_normed = scatter_rows(grad_rows, x.shape, gather, height, width)
        result[0], result[8], result[9] = normalise_backward(
            grad_normed, x, norm, norm_weight, norm_bias, norm_eps, (need_x, need_nw, need_nb)
        )
    return result
