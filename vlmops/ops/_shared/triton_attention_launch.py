"""Host side of the attentions: tile sizes by head, precision and GPU; row sums; strides."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from vlmops.backends import triton_runtime
from vlmops.backends.triton_runtime import Config
from vlmops.ops._shared.triton_attention import MAX_HEAD_DIM, chunks
from vlmops.ops._shared.triton_attention_sums import delta_kernel
from vlmops.ops._shared.triton_math import cdiv, next_power_of_two

__all__ = [
    "backward_configs",
    "chunk_meta",
    "forward_configs",
    "row_sums",
    "strides",
    "why_not_attention",
]


def why_not_attention(q: Tensor) -> str | None:
    """Why no attention kernel takes q; None if one does."""
    if q.shape[2] > MAX_HEAD_DIM:
        return f"head_dim {q.shape[2]} (at most {MAX_HEAD_DIM})"
    return triton_runtime.why_not(q)


def chunk_meta(dim: int) -> dict[str, Any]:
    """The constexpr arguments of a head size."""
    first, second = chunks(dim)
    return {"D": dim, "D0": first, "D1": second}


def strides(*tensors: Tensor) -> tuple[int, tuple[int, ...]]:
    """A unit (a power of two up to 16) that divides every token and head stride, and those strides in units."""
    every = [n for x in tensors for n in (x.stride(0), x.stride(1))]
    unit = math.gcd(16, *every)
    return unit, tuple(n // unit for n in every)


def _rows(longest: int, most: int) -> int:
    """Tile of query rows: no larger than the longest sequence, if that is known."""
    return most if longest <= 0 else max(16, min(most, next_power_of_two(longest)))


def forward_configs(q: Tensor, longest: int, loops: int = 2) -> list[Config]:
    """Tiles of the forward, the default first.

    Args:
        longest: rows of the longest query sequence, or <= 0.
        loops: key loops the kernel always has; each keeps addresses in registers.
    """
    width, wide = sum(chunks(q.shape[2])), q.element_size() == 4
    where = triton_runtime.target(q)
    if where.backend == "hip":
        tiles = [(64, 32, 4, 1)] if wide or width > 128 else [(128, 64, 4, 1), (64, 64, 4, 1), (128, 32, 4, 1)]
    elif wide:
        tiles = [(32, 32, 4, 1), (32, 32, 8, 2)] if width <= 128 else [(16, 32, 8, 1)]
        if 64 < width <= 128:
            tiles.insert(0, (32, 16, 4, 2) if where.arch == 80 else (32, 32, 4, 2))
    elif width <= 64:
        tiles = [(128, 64, 8, 2), (128, 64, 4, 2), (64, 64, 4, 3)]
        if where.arch != 100:
            tiles[0], tiles[1] = tiles[1], tiles[0]
    elif width <= 128:
        tiles = [(128, 64, 8, 2), (64, 64, 4, 2), (128, 32, 4, 2), (64, 32, 4, 3)]
        # Registers: sm_80 keeps the masked second chunk of 72 and 88 beside everything else, sm_80 and sm_90 a 128-wide row.
        if where.arch == 80 and width != q.shape[2]:
            tiles[0], tiles[3] = tiles[3], tiles[0]
        elif where.arch != 100 and width in (96, 128):
            tiles[0], tiles[1] = tiles[1], tiles[0]
    else:
        tiles = [(64, 32, 8, 2), (64, 64, 8, 1), (32, 32, 4, 2)]
    if loops > 2 and where.arch == 80 and not wide and width in (64, 96):
        tiles.insert(0, (64, 64, 4, 2) if width == 64 else (64, 32, 4, 2))
    found = []
    for bm, bn, warps, stages in tiles:
        rows = _rows(longest, bm)
        config = Config.of(BM=rows, BN=bn, PERSISTENT=False, warps=warps if rows >= 32 else 4, stages=stages)
        if config not in found:
            found.append(config)
    default = found[0]
    persistent = Config.of(
        BM=default["BM"], BN=default["BN"], PERSISTENT=True, warps=default.warps, stages=default.stages
    )
    return [*found, persistent]


def backward_configs(q: Tensor, longest: int, keys: bool, rows: bool = False) -> list[Config]:
    """Tiles of the backward kernels, BM query rows and BN keys: of dk and dv with ``keys``, else of dq.

    ``rows``: dk and dv with a run of keys for each row, which takes more registers.
    """
    width, wide = sum(chunks(q.shape[2])), q.element_size() == 4
    where = triton_runtime.target(q)
    if where.backend == "hip":
        tiles = [(32, 32, 4, 1)] if wide or width > 128 else [(32, 64, 4, 1), (32, 32, 4, 1)]
    elif wide:
        tiles = [(32, 32, 8, 1)] if width <= 96 else [(16, 32, 8, 1)]
    elif width <= 64:
        tiles = [(64, 64, 8, 2), (64, 64, 4, 2), (64, 128, 8, 2), (32, 64, 4, 3)]
    elif width <= 128:
        tiles = [(64, 64, 8, 2), (32, 64, 4, 2), (64, 64, 4, 1)]
        if keys and ((width == 128 and where.arch == 90) or (width == 96 and where.arch != 100)):
            tiles.insert(0, (32, 64, 8, 2) if where.arch == 90 else (32, 64, 8, 1))
    else:
        tiles = [(32, 32, 4 if where.arch == 100 and not keys else 8, 1), (32, 64, 8, 1)]
    if rows and not wide and ((where.arch == 80 and width == 64) or (where.arch == 90 and width == 128)):
        tiles.insert(0, (32, 64, 8, 2) if width == 64 else (32, 32, 4, 2))
    return [Config.of(BM=_rows(longest, bm), BN=bn, warps=warps, stages=stages) for bm, bn, warps, stages in tiles]


def row_sums(out: Tensor, grad_out: Tensor, grad_lse: Tensor | None) -> Tensor:
    """delta [H, T] = rowsum(grad_out * out) - grad_lse, float32.

    Args:
        out, grad_out: [T, H, D].
        grad_lse: [H, T] or None.
    """
    tokens, heads, dim = out.shape
    delta = torch.empty(heads, tokens, dtype=torch.float32, device=out.device)
    if grad_lse is not None:
        grad_lse = grad_lse.contiguous()
    triton_runtime.launch(
        delta_kernel, (cdiv(tokens, 32), heads), out, grad_out, delta if grad_lse is None else grad_lse, delta, tokens,
        out.stride(0), out.stride(1), grad_out.stride(0), grad_out.stride(1), 0 if grad_lse is None else tokens,
        D=dim, WIDTH=next_power_of_two(dim), HAS_DLSE=grad_lse is not None, BT=32,
    )  # fmt: skip
    return delta
