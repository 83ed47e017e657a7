"""CUDA C++: pixels are read in place by the product that needs them; no patch vector is ever written.

Forward only (csrc/cuda/patchify.cu); the gradients are those of the ``torch`` backend.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vlmops.backends import cuda_runtime
from vlmops.backends.cuda_plan import MAX_VECTOR
from vlmops.backends.cuda_runtime import CTYPE, Out, Plan, f32, i32, i64, vector
from vlmops.ops._shared.strides import dense_rows
from vlmops.ops.linear.cuda import FLOAT_THREADS, FLOAT_TILE, MOST, STAGES, Tile
from vlmops.ops.patchify.triton_layout import on_device

PIXEL = {**CTYPE, torch.uint8: "uint8_t"}
IN_REGISTERS = 4  # channels whose statistics are kernel arguments
CHUNK = 8  # most pixels of an access: as many as a chunk of shared memory has
WIDE, MIDDLE, SMALL = Tile(64, 256, 32, 32, 64), Tile(64, 128, 32, 32, 64), Tile(64, 64, 32, 32, 32)
MOST_PADDING = 1.1  # columns of a tile over those that are needed


def supports(
    images: Tensor, sizes: Tensor | None, weight: Tensor, bias: Tensor | None, position: Tensor | None,
    mean: list[float], std: list[float], patch_size: int, temporal_patch_size: int, order: str, channels_last: bool,
    tokens: int, inference: bool,
) -> str | None:  # fmt: skip
    """Why these kernels cannot run these arguments; None if they can."""
    e, k = weight.shape[0], math.prod(weight.shape[1:])
    if max(tokens, e, k) > MOST:
        return f"a product of {tokens} x {k} by {e} x {k} (each at most {MOST})"
    return cuda_runtime.why_not(weight) or cuda_runtime.why_not(images, tuple(PIXEL))


def forward(
    images: Tensor, sizes: Tensor | None, weight: Tensor, bias: Tensor | None, position: Tensor | None,
    mean: list[float], std: list[float], patch_size: int, temporal_patch_size: int, order: str, channels_last: bool,
    tokens: int, inference: bool,
) -> Tensor:  # fmt: skip
    """tokens [T, E] in weight's dtype."""
    out = weight.new_empty(tokens, weight.shape[0])
    if out.numel():
        options = (patch_size, temporal_patch_size, order, channels_last)
        cuda_runtime.run([forward_plan(images, sizes, weight, bias, position, mean, std, options, out)])
    return out


def tile_of(m: int, n: int, processors: int) -> Tile:
    """The tile for [m, n]: as wide as leaves every SM two blocks, because each tile of columns gathers the pixels again."""
    for tile in (WIDE, MIDDLE):
        if tile.tiles(m, n) >= 2 * processors and -(-n // tile.bn) * tile.bn <= MOST_PADDING * n:
            return tile
    return SMALL


@dataclass
class Patches:
    """Images as the kernels read them.

    Args:
        form: "rows", "stack" or "buffer" (csrc/cuda/tile/pixels.cuh).
        line: a line of a patch is one run in memory and in the patch vector, channels and all.
        wide: elements of an access to pixels.
        table: int64 [n, 6] of a buffer: first token, first element, T, patches down, patches across, (T, H, W, C) in memory.
        steps: elements between two images, frames, channels, lines, columns.
        counts: images, patches of an image, of a frame, of a line, frames of an image.
    """

    form: str
    line: bool
    wide: int
    table: Tensor | None
    steps: tuple[int, int, int, int, int]
    counts: tuple[int, int, int, int, int]


def patches_of(
    images: Tensor, sizes: Tensor | None, channels: int, patch: int, frames: int, channels_last: bool, by_channel: bool
) -> Patches:
    """Where the patches of [N, K], [n, T, C, H, W] or, with ``sizes``, a [pixels] buffer are.

    Args:
        by_channel: pixels that are read together must be of one channel, unless channels run first.
    """
    size = images.element_size()
    most = math.gcd(min(CHUNK, MAX_VECTOR // size), images.data_ptr() // size)
    if sizes is not None:
        return _buffer(images, sizes, channels, patch, frames, channels_last, most)
    steps = [0 if n == 1 else s for n, s in zip(images.shape, images.stride(), strict=True)]
    if images.dim() == 2:
        row, column = steps
        run = images.shape[1] // channels if by_channel and not channels_last else images.shape[1]
        wide = math.gcd(most, row, run) if column == 1 else 1
        return Patches("rows", False, wide, None, (row, 0, 0, 0, column), (1, 1, 1, 1, 1))
    n, t, _, h, w = images.shape
    image, frame, channel, line, column = steps
    in_line = channels_last and column == channels and (channels == 1 or channel == 1)
    if in_line:
        wide = math.gcd(most, patch * channels, image, frame, line)
    else:
        wide = math.gcd(most, patch, image, frame, channel, line) if column == 1 and not channels_last else 1
    cells = (h // patch) * (w // patch)
    counts = (n, -(-t // frames) * cells, cells, w // patch, t)
    return Patches("stack", in_line, wide, None, (image, frame, channel, line, column), counts)


def _buffer(
    images: Tensor, sizes: Tensor, channels: int, patch: int, frames: int, channels_last: bool, most: int
) -> Patches:
    rows, token, pixel = [], 0, 0
    known: list[list[int]] = sizes.tolist()  # on the CPU
    for t, h, w, interleaved in known:
        rows.append((token, pixel, t, h // patch, w // patch, interleaved))
        token += -(-t // frames) * (h // patch) * (w // patch)
        pixel += t * channels * h * w
    ways = {interleaved for *_, interleaved in known} if channels > 1 else {0}
    line = channels_last and (channels == 1 or ways == {1})
    run = patch * channels if line else patch if ways == {0} and not channels_last else 1  # that lies together
    wide = math.gcd(most, run)
    table = on_device(tuple(rows), torch.int64, images.device)
    return Patches("buffer", line, wide, table, (0, 0, 0, 0, 0), (len(rows), 1, 1, 1, 1))


def _statistics(
    mean: Sequence[float], std: Sequence[float], channels: int, raw: bool, device: torch.device
) -> tuple[Tensor | None, list[float], list[float]]:
    """What a pixel is less by and multiplied with, per channel: of many channels float32 [C, 2]; of few two lists of four."""
    unit = 255.0 if raw else 1.0
    shift = [m * unit for m in mean] or [0.0] * channels
    scale = [1.0 / (s * unit) for s in std] or [1.0 / unit] * channels
    pairs = None
    if channels > IN_REGISTERS:
        pairs = on_device(tuple(zip(shift, scale, strict=True)), torch.float32, device)
    return pairs, [*shift, *[0.0] * 4][:4], [*scale, *[0.0] * 4][:4]


def forward_plan(
    images: Tensor, sizes: Tensor | None, weight: Tensor, bias: Tensor | None, position: Tensor | None,
    mean: Sequence[float], std: Sequence[float], options: tuple[int, int, str, bool], out: Tensor,
) -> Plan:  # fmt: skip
    """The launch; ``out`` [T, E] has elements. A weight whose rows are not dense is copied."""
    patch, frames, order, channels_last = options
    (tokens, e), k = out.shape, math.prod(weight.shape[1:])
    channels = k // (frames * patch * patch)
    raw = images.dtype == torch.uint8
    normalise = raw or bool(mean) or bool(std)
    p = patches_of(images, sizes, channels, patch, frames, channels_last, normalise)
    pairs, shift, scale = (
        _statistics(mean, std, channels, raw, weight.device) if normalise else (None, [0.0] * 4, [0.0] * 4)
    )
    flat = weight.flatten(1)
    flat = flat if flat.stride(1) == 1 or k == 1 else flat.contiguous()
    bias = None if bias is None else bias.contiguous()
    position = None if position is None else dense_rows(position)
    each, p_stride = (1, 0) if position is None else (position.shape[0], position.stride(0))
    if position is not None and each == 1:
        p_stride = 0
    defines: tuple[tuple[str, Any], ...] = (
        ("T", CTYPE[weight.dtype]), ("PIXEL", PIXEL[images.dtype]), ("FORM", p.form), ("C", channels), ("F", frames),
        ("P", patch), ("MERGE", order == "merge2x2"), ("LAST", channels_last), ("LINE", p.line), ("WIDE", p.wide),
        ("NORM", normalise), ("VEC", vector([flat], [k])), ("OUT", vector([out, bias, position], [e])),
    )  # fmt: skip
    args = (
        images, p.table, pairs, flat, bias, position, Out(out), *map(i64, p.steps), i64(flat.stride(0) if e > 1 else 0),
        i64(p_stride), i32(tokens), i32(e), *map(i32, p.counts), i32(each), *map(f32, shift), *map(f32, scale),
    )  # fmt: skip
    if weight.dtype == torch.float32:
        grid = (-(-tokens // FLOAT_TILE) * -(-e // FLOAT_TILE), 1, 1)
        return Plan("patchify.cu", "patchify_gemm_float", defines, grid, FLOAT_THREADS, args)
    tile = tile_of(tokens, e, cuda_runtime.processors(weight))
    defines += (
        ("BM", tile.bm), ("BN", tile.bn), ("BK", tile.bk), ("WM", tile.wm), ("WN", tile.wn), ("STAGES", STAGES)
    )  # fmt: skip
    grid = (tile.tiles(tokens, e), 1, 1)
    return Plan("patchify.cu", "patchify_gemm", defines, grid, tile.threads, args, shared=tile.shared)
