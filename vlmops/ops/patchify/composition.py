"""The best plain-PyTorch composition: normalise in the pixels' own layout, one copy into patch order, one product."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vlmops.ops.patchify.layout import cut, per_element, repeat_position


def forward(
    images: Tensor, weight: Tensor, bias: Tensor | None, position: Tensor | None, mean: list[float], std: list[float],
    patch_size: int, temporal_patch_size: int, order: str, channels_last: bool, inference: bool,
) -> Tensor:  # fmt: skip
    """tokens [T, E] in weight's dtype."""
    x = images
    if x.dtype == torch.uint8 or mean or std:  # float32 until it is normalised: bfloat16 pixels lose two bits
        wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
        raw = x.dtype == torch.uint8
        x = x.to(wide)
        channels = x.shape[2] if x.dim() == 5 else 0
        view = (1, 1, channels, 1, 1)
        if raw:
            x = x / 255
        if mean:
            m = torch.tensor(mean, dtype=wide, device=x.device)
            x = x - (m.view(view) if channels else per_element(mean, x.shape[1], channels_last, x))
        if std:
            s = torch.tensor(std, dtype=wide, device=x.device)
            x = x / (s.view(view) if channels else per_element(std, x.shape[1], channels_last, x))
    x = x.to(weight.dtype)
    rows = x if x.dim() == 2 else cut(x, patch_size, temporal_patch_size, order, channels_last)
    y = F.linear(rows, weight.flatten(1), bias)
    return y if position is None else y + repeat_position(position, y.shape[0])
