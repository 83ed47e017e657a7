"""One native pass from pixels to patch vectors (convert, normalise, round, reorder), then a packed oneDNN product.

A still image is a video of one frame that its temporal patch repeats: every frame's weights meet the same pixels. Their
sum meets them once, with half the work in the product. That is done where the product is in float32 (a sum of two
float32 weights loses less than the product itself does); in a bfloat16 product the sum would have to be rounded, so it is not.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vlmops.backends import native
from vlmops.ops._shared.gemm_cpu import (
    HALF_ROWS,
    ROWS_HINT,
    SMALLEST,
    chunks,
    finish,
    gemm,
    product,
    why_not_gemm,
    widened,
)
from vlmops.ops._shared.packing import STORE
from vlmops.ops.patchify.layout import gradients, patch_vectors, repeat_position

native.define(
    "patch_rows(Tensor images, Tensor? sizes, int channels, float[] mean, float[] std, int patch_size, "
    "int temporal_patch_size, bool merge, bool channels_last, int first, int last, ScalarType dtype) -> Tensor"
)
native.define(
    "normalise_rows(Tensor images, int channels, float[] mean, float[] std, bool channels_last, int first, int last, "
    "ScalarType dtype) -> Tensor"
)
_PIXELS = (torch.uint8, torch.float32, torch.bfloat16, torch.float16)


def supports(
    images: Tensor, sizes: Tensor | None, weight: Tensor, bias: Tensor | None, position: Tensor | None,
    mean: list[float], std: list[float], patch_size: int, temporal_patch_size: int, order: str, channels_last: bool,
    tokens: int, inference: bool,
) -> str | None:  # fmt: skip
    """Why this backend cannot run these arguments; None if it can."""
    if images.numel() == 0:
        return "no pixels"
    if _plain(images, mean, std):
        return (
            why_not_gemm(weight.flatten(1), weight) if inference else "a gradient is wanted (packed weights have none)"
        )
    if images.dtype not in _PIXELS:
        return f"{str(images.dtype)[6:]} pixels"
    reason = why_not_gemm(weight.flatten(1), weight)
    return reason or (None if native.available() else native.reason())


def _plain(images: Tensor, mean: list[float], std: list[float]) -> bool:
    """Patch vectors that go into the product as they are."""
    return images.dim() == 2 and images.dtype != torch.uint8 and not mean and not std


def _rows(
    images: Tensor, sizes: Tensor | None, weight: Tensor, mean: list[float], std: list[float], patch: int, frames: int,
    order: str, channels_last: bool, *, dtype: torch.dtype | None = None, first: int = 0, last: int = -1,
    channels: int | None = None,
) -> Tensor:  # fmt: skip
    """Patch vectors first..last, in one native pass."""
    if channels is None:
        channels = math.prod(weight.shape[1:]) // (frames * patch * patch)
    dtype = dtype or weight.dtype
    if images.dim() == 2:
        return torch.ops.vlmops_cpu.normalise_rows.default(
            images, channels, mean, std, channels_last, first, last, dtype
        )
    return torch.ops.vlmops_cpu.patch_rows.default(
        images, sizes, channels, mean, std, patch, frames, order == "merge2x2", channels_last, first, last, dtype
    )


def _folded(weight: Tensor, frames: int, channels: int, channels_last: bool) -> Tensor:
    """float32 [E, K / frames]: the frames' weights added up."""
    wide = weight.detach().float()
    if channels_last:
        return wide.reshape(wide.shape[0], frames, -1).sum(1)
    return wide.reshape(wide.shape[0], channels, frames, -1).sum(2).flatten(1)


def _still_product(rows: Tensor, weight: Tensor, bias: Tensor | None, frames: int, channels: int, channels_last: bool):
    """rows (folded W)^T + bias in float32; the folded weight is kept packed under the same rules as any other."""

    def fold(w: Tensor) -> Tensor:
        return _folded(w, frames, channels, channels_last)

    packed = STORE.get(
        weight,
        ("onednn folded", frames, channels, channels_last),
        lambda w: torch.ops.mkldnn._reorder_linear_weight(fold(w), ROWS_HINT),
    )
    packed = fold(weight) if packed is None else packed
    bias = None if bias is None else bias.float()
    return torch.ops.mkldnn._linear_pointwise.default(rows, packed, bias, "none", [], "")


def _still(images: Tensor, sizes: Tensor | None, weight: Tensor, frames: int) -> bool:
    """Whether every image is one frame of a patch of several, and folding is exact enough and worth it."""
    if frames == 1 or images.dim() == 2 or not (weight.dtype == torch.float32 or widened(weight.dtype)):
        return False
    if math.prod(weight.shape[1:]) < SMALLEST * frames:
        return False
    return images.shape[1] == 1 if sizes is None else bool((sizes[:, 0] == 1).all())


def _add_position(y: Tensor, position: Tensor) -> None:
    """y += position, image by image where it is the table of one."""
    each = position.shape[0]
    if each < 64:  # a call for each would cost more than one repeated table
        finish(y, y, residual=repeat_position(position, y.shape[0]))
        return
    for begin in range(0, y.shape[0], each):
        part = y[begin : begin + each]
        finish(part, part, residual=position)


def forward(
    images: Tensor, sizes: Tensor | None, weight: Tensor, bias: Tensor | None, position: Tensor | None,
    mean: list[float], std: list[float], patch_size: int, temporal_patch_size: int, order: str, channels_last: bool,
    tokens: int, inference: bool,
) -> Tensor:  # fmt: skip
    """tokens [T, E] in weight's dtype."""
    if not inference:  # training: the native pass over the pixels, torch's own product
        rows = _rows(images, sizes, weight, mean, std, patch_size, temporal_patch_size, order, channels_last)
        y = F.linear(rows, weight.flatten(1), bias)
        return y if position is None else y.add_(repeat_position(position, y.shape[0]))
    if _plain(images, mean, std):
        y = gemm(images.to(weight.dtype).contiguous(), weight, bias)
        if position is not None:
            _add_position(y, position)
        return y
    channels = math.prod(weight.shape[1:]) // (temporal_patch_size * patch_size * patch_size)
    still = _still(images, sizes, weight, temporal_patch_size)
    frames = 1 if still else temporal_patch_size

    def project(first: int, last: int) -> Tensor:
        dtype = torch.float32 if widened(weight.dtype) else weight.dtype
        rows = _rows(
            images, sizes, weight, mean, std, patch_size, frames, order, channels_last, dtype=dtype, first=first,
            last=last, channels=channels,
        )  # fmt: skip
        if still:
            return _still_product(rows, weight, bias, temporal_patch_size, channels, channels_last)
        return product(rows, weight, bias)

    if not widened(weight.dtype):
        y = project(0, tokens)
        if position is not None:
            _add_position(y, position)
        return y
    residual = None if position is None else repeat_position(position, tokens)
    out = weight.new_empty(tokens, weight.shape[0])
    for first, last in chunks(tokens, HALF_ROWS):  # pixels and products in float32, rounded once
        finish(project(first, last), out[first:last], residual=None if residual is None else residual[first:last])
    return out


def backward(
    grads: Sequence[Tensor | None], outs: Sequence[Tensor], args: Sequence[Any], needs: Sequence[bool]
) -> list[Tensor | None]:
    """Gradients of images, weight, bias, position; the patch vectors in one native pass where no pixel needs one."""
    images, sizes, weight, _, position, *options, _, _ = args
    (grad,) = grads
    assert grad is not None
    vectors = patch_vectors if needs[0] else _rows
    return gradients(grad, images, weight, position, needs, lambda x: vectors(x, sizes, weight, *options))
