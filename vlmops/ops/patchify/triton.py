"""Triton: pixels are read in place by the product that needs them, forward and backward; no patch vector is ever written."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vlmops.backends import triton_runtime
from vlmops.backends.triton_runtime import Config
from vlmops.ops._shared.strides import dense_rows
from vlmops.ops._shared.triton_math import cdiv, next_power_of_two
from vlmops.ops.patchify.triton_kernels import (
    patchify_forward_kernel,
    patchify_images_kernel,
    patchify_weight_kernel,
    sum_rows_kernel,
)
from vlmops.ops.patchify.triton_layout import Pixels, pixels_of, statistics, weight_rows


def supports(
    images: Tensor, sizes: Tensor | None, weight: Tensor, bias: Tensor | None, position: Tensor | None,
    mean: list[float], std: list[float], patch_size: int, temporal_patch_size: int, order: str, channels_last: bool,
    tokens: int, inference: bool,
) -> str | None:  # fmt: skip
    """Why these kernels cannot run these arguments; None if they can."""
    reason = triton_runtime.why_not(weight)
    if reason is None and images.dtype != torch.uint8:
        reason = triton_runtime.why_not(images)
    return reason


def _pixels(images: Tensor, sizes: Tensor | None, weight: Tensor, options: Sequence[Any]) -> Pixels:
    patch, frames, order, channels_last = options
    channels = math.prod(weight.shape[1:]) // (frames * patch * patch)
    return pixels_of(images, sizes, channels, patch, frames, order, channels_last, weight.device)


def _block_k(width: int, most: int) -> int:
    """Largest step through a patch vector that pads it by no more than 15%."""
    return next((b for b in (64, 32) if b <= most and cdiv(width, b) * b <= 1.15 * width), 16)


def _key(images: Tensor, weight: Tensor, p: Pixels, tokens: int) -> str:
    """What the kernels' speed depends on."""
    shape = " ".join(str(p.meta[name]) for name in ("C", "F", "P", "FORM", "LAST", "LINE", "UNIT"))
    return f"{images.dtype} {weight.dtype} {weight.shape[0]} {shape} {p.still} {tokens.bit_length()}"


def _tiles(
    tiles: Sequence[tuple[int, int, int, int]], x: Tensor, rows: int, columns: int
) -> list[tuple[int, int, int, int]]:
    """(rows, columns, warps, stages), no larger than the matrix; full waves of programs before idle processors."""
    processors = triton_runtime.processors(x)
    ordered = sorted(tiles, key=lambda t: cdiv(rows, t[0]) * cdiv(columns, t[1]) < processors)  # stable
    most = [max(16, next_power_of_two(n)) for n in (rows, columns)]
    return list(
        dict.fromkeys((min(a, most[0]), min(b, most[1]), w if min(a, most[0]) > 32 else 4, s) for a, b, w, s in ordered)
    )


def forward(
    images: Tensor, sizes: Tensor | None, weight: Tensor, bias: Tensor | None, position: Tensor | None,
    mean: list[float], std: list[float], patch_size: int, temporal_patch_size: int, order: str, channels_last: bool,
    tokens: int, inference: bool,
) -> Tensor:  # fmt: skip
    """tokens [T, E] in weight's dtype."""
    e = weight.shape[0]
    out = weight.new_empty(tokens, e)
    if out.numel() == 0:
        return out
    p = _pixels(images, sizes, weight, (patch_size, temporal_patch_size, order, channels_last))
    w = weight_rows(weight, p, patch_size, temporal_patch_size)
    raw = images.dtype == torch.uint8
    normalise = raw or bool(mean) or bool(std)
    stats = statistics(mean, std, p.meta["C"], raw, weight.device) if normalise else out
    bias = None if bias is None else bias.contiguous()
    position = None if position is None else dense_rows(position)
    each, p_stride = (1, 0) if position is None else (position.shape[0], position.stride(0))

    def run(config: Config) -> None:
        triton_runtime.launch(
            patchify_forward_kernel, (cdiv(tokens, config["BM"]) * cdiv(e, config["BN"]),), images, p.table, stats, w.weight,
            out if bias is None else bias, out if position is None else position, out, tokens, e, *p.numbers, *w.strides, each,
            p_stride, STILL=p.still, NORMALISE=normalise, DENSE=w.dense, W_UNIT=w.unit, HAS_BIAS=bias is not None,
            HAS_POSITION=position is not None, config=config, **p.meta,
        )  # fmt: skip

    wide, hip = weight.element_size() == 4, triton_runtime.target(weight).backend == "hip"
    if wide:
        tiles = [(64, 32, 4, 2), (64, 64, 8, 2)]
    elif p.meta["FORM"] == "rows":
        tiles = [(128, 64, 4, 2), (64, 64, 4, 2), (128, 128, 8, 2)]
    else:  # addresses and bytes on their way to the product take registers
        tiles = [(64, 64, 4, 2), (64, 128, 8, 2), (128, 64, 8, 2)]
    bk = _block_k(p.width, 32 if wide or hip else 64)
    configs = [
        Config.of(BM=bm, BN=bn, BK=bk, GROUP=8, warps=warps, stages=stages)
        for bm, bn, warps, stages in _tiles(tiles, weight, tokens, e)
    ]
    run(triton_runtime.pick("patchify", _key(images, weight, p, tokens), configs, run, weight.device))
    return out


def backward(
    grads: Sequence[Tensor | None], outs: Sequence[Tensor], args: Sequence[Any], needs: Sequence[bool]
) -> list[Tensor | None]:
    """Gradients of images, weight, bias, position: sums in a fixed order, no atomics."""
    images, sizes, weight, _, position, mean, std, *options, tokens, _ = args
    (grad,) = grads
    if grad is None or tokens == 0 or weight.shape[0] == 0:
        return [None] * 4
    grad = dense_rows(grad)
    found: list[Tensor | None] = [None] * 4
    if needs[0]:
        found[0] = _images_gradient(grad, images, sizes, weight, std, options)
    if needs[1]:
        found[1] = _weight_gradient(grad, images, sizes, weight, mean, std, options)
    if needs[2]:
        found[2] = _sum_rows(grad, weight.dtype)
    if needs[3] and position is not None:
        each, width = position.shape
        if each == tokens:
            found[3] = grad.clone(memory_format=torch.contiguous_format)  # an op never returns its argument
        else:
            copies = grad.contiguous().view(tokens // each, each * width)
            found[3] = _sum_rows(copies, position.dtype).view(each, width)
    return found


def _images_gradient(
    grad: Tensor, images: Tensor, sizes: Tensor | None, weight: Tensor, std: Sequence[float], options: Sequence[Any]
) -> Tensor:
    """Contiguous, in the images' shape and dtype."""
    (tokens, e), patch, frames = grad.shape, options[0], options[1]
    out = images.new_empty(images.shape)
    p = _pixels(out, sizes, weight, options)
    w = weight_rows(weight, p, patch, frames)
    stats = statistics([], std, p.meta["C"], False, weight.device) if std else out
    unit = math.gcd(16, grad.stride(0))

    def run(config: Config) -> None:
        programs = cdiv(tokens, config["BM"]) * cdiv(p.width, config["BK"])
        triton_runtime.launch(
            patchify_images_kernel, (programs,), grad, p.table, stats, w.weight, out, tokens, e, grad.stride(0) // unit,
            *p.numbers, *w.strides, STILL=p.still, SCALED=bool(std), DENSE=w.dense, W_UNIT=w.unit, G_UNIT=unit, config=config,
            **p.meta,
        )  # fmt: skip

    wide = weight.element_size() == 4
    tiles = [(64, 32, 4, 2), (32, 32, 4, 2)] if wide else [(64, 64, 8, 2), (128, 64, 8, 2)]
    be = min(32 if wide else 64, max(16, next_power_of_two(e)))
    configs = [
        Config.of(BM=bm, BK=min(bk, _block_k(p.width, bk)), BE=be, warps=warps, stages=stages)
        for bm, bk, warps, stages in _tiles(tiles, weight, tokens, p.width)
    ]
    run(triton_runtime.pick("patchify_images", _key(images, weight, p, tokens), configs, run, weight.device))
    return out


def _weight_gradient(
    grad: Tensor, images: Tensor, sizes: Tensor | None, weight: Tensor, mean: Sequence[float], std: Sequence[float],
    options: Sequence[Any],
) -> Tensor:  # fmt: skip
    """Contiguous, in the weight's shape and dtype: float32 sums of parts of the tokens, then the sum of the parts."""
    tokens, e = grad.shape
    p = _pixels(images, sizes, weight, options)
    raw = images.dtype == torch.uint8
    normalise = raw or bool(mean) or bool(std)
    stats = statistics(mean, std, p.meta["C"], raw, weight.device) if normalise else grad
    unit = math.gcd(16, grad.stride(0))

    def run(config: Config) -> Tensor:
        be, bk, br = config["BE"], config["BK"], config["BR"]
        tiles = cdiv(e, be) * cdiv(p.width, bk) * (1 if p.still else p.meta["F"])
        parts = max(1, min(cdiv(tokens, 8 * br), cdiv(2 * triton_runtime.processors(weight), tiles)))
        chunk = cdiv(cdiv(tokens, parts), br) * br
        parts = cdiv(tokens, chunk)
        out = weight.new_empty(parts, weight.numel(), dtype=torch.float32 if parts > 1 else weight.dtype)
        triton_runtime.launch(
            patchify_weight_kernel, (tiles, parts), grad, images, p.table, stats, out, tokens, e, chunk,
            grad.stride(0) // unit, *p.numbers, STILL=p.still, NORMALISE=normalise, G_UNIT=unit, config=config, **p.meta,
        )  # fmt: skip
        return out

    wide = weight.element_size() == 4
    tiles = [(64, 32, 4, 2), (32, 32, 4, 2)] if wide else [(64, 64, 4, 2), (128, 64, 8, 2)]
    br = min(16 if wide else 64, max(16, next_power_of_two(tokens)))
    configs = [
        Config.of(BE=be, BK=min(bk, _block_k(p.width, bk)), BR=br, warps=warps, stages=stages)
        for be, bk, warps, stages in _tiles(tiles, weight, e, p.width)
    ]
    key = _key(images, weight, p, tokens)
    out = run(triton_runtime.pick("patchify_weight", key, configs, run, weight.device))
    return (out if out.shape[0] == 1 else _sum_rows(out, weight.dtype)).view(weight.shape)


def _sum_rows(x: Tensor, dtype: torch.dtype) -> Tensor:
    """[C]: x [rows, C] summed over rows in float32; many rows as parts first, so that every processor has some."""
    rows, width = x.shape
    bc = min(256, max(16, next_power_of_two(width)))
    br = 16
    parts = max(1, min(cdiv(rows, 8 * br), cdiv(2 * triton_runtime.processors(x), cdiv(width, bc))))
    chunk = cdiv(cdiv(rows, parts), br) * br
    parts = cdiv(rows, chunk)
    out = x.new_empty(parts, width, dtype=dtype if parts == 1 else torch.float32)
    triton_runtime.launch(
        sum_rows_kernel, (cdiv(width, bc), parts), x, out, rows, width, x.stride(0), chunk, BR=br, BC=bc, warps=4
    )
    return out[0] if parts == 1 else _sum_rows(out, dtype)
