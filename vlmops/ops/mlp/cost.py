"""Least memory traffic and work of an MLP: every operand once, the hidden matrix written and read once."""

from __future__ import annotations

from torch import Tensor

from vlmops.ops._shared.cost import Cost, nbytes


def cost(
    x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, w_gate: Tensor | None,
    b_gate: Tensor | None, activation: str, residual: Tensor | None, norm: str, norm_weight: Tensor | None,
    norm_bias: Tensor | None, norm_eps: float, mid_norm: str, mid_weight: Tensor | None, mid_bias: Tensor | None,
    mid_eps: float, layer_scale: Tensor | None, gather: str, height: int, width: int, inference: bool,
) -> Cost:  # fmt: skip
    """Of the forward. A norm counts its own pass over x or h: a row is written and read once more."""
    rows = x.shape[:-1].numel() // (4 if gather else 1)
    hidden = rows * w1.shape[0] * x.element_size()
    passes = nbytes(x) if norm else 0
    passes += hidden if mid_norm else 0
    read = nbytes(
        x, w1, b1, w2, b2, w_gate, b_gate, residual, norm_weight, norm_bias, mid_weight, mid_bias, layer_scale
    )
    flops = 2 * rows * (w1.numel() * (1 if w_gate is None else 2) + w2.numel())
    return Cost(read + hidden + passes, rows * w2.shape[0] * x.element_size() + hidden + passes, flops)


def backward_cost(x: Tensor, w1: Tensor, w2: Tensor, w_gate: Tensor | None, gather: str) -> Cost:
    """Of the gradients of x and the weights; the first product is computed again, nothing but the inputs is kept.

    Least traffic: the incoming gradient, x and the weights read once, their gradients written, h and the gradients behind
    it written and read once.
    """
    rows = x.shape[:-1].numel() // (4 if gather else 1)
    first = w1.numel() * (1 if w_gate is None else 2)
    hidden = rows * w1.shape[0] * x.element_size() * (3 if w_gate is None else 5)
    operands = nbytes(x, w1, w2, w_gate)
    grad = rows * w2.shape[0] * x.element_size()
    return Cost(grad + operands + hidden, operands + hidden, 2 * rows * (3 * first + 2 * w2.numel()))
