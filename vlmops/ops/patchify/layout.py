"""Where the pixels of a patch vector come from, and the gradients: shared by the plain backends."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache

import torch
from torch import Tensor

__all__ = ["cut", "gradients", "patch_vectors", "per_element", "pictures", "repeat_position"]


def pictures(images: Tensor, sizes: Tensor | None, channels: int) -> list[Tensor]:
    """The images as [n, T, C, H, W] views: one of the whole stack, or one for each of a [pixels] buffer.

    Args:
        images: [n, T, C, H, W], or [pixels].
        sizes: int64 [n, 4] on the CPU for a buffer: T, H, W, and whether its memory runs (T, H, W, C).
    """
    if sizes is None:
        return [images]
    rows: list[list[int]] = sizes.tolist()
    parts = images.split([t * channels * h * w for t, h, w, _ in rows])
    return [
        part.view(1, t, h, w, channels).permute(0, 1, 4, 2, 3) if interleaved else part.view(1, t, channels, h, w)
        for part, (t, h, w, interleaved) in zip(parts, rows, strict=True)
    ]


def cut(x: Tensor, patch: int, frames: int, order: str, channels_last: bool) -> Tensor:
    """[n, T, C, H, W] -> patch vectors [tokens, C * frames * patch * patch]; the last frame fills up the last patch."""
    n, t, c, h, w = x.shape
    missing = -t % frames
    if missing:
        x = torch.cat([x, x[:, -1:].expand(-1, missing, -1, -1, -1)], dim=1)
    gt, gh, gw = (t + missing) // frames, h // patch, w // patch
    if order == "merge2x2":
        x = x.reshape(n, gt, frames, c, gh // 2, 2, patch, gw // 2, 2, patch)
        tokens: tuple[int, ...] = (0, 1, 4, 7, 5, 8)
        inner: tuple[int, ...] = (3, 2, 6, 9)
    else:
        x = x.reshape(n, gt, frames, c, gh, patch, gw, patch)
        tokens, inner = (0, 1, 4, 6), (3, 2, 5, 7)
    if channels_last:
        inner = (*inner[1:], inner[0])
    return x.permute(*tokens, *inner).reshape(n * gt * gh * gw, c * frames * patch * patch)


def repeat_position(position: Tensor, tokens: int) -> Tensor:
    """[tokens, E] from one image's table or from all tokens' own."""
    return position if position.shape[0] == tokens else position.repeat(tokens // max(1, position.shape[0]), 1)


def per_element(values: Sequence[float], k: int, channels_last: bool, like: Tensor) -> Tensor:
    """Per-channel values spread over a patch vector, [k]."""
    row = torch.tensor(values, dtype=like.dtype, device=like.device)
    return row.repeat(k // len(values)) if channels_last else row.repeat_interleave(k // len(values))


@lru_cache(maxsize=64)
def _constant(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """[C], kept: a copy to a GPU in every call would wait for it, and cannot be captured in a graph."""
    with torch.inference_mode(False):
        return torch.tensor(values, dtype=dtype, device=device)


def _normalise(
    x: Tensor, mean: Sequence[float], std: Sequence[float], channels_last: bool, wide: torch.dtype
) -> Tensor:
    """(x / 255 - mean) / std of [n, T, C, H, W] or of patch vectors [N, K], in two passes and in ``wide``."""
    raw = x.dtype == torch.uint8
    if not raw and not mean and not std:
        return x
    unit = 255.0 if raw else 1.0
    c = max(len(mean), len(std), 1)

    def spread(values: Sequence[float]) -> Tensor:
        row = _constant(tuple(v * unit for v in values), wide, x.device)
        if len(values) == 1:
            return row
        if x.dim() == 5:
            return row.view(c, 1, 1)
        times = x.shape[1] // c
        return row.repeat(times) if channels_last else row.repeat_interleave(times)

    if not mean:
        return x.to(wide) / (spread(std) if std else unit)
    y = x - spread(mean)  # converts on the way
    return y.div_(spread(std) if std else unit)


def patch_vectors(
    images: Tensor, sizes: Tensor | None, weight: Tensor, mean: Sequence[float], std: Sequence[float], patch: int,
    frames: int, order: str, channels_last: bool,
) -> Tensor:  # fmt: skip
    """Normalised patch vectors [T, K] in weight's dtype; differentiable in images.

    Normalised in float32 (float64 for a float64 weight) and rounded after that: bfloat16 holds no byte exactly.
    """
    wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
    if images.dim() == 2:
        return _normalise(images, mean, std, channels_last, wide).to(weight.dtype)
    k = math.prod(weight.shape[1:])
    channels = images.shape[2] if sizes is None else k // (frames * patch * patch)
    rows = [
        cut(_normalise(x, mean, std, channels_last, wide).to(weight.dtype), patch, frames, order, channels_last)
        for x in pictures(images, sizes, channels)
    ]
    if len(rows) == 1:
        return rows[0]
    return torch.cat(rows) if rows else images.new_empty(0, k, dtype=weight.dtype)


def gradients(
    grad: Tensor, images: Tensor, weight: Tensor, position: Tensor | None, needs: Sequence[bool],
    rows: Callable[[Tensor], Tensor],
) -> list[Tensor | None]:  # fmt: skip
    """Gradients of images, weight, bias, position from that of the tokens; the product is never computed again.

    Args:
        grad: [T, E].
        rows: patch vectors of images; differentiable where ``needs[0]``.
    """
    flat = weight.flatten(1)
    grad_images = vectors = None
    if needs[0]:
        with torch.enable_grad():
            pixels = images.detach().requires_grad_()
            vectors = rows(pixels)
        (grad_images,) = torch.autograd.grad(vectors, pixels, grad @ flat)
        vectors = vectors.detach()
    elif needs[1]:
        vectors = rows(images)
    grad_weight = None if vectors is None or not needs[1] else (grad.t() @ vectors).view(weight.shape)
    grad_position = None
    if needs[3] and position is not None:
        copies = grad.view(-1, *position.shape) if position.numel() else grad.new_zeros(1, *position.shape)
        grad_position = copies.sum(0) if copies.shape[0] != 1 else copies[0].clone()  # an op never returns its argument
    return [grad_images, grad_weight, grad.sum(0) if needs[2] else None, grad_position]
