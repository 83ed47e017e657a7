"""The (cos, sin) tables [T, D] of 2-D vision RoPE, from grids: index arithmetic on the grid's own device, no loop.

The number of tokens is read from a grid on the CPU; elsewhere reading would wait for the device, so it is an argument.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vlmops.ops._shared import checks

__all__ = ["mrope_tables", "pixtral_rotary_tables", "vision_rotary_tables"]


def _frequencies(dim: int, theta: float, device: torch.device) -> Tensor:
    """[dim / 2] inverse frequencies."""
    return 1.0 / (theta ** (torch.arange(0, dim, 2, dtype=torch.float32, device=device) / dim))


def _positions(grid_thw: Tensor, merge: int, total: int | None) -> tuple[Tensor, Tensor]:
    """Row and column [T] of every patch of every image, in blocks of merge x merge."""
    checks.check_tensor("grid_thw", grid_thw, dim=2, layout="[n, 3]")
    checks.check_shape("grid_thw", grid_thw, (None, 3), "[n, 3]")
    if grid_thw.is_floating_point() or grid_thw.dtype == torch.bool:
        raise TypeError(f"grid_thw: expected integers [n, 3], got {checks.describe(grid_thw)}")
    grid = grid_thw.long()
    counts = grid.prod(1)
    if grid.device.type == "cpu" and not torch.compiler.is_compiling():
        found = int(counts.sum())
        if total is not None and total != found:
            raise ValueError(f"total_tokens: expected {found} for this grid_thw, got {total}")
        total = found
        if bool((grid[:, 1:] % merge).any()):
            raise ValueError(f"grid_thw: expected height and width to be multiples of {merge}, got {grid.tolist()}")
    elif total is None:
        raise ValueError(f"total_tokens: needed for a grid_thw on {grid.device} and under torch.compile")
    index = torch.arange(total, device=grid.device)
    image = torch.searchsorted(counts.cumsum(0), index, right=True).clamp_(max=max(0, grid.shape[0] - 1))
    first = counts.cumsum(0) - counts
    height, width = grid[:, 1][image], grid[:, 2][image]
    inside = (index - first[image]) % (height * width).clamp_(min=1)
    area, across = merge * merge, (width // merge).clamp_(min=1)
    block, rest = inside // area, inside % area
    return block // across * merge + rest // merge, block % across * merge + rest % merge


def _tables(angles: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin [T, D] of angles [T, D / 2]."""
    both = torch.cat([angles, angles], dim=-1)
    return both.cos(), both.sin()


def vision_rotary_tables(
    grid_thw: Tensor, head_dim: int, *, theta: float = 10000.0, merge: int = 2, total_tokens: int | None = None
) -> tuple[Tensor, Tensor]:
    """Qwen2-VL's axial tables: the first half of the frequencies turns with the row, the second with the column.

    Args:
        grid_thw: [n, 3] integers: patches in time, height and width of each image.
        head_dim: D, a multiple of 4.
        theta: base.
        merge: patches come in merge x merge blocks (2 for Qwen; 1 for raster order).
        total_tokens: T; needed (and trusted) for a grid that is not on the CPU, and under ``torch.compile``.

    Returns:
        cos, sin: float32 [T, D] on grid_thw's device, for ``interleaved=False``.

    Raises:
        TypeError, ValueError: a grid of another shape or dtype, one that ``merge`` does not divide, a bad head_dim.

    Source: Qwen2-VL (Wang et al., 2024).
    """
    if head_dim % 4 or head_dim < 4:
        raise ValueError(f"head_dim: expected a multiple of 4, got {head_dim}")
    if merge < 1:
        raise ValueError(f"merge: expected at least 1, got {merge}")
    rows, columns = _positions(grid_thw, merge, total_tokens)
    frequencies = _frequencies(head_dim // 2, theta, grid_thw.device)
    both = torch.stack([rows, columns], dim=-1).float()
    return _tables((both[..., None] * frequencies).flatten(1))


def pixtral_rotary_tables(
    sizes: Sequence[tuple[int, int]] | Tensor, head_dim: int, *, theta: float = 10000.0, total_tokens: int | None = None
) -> tuple[Tensor, Tensor]:
    """Pixtral's tables: even frequencies turn with the row, odd ones with the column.

    Args:
        sizes: (rows, columns) of patches of each image, or a tensor [n, 2] of them.
        head_dim: D, a multiple of 4.
        theta: base.
        total_tokens: T; needed (and trusted) for a tensor that is not on the CPU, and under ``torch.compile``.

    Returns:
        cos, sin: float32 [T, D], for ``interleaved=False``.

    Raises:
        TypeError, ValueError: sizes of another shape or dtype, a bad head_dim.

    Source: Pixtral 12B (Mistral AI, 2024), as transformers' ``PixtralVisionRotaryEmbedding``.
    """
    if head_dim % 4 or head_dim < 4:
        raise ValueError(f"head_dim: expected a multiple of 4, got {head_dim}")
    if not isinstance(sizes, Tensor):
        total_tokens = sum(h * w for h, w in sizes)
        sizes = torch.tensor([list(size) for size in sizes], dtype=torch.int64).view(-1, 2)
    checks.check_shape("sizes", sizes, (None, 2), "[n, 2]")
    rows, columns = _positions(torch.nn.functional.pad(sizes, (1, 0), value=1), 1, total_tokens)
    frequencies = _frequencies(head_dim, theta, sizes.device)
    return _tables(
        torch.cat([rows[:, None].float() * frequencies[0::2], columns[:, None].float() * frequencies[1::2]], dim=-1)
    )


def mrope_tables(
    position_ids: Tensor, head_dim: int, sections: Sequence[int], *, theta: float = 1e6
) -> tuple[Tensor, Tensor]:
    """Qwen2-VL's multimodal text tables: frequencies in sections that turn with time, row and column.

    Args:
        position_ids: [3, T] time, row and column of each token, or [3, batch, T].
        head_dim: D; ``sections`` (transformers' ``mrope_section``) add up to D / 2.
        sections: how many frequencies each axis has.
        theta: base.

    Returns:
        cos, sin: float32 [T, D] ([batch, T, D]), for ``interleaved=False``.

    Raises:
        TypeError, ValueError: position_ids or sections that do not fit.

    Source: Qwen2-VL (Wang et al., 2024).
    """
    checks.check_tensor("position_ids", position_ids, layout="[3, T]")
    if position_ids.dim() < 2 or position_ids.shape[0] != 3:
        raise ValueError(f"position_ids: expected [3, T] or [3, batch, T], got {checks.describe(position_ids)}")
    if len(sections) != 3 or sum(sections) * 2 != head_dim:
        raise ValueError(f"sections: expected three with a sum of {head_dim // 2}, got {list(sections)}")
    angles = position_ids[..., None].float() * _frequencies(head_dim, theta, position_ids.device)  # [3, T, D / 2]
    return _tables(torch.cat([piece[axis] for axis, piece in enumerate(angles.split(list(sections), dim=-1))], dim=-1))
