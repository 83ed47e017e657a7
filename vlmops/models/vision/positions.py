"""Where a patch is: learned positions, resized for images of another size, and 2-D rotary angles."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from vlmops.models.config import VisionConfig
from vlmops.ops import pixtral_rotary_tables, vision_rotary_tables

__all__ = ["learned_positions", "resize_positions", "rotary_tables"]

Grids = Sequence[tuple[int, int, int]]


def resize_positions(table: Tensor, height: int, width: int, *, antialias: bool = False) -> Tensor:
    """A square table of positions for another grid, bicubically, in float32 at least.

    Args:
        table: [side * side, C], row by row.
        height, width: patches.
        antialias: widen the kernel where the grid shrinks (DINOv2 with registers).

    Returns:
        [height * width, C] in the table's dtype; the table itself where it fits.

    Source: DINO (Caron et al. 2021); the half-pixel grid and the missing size offset are those of transformers.
    """
    side = round(table.shape[0] ** 0.5)
    if (height, width) == (side, side):
        return table
    square = table.to(torch.promote_types(table.dtype, torch.float32)).view(1, side, side, -1).permute(0, 3, 1, 2)
    resized = functional.interpolate(
        square, size=(height, width), mode="bicubic", align_corners=False, antialias=antialias
    )
    return resized.permute(0, 2, 3, 1).reshape(height * width, -1).to(table.dtype)


def learned_positions(table: Tensor, grids: Grids, *, antialias: bool = False) -> Tensor | None:
    """Positions as ``vlmops.ops.patchify`` takes them.

    Args:
        table: [side * side, C].
        grids: patches in time, height and width of each image.
        antialias: as for ``resize_positions``.

    Returns:
        [patches of one image, C] where all have one grid, else [patches of all, C]; None where there is no image.
    """
    found = {g: resize_positions(table, g[1], g[2], antialias=antialias).repeat(g[0], 1) for g in dict.fromkeys(grids)}
    if not found:
        return None
    return next(iter(found.values())) if len(found) == 1 else torch.cat([found[g] for g in grids])


def rotary_tables(config: VisionConfig, grids: Grids) -> tuple[Tensor, Tensor]:
    """(cos, sin), each float32 [patches of all images, head_dim] on the CPU, in the order the patches stand in."""
    if config.rope == "axial":
        grid_thw = torch.tensor(grids, dtype=torch.int64).view(-1, 3)
        return vision_rotary_tables(
            grid_thw, config.dim, theta=config.rope_theta, merge=config.merge_size, total_tokens=_count(grids)
        )
    if config.rope == "alternating":
        sizes = [(h, w) for t, h, w in grids for _ in range(t)]
        return pixtral_rotary_tables(sizes, config.dim, theta=config.rope_theta)
    return _neighbouring_tables(config, grids)


def _neighbouring_tables(config: VisionConfig, grids: Grids) -> tuple[Tensor, Tensor]:
    """EVA-02's: the first half of a head's channels turns with the row, the second with the column, pairs (2i, 2i + 1).

    Source: EVA-02 (Fang et al. 2023); positions are stretched to the grid of the pre-training.
    """
    half = config.dim // 2
    frequencies = 1.0 / config.rope_theta ** (torch.arange(0, half, 2).float() / half)

    def angles(n: int) -> Tensor:
        places = torch.arange(n) if config.rope_side is None else torch.arange(n) / n * config.rope_side
        return (places.float()[:, None] * frequencies).repeat_interleave(2, 1)  # [n, half]

    parts = [
        torch.cat([angles(h)[:, None].expand(h, w, half), angles(w).expand(h, w, half)], 2).view(h * w, -1).repeat(t, 1)
        for t, h, w in grids
    ]
    both = torch.cat(parts) if parts else torch.empty(0, config.dim)
    return both.cos(), both.sin()


def _count(grids: Grids) -> int:
    return sum(t * h * w for t, h, w in grids)
