"""The best plain-PyTorch composition (cuBLAS, MKL), and the gradients every backend uses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vlmops.ops._shared.activations import activate, activation_backward


def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, gate: Tensor | None, row_mask: Tensor | None,
    residual: Tensor | None, inference: bool,
) -> Tensor:  # fmt: skip
    """[..., N] in x's dtype."""
    y = activate(F.linear(x, weight, bias), activation)
    return epilogue(y, gate, row_mask, residual)


def epilogue(y: Tensor, gate: Tensor | None, row_mask: Tensor | None, residual: Tensor | None) -> Tensor:
    """tanh gate, row mask and residual of a product that nobody else holds."""
    if gate is not None:
        y = y * torch.tanh(gate)
    if row_mask is not None:
        y = y.masked_fill(~row_mask[..., None], 0.0)
    return y if residual is None else residual + y


def backward(
    grads: Sequence[Tensor | None], outs: Sequence[Tensor], args: Sequence[Any], needs: Sequence[bool]
) -> list[Tensor | None]:
    """Gradients of x, weight, bias, gate, residual; the product is computed again only where the epilogue needs it."""
    x, weight, bias, activation, gate, row_mask, _, _ = args
    (grad,) = grads
    assert grad is not None
    n, k = weight.shape
    flat = grad.reshape(-1, n)
    rows = x.reshape(-1, k)
    grad_residual = grad.clone() if needs[4] else None  # an op may not return its own argument
    if row_mask is not None:
        flat = flat.masked_fill(~row_mask.reshape(-1, 1), 0.0)
    grad_gate = None
    if activation or (gate is not None and needs[3]):
        product = F.linear(rows, weight, bias)
        if gate is not None:
            opened = torch.tanh(gate)
            if needs[3]:
                each = flat * activate(product, activation) * (1 - opened * opened)
                grad_gate = (
                    each.sum(0).reshape(gate.shape) if gate.numel() == n and n != 1 else each.sum().reshape(gate.shape)
                )
            flat = flat * opened
        flat = activation_backward(flat, product, activation)
    elif gate is not None:
        flat = flat * torch.tanh(gate)
    return [
        (flat @ weight).view(x.shape) if needs[0] else None,
        flat.t() @ rows if needs[1] else None,
        flat.sum(0) if needs[2] else None,
        grad_gate,
        grad_residual,
    ]
