"""Qwen2.5-VL's windows: most of its blocks attend inside squares of 112 pixels, whose tokens must lie behind each other."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["window_order"]


def window_order(grids: Sequence[tuple[int, int, int]], side: int, merge: int) -> tuple[Tensor, list[int]]:
    """Where each token comes from when the tokens of a window are put together.

    Tokens move in groups of merge x merge, which the connector will join; windows at the right and bottom may be smaller.

    Args:
        grids: patches in time, height and width of each image, height and width multiples of ``merge``.
        side: patches on a side of a window, a multiple of ``merge``.
        merge: patches on a side whose tokens already stand next to each other.

    Returns:
        int64 [T] on the CPU, ``tokens[order]`` stand window by window; how many tokens each window has.

    Source: Qwen2.5-VL (Bai et al. 2025).
    """
    orders, lengths, first = [], [], 0
    for t, h, w in grids:
        frame, row, column = torch.meshgrid(*(torch.arange(n) for n in (t, h // merge, w // merge)), indexing="ij")
        across, down = -(-w // side), -(-h // side)
        window = (frame * down + row * merge // side) * across + column * merge // side
        orders.append(window.flatten().argsort(stable=True) + first)
        rows, columns = ([min(side, n - at) for at in range(0, n, side)] for n in (h, w))
        lengths += [y * x for y in rows for x in columns] * t
        first += t * (h // merge) * (w // merge)
    if not orders:
        return torch.empty(0, dtype=torch.int64), []
    group = merge * merge
    return (torch.cat(orders)[:, None] * group + torch.arange(group)).flatten(), lengths
