"""Rows of four patches: the gathers in front of a projector."""

from __future__ import annotations

from torch import Tensor

__all__ = ["gather_rows"]


def gather_rows(x: Tensor, kind: str, height: int, width: int) -> Tensor:
    """[T, C] -> [T / 4, 4 C] (merge2x2), or [n, h * w, C] -> [n, h * w / 4, 4 C] (2x2 blocks, row by row)."""
    if kind == "merge2x2":
        return x.reshape(x.shape[0] // 4, 4 * x.shape[1])
    if kind == "pixel_shuffle":
        n, _, c = x.shape
        blocks = x.reshape(n, height // 2, 2, width // 2, 2, c).permute(0, 1, 3, 2, 4, 5)
        return blocks.reshape(n, height * width // 4, 4 * c)
    return x
