"""Least traffic and FLOPs of a product with a weight in few bits."""

from __future__ import annotations

from torch import Tensor

from vlmops.ops._shared.cost import Cost, nbytes


def cost(
    x: Tensor, data: Tensor, scale: Tensor, zero: Tensor | None, kind: str, group_size: int, columns: int,
    bias: Tensor | None, activation: str, gate: Tensor | None, row_mask: Tensor | None, residual: Tensor | None,
    quantize_activations: bool, *, block_m: int | None = None, block_n: int | None = None,
) -> Cost:  # fmt: skip
    """Of the forward.

    Args:
        block_m, block_n: rows and columns of a tile of the result: then the weight counts once for every tile of rows and x once
            for every tile of columns (what they cost a kernel without a cache). None: everything once.
    """
    rows, n = x.numel() // max(1, columns), data.shape[0]
    passes_w = 1 if block_m is None else -(-rows // block_m)
    passes_x = 1 if block_n is None else -(-n // block_n)
    before, x_bytes = Cost(0, 0), nbytes(x)
    if quantize_activations:  # a pass over x that rounds it to one byte, with a scale a row
        x_bytes = rows * columns + 4 * rows
        before = Cost(read=nbytes(x), written=x_bytes)
    read = x_bytes * passes_x + nbytes(data, scale, zero) * passes_w + nbytes(bias, gate, row_mask, residual)
    return before + Cost(read=read, written=rows * n * x.element_size(), flops=2 * rows * n * columns)
