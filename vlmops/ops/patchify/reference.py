"""The oracle: cut, normalise, project, one after the other, in float64."""

from __future__ import annotations

import torch
from torch import Tensor

from vlmops.ops.patchify.layout import cut, per_element, pictures, repeat_position


def forward(
    images: Tensor, sizes: Tensor | None, weight: Tensor, bias: Tensor | None, position: Tensor | None,
    mean: list[float], std: list[float], patch_size: int, temporal_patch_size: int, order: str, channels_last: bool,
    tokens: int, inference: bool,
) -> Tensor:  # fmt: skip
    """tokens [T, E] in weight's dtype."""
    x = images.double() / 255 if images.dtype == torch.uint8 else images.double()
    flat = weight.double().flatten(1)
    if x.dim() == 2:
        rows = x
    else:
        channels = flat.shape[1] // (temporal_patch_size * patch_size * patch_size)
        parts = [cut(p, patch_size, temporal_patch_size, order, channels_last) for p in pictures(x, sizes, channels)]
        rows = torch.cat(parts) if parts else flat.new_empty(0, flat.shape[1])
    if mean:
        rows = rows - per_element(mean, rows.shape[1], channels_last, rows)
    if std:
        rows = rows / per_element(std, rows.shape[1], channels_last, rows)
    y = rows @ flat.t()
    if bias is not None:
        y = y + bias.double()
    if position is not None:
        y = y + repeat_position(position.double(), y.shape[0])
    return y.to(weight.dtype)
