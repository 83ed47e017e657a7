"""Least memory traffic of a norm: every row once, the sum written once more."""

from __future__ import annotations

from torch import Tensor

from vlmops.ops._shared.cost import Cost, nbytes


def cost(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    offset: float,
    center: bool,
    *,
    programs: int = 1,
) -> Cost:
    """Of the forward. ``programs``: how many read the weights."""
    out = x.element_size()
    if weight is not None and not center and offset == 0.0:
        out = max(out, weight.element_size())
    written = x.numel() * out + (0 if residual is None else nbytes(x))
    return Cost(read=nbytes(x, residual) + programs * nbytes(weight, bias), written=written)


def backward_cost(x: Tensor, weight: Tensor | None, grad_total: Tensor | None, sums: int, *, programs: int = 1) -> Cost:
    """Of the backward with a gradient of x and of ``sums`` weights, each a partial float32 row a program, and their sum."""
    parts = sums * programs * x.shape[1] * 4
    read = 2 * nbytes(x) + nbytes(grad_total) + programs * nbytes(weight) + parts
    return Cost(read=read, written=nbytes(x) + parts + sums * x.shape[1] * 4)
