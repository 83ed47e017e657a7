"""Host side of reading pixels in place: strides, grids and small tables as the kernels take them. Nothing waits for a GPU."""

from __future__ import annotations

import math
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["Pixels", "WeightRows", "on_device", "pixels_of", "statistics", "weight_rows"]

MAX_STILL = 8  # frames up to which a still picture's weights are unrolled in the kernel
MAX_TABLES = 256
_LOCK = threading.Lock()
_TABLES: OrderedDict[Any, dict[int, Tensor]] = OrderedDict()
_CAPTURED: list[tuple[Tensor, ...]] = []


def cdiv(a: int, b: int) -> int:
    """ceil(a / b); triton_math's own needs Triton, and the CUDA kernels' tables come from here too."""
    return -(-a // b)


def _upload(rows: Sequence[Any], dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """The rows in pinned memory and, once the copy that is queued has run, on the device."""
    host = torch.tensor(rows, dtype=dtype, pin_memory=True)
    return host.to(device, non_blocking=True), host


def on_device(rows: tuple[Any, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A small table on the device without waiting for it; kept, one for each stream, as its copy is ordered on that alone.

    A CUDA graph reads its table at every replay: what a capture used stays for good.
    """
    if device.type == "cpu":
        return torch.tensor(rows, dtype=dtype)
    if device.type == "meta":
        return torch.empty(len(rows), dtype=dtype, device=device)
    key, capturing = (rows, dtype, device), torch.cuda.is_current_stream_capturing()
    stream = torch.cuda.current_stream(device).cuda_stream
    with _LOCK:
        tables = _TABLES.setdefault(key, {})
        _TABLES.move_to_end(key)
        if capturing:  # any stream's table will do: all work was finished before
            kept = (next(iter(tables.values())),) if tables else _upload(rows, dtype, device)
            _CAPTURED.append(kept)
            return kept[0]
        if stream not in tables:
            tables[stream] = _upload(rows, dtype, device)[0]
        if len(_TABLES) > MAX_TABLES:
            _TABLES.popitem(last=False)
        return tables[stream]


def statistics(mean: Sequence[float], std: Sequence[float], channels: int, raw: bool, device: torch.device) -> Tensor:
    """float32 [2, C]: what is subtracted from a pixel and what the rest is multiplied by; bytes are divided by 255."""
    unit = 255.0 if raw else 1.0
    shift = tuple(m * unit for m in mean) or (0.0,) * channels
    scale = tuple(1.0 / (s * unit) for s in std) or (1.0 / unit,) * channels
    return on_device((shift, scale), torch.float32, device)


@dataclass
class Pixels:
    """Images as the kernels read them.

    Args:
        table: [n, 6] of a buffer (triton_pixels.py), else anything.
        numbers: images, bits of the search, patches of an image, of a frame, of a line, T, strides of image, frame, channel,
            line, pixel.
        meta: the constexpr arguments of addressing.
        still: all frames of every patch are one picture.
    """

    table: Tensor
    numbers: tuple[int, ...]
    meta: dict[str, Any]
    still: bool

    @property
    def width(self) -> int:
        """Elements of one frame of a patch vector."""
        return self.meta["C"] * self.meta["AREA"]


def pixels_of(
    images: Tensor, sizes: Tensor | None, channels: int, patch: int, frames: int, order: str, channels_last: bool,
    device: torch.device,
) -> Pixels:  # fmt: skip
    """Where the pixels of [N, K], [n, T, C, H, W] or, with ``sizes``, a [pixels] buffer are."""
    even = math.gcd(16, patch)  # more neighbours than this never lie in one line of a patch at a known distance
    meta: dict[str, Any] = dict(
        C=channels, F=frames, AREA=patch * patch, P=patch, FORM="stack", MERGE=order == "merge2x2", LAST=channels_last,
        LINE=False, UNIT=1, C_UNIT=1,
    )  # fmt: skip
    if images.dim() == 2:
        steps = [0 if n == 1 else s for n, s in zip(images.shape, images.stride(), strict=True)]
        unit = math.gcd(16, steps[0])
        meta |= dict(F=1, AREA=frames * patch * patch, FORM="rows", MERGE=False, UNIT=unit)
        return Pixels(images, (0, 0, 1, 1, 1, 1, steps[0] // unit, 0, 0, 0, steps[1]), meta, False)
    if sizes is not None:
        return _buffer(sizes, meta, patch, frames, device)
    n, t, c, h, w = images.shape
    image, frame, channel, line, pixel = (
        0 if n == 1 else s for n, s in zip(images.shape, images.stride(), strict=True)
    )
    meta["LINE"] = channels_last and pixel == c and (c == 1 or channel == 1)
    if pixel == 1 or meta["LINE"]:
        meta["UNIT"] = math.gcd(even, image, frame, line)
        meta["C_UNIT"] = 1 if meta["LINE"] else math.gcd(even, channel)
    unit, cells = meta["UNIT"], (h // patch) * (w // patch)
    strides = (image // unit, frame // unit, channel // meta["C_UNIT"], line // unit, pixel)
    numbers = (n, 0, cdiv(t, frames) * cells, cells, w // patch, t, *strides)
    return Pixels(images, numbers, meta, t == 1 and 1 < frames <= MAX_STILL)


def _buffer(sizes: Tensor, meta: dict[str, Any], patch: int, frames: int, device: torch.device) -> Pixels:
    rows, first, pixel, largest = [], 0, 0, 0
    known: list[list[int]] = sizes.tolist()
    for t, h, w, interleaved in known:
        rows.append((first, pixel // (patch * patch), t, h // patch, w // patch, interleaved))
        first += cdiv(t, frames) * (h // patch) * (w // patch)
        extent = t * meta["C"] * h * w
        pixel, largest = pixel + extent, max(largest, extent)
    ways = {interleaved for *_, interleaved in known}
    meta["FORM"] = "mixed" if len(ways) > 1 else "interleaved" if 1 in ways else "planar"
    meta["LINE"] = meta["LAST"] and (meta["FORM"] == "interleaved" or meta["C"] == 1)
    wide = max(largest, pixel // (patch * patch)) >= 1 << 31
    table = on_device(tuple(rows), torch.int64 if wide else torch.int32, device)
    still = 1 < frames <= MAX_STILL and all(t == 1 for t, *_ in known)
    return Pixels(table, (len(rows), len(rows).bit_length(), 1, 1, 1, 1, 0, 0, 0, 0, 0), meta, still)


@dataclass
class WeightRows:
    """A weight [E, K] in place: the strides of row, channel, frame and pixel of its rows, the row's in units."""

    weight: Tensor
    strides: tuple[int, int, int, int]
    dense: bool
    unit: int


def weight_rows(weight: Tensor, pixels: Pixels, patch: int, frames: int) -> WeightRows:
    """Strides of a weight of any of the three forms; copied only where a frame of a patch has no single pixel stride."""
    c, area, last = pixels.meta["C"], patch * patch, pixels.meta["LAST"]
    merged = pixels.meta["F"] != frames  # flattened rows: all frames are one area
    if weight.dim() == 2:
        one = weight.stride(1)
        channel, frame, pixel = (one, area * c * one, c * one) if last else (frames * area * one, area * one, one)
    else:
        channel, line, pixel = weight.stride(1), *weight.stride()[-2:]
        frame = weight.stride(2) if weight.dim() == 5 else 0
        if (patch > 1 and line != patch * pixel) or (merged and area > 1 and frame != area * pixel):
            return weight_rows(weight.flatten(1).contiguous(), pixels, patch, frames)
        if merged and area == 1:
            pixel = frame
    area, frames = (frames * area, 1) if merged else (area, frames)
    if last:
        want = (1, c * area, c)
    else:
        want = (frames * area, area, 1)
    trivial = (c == 1, frames == 1, area == 1)
    dense = all(t or have == w for t, have, w in zip(trivial, (channel, frame, pixel), want, strict=True))
    row = weight.stride(0) if weight.shape[0] > 1 else 0
    unit = math.gcd(16, row) if dense else 1
    return WeightRows(weight, (row // unit, *((0, 0, 0) if dense else (channel, frame, pixel))), dense, unit)
