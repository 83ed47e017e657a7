"""What ``prepare`` gives: pixels still in bytes, and everything a model asks about them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vlmops.images.layout import Layout
from vlmops.ops import patchify

__all__ = ["Prepared"]


@dataclass(frozen=True)
class Prepared:
    """Tiles of all images, in bytes, with their grids and counts.

    Args:
        pixels: uint8 [tiles, 3, h, w] where all tiles are of one size, else a list of [3, h, w].
        grid_thw: int64 [tiles, 3]: patches of each tile in time, height and width.
        tiles: int64 [images]: tiles of each image, overview first.
        image_sizes: int64 [images, 2]: original height and width.
        tokens: int64 [images]: places in the language model's sequence.
        layouts: how each image was cut.
        mean, std: per channel, on the scale of 0 to 1, for ``patchify``.
        temporal_patch_size: frames of a patch; an image is repeated.
    """

    pixels: Tensor | list[Tensor]
    grid_thw: Tensor
    tiles: Tensor
    image_sizes: Tensor
    tokens: Tensor
    layouts: tuple[Layout, ...]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    temporal_patch_size: int

    def __len__(self) -> int:
        return len(self.layouts)

    @property
    def patch_size(self) -> int:
        """Pixels on a side of a patch."""
        return self.layouts[0].patch_size if self.layouts else 1

    @property
    def order(self) -> str:
        """``patchify``'s order of the patches."""
        return "merge2x2" if self.layouts and self.layouts[0].merge_size == 2 else "raster"

    @property
    def nbytes(self) -> int:
        """Bytes of the pixels."""
        parts = [self.pixels] if isinstance(self.pixels, Tensor) else self.pixels
        return sum(p.nbytes for p in parts)

    def to(self, device: torch.device | str) -> Prepared:
        """The same with the pixels on a device: one byte a value travels, normalising is done there."""
        pixels = self.pixels.to(device) if isinstance(self.pixels, Tensor) else [p.to(device) for p in self.pixels]
        return Prepared(pixels, self.grid_thw, self.tiles, self.image_sizes, self.tokens, self.layouts, self.mean, self.std,
                        self.temporal_patch_size)  # fmt: skip

    def patchify(self, weight: Tensor, bias: Tensor | None = None, *, position: Tensor | None = None) -> Tensor:
        """Patch tokens [patches, E] of all tiles by ``vlmops.ops.patchify``: normalised, cut and projected in one pass.

        Args:
            weight: [E, 3, P, P] or [E, 3, temporal_patch_size, P, P].
            bias: [E] or None.
            position: as ``vlmops.ops.patchify`` has it.
        """
        tokens, _ = patchify(
            self.pixels, weight, bias, patch_size=self.patch_size, temporal_patch_size=self.temporal_patch_size,
            mean=self.mean, std=self.std, position=position, order=self.order,
        )  # fmt: skip
        return tokens

    def pixel_values(self, dtype: torch.dtype = torch.float32) -> Tensor | list[Tensor]:
        """(pixels / 255 - mean) / std of ``pixels``' shape: what transformers' image processors give a tower."""
        mean, std = (torch.tensor(x, dtype=torch.float32).view(3, 1, 1) for x in (self.mean, self.std))

        def normal(x: Tensor) -> Tensor:
            return ((x.float() / 255 - mean.to(x.device)) / std.to(x.device)).to(dtype)

        return normal(self.pixels) if isinstance(self.pixels, Tensor) else [normal(x) for x in self.pixels]

    def flattened(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """[patches, 3 * temporal_patch_size * P * P]: Qwen2-VL's ``pixel_values``, for a model that wants those."""
        values = self.pixel_values(dtype)
        return torch.cat([self._flatten(x) for x in (values.unbind(0) if isinstance(values, Tensor) else values)])

    def _flatten(self, x: Tensor) -> Tensor:
        patch, unit = self.patch_size, 2 if self.order == "merge2x2" else 1
        rows, columns = x.shape[1] // (patch * unit), x.shape[2] // (patch * unit)
        x = x.view(3, rows, unit, patch, columns, unit, patch).permute(1, 4, 2, 5, 0, 3, 6)
        x = x.reshape(rows * columns * unit * unit, 3, 1, patch * patch)
        return x.expand(-1, -1, self.temporal_patch_size, -1).flatten(1)
