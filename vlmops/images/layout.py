"""The one thing every image mode comes down to: resize, place on a canvas, cut into tiles."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import torch
from PIL import Image
from torch import Tensor

__all__ = ["Layout", "View", "contain", "render"]


@dataclass(frozen=True)
class View:
    """One rendering of an image.

    Args:
        size: (height, width) the image is resized to.
        canvas: (height, width) it is placed on; None: its own.
        offset: (top, left) of the image on the canvas; negative: cropped.
        tile: (height, width) the canvas is cut into, row by row; None: not cut. The last row and column may be smaller.
        square: pad the image to a centred square before resizing (LLaVA's "pad").
    """

    size: tuple[int, int]
    canvas: tuple[int, int] | None = None
    offset: tuple[int, int] = (0, 0)
    tile: tuple[int, int] | None = None
    square: bool = False

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of tiles."""
        (height, width), tile = self.canvas or self.size, self.tile
        return (1, 1) if tile is None else (-(-height // tile[0]), -(-width // tile[1]))


@dataclass(frozen=True)
class Layout:
    """How one image becomes tiles and tokens.

    Args:
        views: rendered in this order.
        tokens: places the image takes in the language model's sequence.
        patch_size: pixels on a side of a patch of the encoder; tiles are whole patches.
        merge_size: patches on a side that become one token; their patches follow each other where it is 2 (Qwen2-VL's order).
        facts: what a model needs to arrange the tokens, by name: e.g. ``unpadded`` (top, left, rows, columns), ``rows``.
    """

    views: tuple[View, ...]
    tokens: int
    patch_size: int
    merge_size: int = 1
    facts: dict[str, object] = field(default_factory=dict)


def contain(height: int, width: int, box: tuple[int, int]) -> tuple[int, int]:
    """The largest size of this aspect ratio inside the box, rounded up (LLaVA-NeXT's rule)."""
    by_height, by_width = box[0] / height, box[1] / width
    if by_width < by_height:
        return min(math.ceil(height * by_width), box[0]), box[1]
    return box[0], min(math.ceil(width * by_height), box[1])


def render(image: Image.Image, view: View, fill: tuple[int, int, int], resample: Image.Resampling) -> list[Tensor]:
    """The view's tiles, uint8 [3, h, w] each; tiles of one size share one tensor [tiles, 3, h, w]."""
    if view.square and image.width != image.height:
        side = max(image.size)
        padded = Image.new("RGB", (side, side), fill)
        padded.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
        image = padded
    height, width = view.size
    if image.size != (width, height):
        image = image.resize((width, height), resample)
    pixels = np.asarray(image)
    if view.canvas is not None and (view.canvas != view.size or view.offset != (0, 0)):
        canvas = np.empty((*view.canvas, 3), np.uint8)
        canvas[:] = fill
        (top, left), (rows, columns) = view.offset, view.canvas
        y0, y1, x0, x1 = max(top, 0), min(top + height, rows), max(left, 0), min(left + width, columns)
        canvas[y0:y1, x0:x1] = pixels[y0 - top : y1 - top, x0 - left : x1 - left]
        pixels = canvas
    (height, width), (th, tw) = pixels.shape[:2], view.tile or pixels.shape[:2]
    if height % th == 0 and width % tw == 0:
        cut = pixels.reshape(height // th, th, width // tw, tw, 3).transpose(0, 2, 4, 1, 3).reshape(-1, 3, th, tw)
        return list(_tensor(cut))
    return [
        _tensor(pixels[y : y + th, x : x + tw].transpose(2, 0, 1))
        for y in range(0, height, th) for x in range(0, width, tw)
    ]  # fmt: skip


def _tensor(pixels: np.ndarray) -> Tensor:
    """A tensor that owns its memory: Pillow's is read-only."""
    pixels = np.ascontiguousarray(pixels)
    return torch.from_numpy(pixels if pixels.flags.writeable and pixels.flags.owndata else pixels.copy())
