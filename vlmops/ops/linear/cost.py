"""Least memory traffic and work of a projection: every operand once."""

from __future__ import annotations

from torch import Tensor

from vlmops.ops._shared.cost import Cost, nbytes


def cost(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, gate: Tensor | None, row_mask: Tensor | None,
    residual: Tensor | None, inference: bool, *, tile: tuple[int, int] | None = None,
) -> Cost:  # fmt: skip
    """Of the forward.

    Args:
        tile: (rows, columns) of a tile of the result: then x counts once for every tile of columns and the weight once for
            every tile of rows, as if there were no cache. None: each once.
    """
    rows, (n, _) = x.shape[:-1].numel(), weight.shape
    passes_m, passes_n = (1, 1) if tile is None else (-(-rows // tile[0]), -(-n // tile[1]))
    scalar_gate = gate is not None and gate.numel() == 1
    read = passes_n * nbytes(x) + passes_m * nbytes(weight, bias) + nbytes(residual)
    read += passes_m * (passes_n if scalar_gate else 1) * nbytes(gate) + passes_n * nbytes(row_mask)
    return Cost(read=read, written=rows * n * x.element_size(), flops=2 * rows * weight.numel())


def backward_cost(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> Cost:
    """Of the gradients of x, weight and bias; with an activation the product is computed once more.

    Least traffic: the incoming gradient, x and the weight read once, their gradients written.
    """
    rows, n = x.shape[:-1].numel(), weight.shape[0]
    products = 3 if activation else 2
    grad = rows * n * x.element_size()
    return Cost(grad + nbytes(x, weight), nbytes(x, weight, bias), products * 2 * rows * weight.numel())
