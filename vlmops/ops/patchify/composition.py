"""The best plain-PyTorch composition: normalise in the pixels' own layout, one copy into patch order, one product."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from vlmops.ops.patchify.layout import gradients, patch_vectors, repeat_position


def forward(
    images: Tensor, sizes: Tensor | None, weight: Tensor, bias: Tensor | None, position: Tensor | None,
    mean: list[float], std: list[float], patch_size: int, temporal_patch_size: int, order: str, channels_last: bool,
    tokens: int, inference: bool,
) -> Tensor:  # fmt: skip
    """tokens [T, E] in weight's dtype."""
    rows = patch_vectors(images, sizes, weight, mean, std, patch_size, temporal_patch_size, order, channels_last)
    y = F.linear(rows, weight.flatten(1), bias)
    return y if position is None else y + repeat_position(position, y.shape[0])


def backward(
    grads: Sequence[Tensor | None], outs: Sequence[Tensor], args: Sequence[Any], needs: Sequence[bool]
) -> list[Tensor | None]:
    """Gradients of images, weight, bias, position."""
    images, sizes, weight, _, position, *options, _, _ = args
    (grad,) = grads
    assert grad is not None
    return gradients(grad, images, weight, position, needs, lambda x: patch_vectors(x, sizes, weight, *options))
