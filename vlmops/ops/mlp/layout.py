"""Rows of four patches: the gathers in front of a projector."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

__all__ = ["gather_rows", "scatter_rows"]


def gather_rows(x: Tensor, kind: str, height: int, width: int) -> Tensor:
    """[T, C] -> [T / 4, 4 C] (merge2x2), or [n, h * w, C] -> [n, h * w / 4, 4 C] (2x2 blocks, row by row)."""
    if kind == "merge2x2":
        return x.reshape(x.shape[0] // 4, 4 * x.shape[1])
    if kind == "pixel_shuffle":
        n, _, c = x.shape
        blocks = x.reshape(n, height // 2, 2, width // 2, 2, c).permute(0, 1, 3, 2, 4, 5)
        return blocks.reshape(n, height * width // 4, 4 * c)
    return x


def scatter_rows(rows: Tensor, shape: Sequence[int], kind: str, height: int, width: int) -> Tensor:
    """The way back: what ``gather_rows`` made, flattened or not, as x of this shape."""
    if kind == "pixel_shuffle":
        n, _, c = shape
        rows = rows.reshape(n, height // 2, width // 2, 2, 2, c).permute(0, 1, 3, 2, 4, 5)
    return rows.reshape(shape)
