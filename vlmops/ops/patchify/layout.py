"""Where the pixels of a patch vector come from: shared by the plain backends."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["cut", "repeat_position"]


def cut(x: Tensor, patch: int, frames: int, order: str, channels_last: bool) -> Tensor:
    """[n, T, C, H, W] -> patch vectors [tokens, C * frames * patch * patch]; the last frame fills up the last patch."""
    n, t, c, h, w = x.shape
    missing = -t % frames
    if missing:
        x = torch.cat([x, x[:, -1:].expand(-1, missing, -1, -1, -1)], dim=1)
    gt, gh, gw = (t + missing) // frames, h // patch, w // patch
    if order == "merge2x2":
        x = x.reshape(n, gt, frames, c, gh // 2, 2, patch, gw // 2, 2, patch)
        tokens, inner = (0, 1, 4, 7, 5, 8), (3, 2, 6, 9)
    else:
        x = x.reshape(n, gt, frames, c, gh, patch, gw, patch)
        tokens, inner = (0, 1, 4, 6), (3, 2, 5, 7)
    if channels_last:
        inner = (*inner[1:], inner[0])
    return x.permute(*tokens, *inner).reshape(n * gt * gh * gw, c * frames * patch * patch)


def repeat_position(position: Tensor, tokens: int) -> Tensor:
    """[tokens, E] from one image's table or from all tokens' own."""
    return position if position.shape[0] == tokens else position.repeat(tokens // max(1, position.shape[0]), 1)


def per_element(values: list[float], k: int, channels_last: bool, like: Tensor) -> Tensor:
    """Per-channel values spread over a patch vector, [k]."""
    row = torch.tensor(values, dtype=like.dtype, device=like.device)
    return row.repeat(k // len(values)) if channels_last else row.repeat_interleave(k // len(values))
