"""The (cos, sin) tables [T, D] of 2-D vision RoPE, from grids; no learned state, no device sync on CPU grids."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["mrope_tables", "pixtral_rotary_tables", "vision_rotary_tables"]


def _frequencies(dim: int, theta: float, device: torch.device | None = None) -> Tensor:
    """[dim / 2] inverse frequencies."""
    return 1.0 / (theta ** (torch.arange(0, dim, 2, dtype=torch.float32, device=device) / dim))


def _positions(height: int, width: int, merge: int) -> Tensor:
    """[height * width, 2] row and column of each patch, in blocks of merge x merge."""
    rows = torch.arange(height)[:, None].expand(height, width)
    cols = torch.arange(width)[None, :].expand(height, width)
    both = torch.stack([rows, cols], dim=-1)
    blocks = both.reshape(height // merge, merge, width // merge, merge, 2).permute(0, 2, 1, 3, 4)
    return blocks.reshape(-1, 2)


def vision_rotary_tables(
    grid_thw: Tensor, head_dim: int, *, theta: float = 10000.0, merge: int = 2
) -> tuple[Tensor, Tensor]:
    """Qwen2-VL's axial tables: the first half of the frequencies turns with the row, the second with the column.

    Args:
        grid_thw: [n, 3] patches in time, height and width of each image; read on the host.
        head_dim: D, a multiple of 4.
        theta: base.
        merge: patches come in merge x merge blocks (2 for Qwen; 1 for raster order).

    Returns:
        cos, sin: float32 [T, D] on grid_thw's device, for ``rope_interleaved=False``.

    Source: Qwen2-VL (Wang et al., 2024).
    """
    if head_dim % 4:
        raise ValueError(f"head_dim: expected a multiple of 4, got {head_dim}")
    parts = []
    for t, h, w in grid_thw.tolist():
        if h % merge or w % merge:
            raise ValueError(f"grid_thw: expected height and width to be multiples of {merge}, got {h}x{w}")
        parts.append(_positions(h, w, merge).repeat(t, 1))
    positions = torch.cat(parts) if parts else torch.empty(0, 2, dtype=torch.int64)
    angles = (positions[..., None].float() * _frequencies(head_dim // 2, theta)).flatten(1)  # [T, D / 2]
    angles = torch.cat([angles, angles], dim=-1).to(grid_thw.device)
    return angles.cos(), angles.sin()


def pixtral_rotary_tables(
    sizes: list[tuple[int, int]], head_dim: int, *, theta: float = 10000.0
) -> tuple[Tensor, Tensor]:
    """Pixtral's tables: even frequencies turn with the row, odd ones with the column.

    Args:
        sizes: (rows, columns) of patches of each image.
        head_dim: D, a multiple of 4.
        theta: base.

    Returns:
        cos, sin: float32 [T, D], for ``rope_interleaved=False``.

    Source: Pixtral 12B (Mistral AI, 2024), as transformers' ``PixtralVisionRotaryEmbedding``.
    """
    if head_dim % 4:
        raise ValueError(f"head_dim: expected a multiple of 4, got {head_dim}")
    positions = torch.cat([_positions(h, w, 1) for h, w in sizes]) if sizes else torch.empty(0, 2, dtype=torch.int64)
    frequencies = _frequencies(head_dim, theta)
    rows = positions[:, :1].float() * frequencies[0::2]
    cols = positions[:, 1:].float() * frequencies[1::2]
    angles = torch.cat([rows, cols], dim=-1)
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos(), angles.sin()


def mrope_tables(
    position_ids: Tensor, head_dim: int, sections: tuple[int, int, int], *, theta: float = 1e6
) -> tuple[Tensor, Tensor]:
    """Qwen2-VL's multimodal text tables: frequencies in sections that turn with time, row and column.

    Args:
        position_ids: [3, T] time, row and column of each token.
        head_dim: D; ``sections`` add up to D / 2.
        sections: how many frequencies each axis has.
        theta: base.

    Returns:
        cos, sin: float32 [T, D], for ``rope_interleaved=False``.
    """
    if sum(sections) != head_dim // 2:
        raise ValueError(f"sections: expected a sum of {head_dim // 2}, got {sections}")
    angles = position_ids[..., None].float() * _frequencies(head_dim, theta, position_ids.device)  # [3, T, D / 2]
    parts = [piece[axis] for axis, piece in enumerate(angles.split(list(sections), dim=-1))]
    half = torch.cat(parts, dim=-1)
    both = torch.cat([half, half], dim=-1)
    return both.cos(), both.sin()
