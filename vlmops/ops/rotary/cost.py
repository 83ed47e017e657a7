"""Least memory traffic of a rotation: x, k and the tables once, the results once."""

from __future__ import annotations

from torch import Tensor

from vlmops.ops._shared.cost import Cost, nbytes


def cost(x: Tensor, k: Tensor | None, cos: Tensor, sin: Tensor, interleaved: bool) -> Cost:
    """Of the forward; the backward is the same."""
    return Cost(read=nbytes(x, k, cos, sin), written=nbytes(x, k))
