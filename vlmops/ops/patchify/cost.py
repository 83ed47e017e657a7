"""Least traffic and FLOPs of patchify: pixels, weight and tokens once, or once for every pass of a tile over them."""

from __future__ import annotations

import math

from torch import Tensor

from vlmops.ops._shared.cost import Cost, nbytes

__all__ = ["cost", "images_cost", "weight_cost"]


def _pass(size: int, block: int | None) -> int:
    return 1 if block is None else -(-size // block)


def cost(
    images: Tensor, sizes: Tensor | None, weight: Tensor, bias: Tensor | None, position: Tensor | None,
    mean: list[float], std: list[float], patch_size: int, temporal_patch_size: int, order: str, channels_last: bool,
    tokens: int, inference: bool, *, block_m: int | None = None, block_n: int | None = None,
) -> Cost:  # fmt: skip
    """Of the forward.

    Args:
        block_m, block_n: tokens and columns of a tile: then the pixels count once for every tile of columns, the weight and
            the bias once for every tile of tokens (what they cost a kernel without a cache). None: everything once.
    """
    e, passes_m, passes_n = weight.shape[0], _pass(tokens, block_m), _pass(weight.shape[0], block_n)
    once = 0 if position is None else tokens * e * position.element_size() if block_m else nbytes(position)
    read = passes_n * nbytes(images) + passes_m * nbytes(weight, bias) + once
    return Cost(read, tokens * e * weight.element_size(), 2 * tokens * weight.numel())


def images_cost(
    images: Tensor, weight: Tensor, tokens: int, *, block_m: int | None = None, block_k: int | None = None
) -> Cost:
    """Of the images' gradient, in tiles of ``block_m`` tokens and ``block_k`` elements of one frame of a patch vector."""
    grad = tokens * weight.shape[0] * weight.element_size()
    width = images.numel() // max(1, tokens)
    read = _pass(width, block_k) * grad + _pass(tokens, block_m) * nbytes(weight)
    return Cost(read, nbytes(images), 2 * tokens * weight.numel())


def weight_cost(
    images: Tensor,
    weight: Tensor,
    tokens: int,
    *,
    block_e: int | None = None,
    block_k: int | None = None,
    parts: int = 1,
) -> Cost:
    """Of the weight's gradient, whose ``parts`` are written in float32, read and summed where they are several."""
    grad = tokens * weight.shape[0] * weight.element_size()
    k = math.prod(weight.shape[1:])
    read = _pass(k, block_k) * grad + _pass(weight.shape[0], block_e) * nbytes(images)
    again = parts * weight.numel() * 4 if parts > 1 else 0
    return Cost(read + again, nbytes(weight) + again, 2 * tokens * weight.numel())
