"""Which tile of which packed sequence a program works on, found on the device: no host ever reads cu_seqlens.

Tiles of long sequences come first, so that the last programs to run are short ones.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vlmops.backends import triton_runtime
from vlmops.ops._shared.triton_math import cdiv

__all__ = ["segment", "tile_slots"]


@triton.jit
def segment(CU, i, total):
    """Start and length of sequence i, clamped to the tensor: a GPU must not fault on a malformed cu_seqlens."""
    start = tl.minimum(tl.maximum(tl.load(CU + i), 0), total).to(tl.int32)
    end = tl.minimum(tl.maximum(tl.load(CU + i + 1), 0), total).to(tl.int32)
    return start, tl.maximum(end - start, 0)


@triton.jit
def _segments(CU, i, n, total):
    """The same for a vector of sequences, 0 past the last."""
    start = tl.minimum(tl.maximum(tl.load(CU + i, mask=i < n, other=0), 0), total).to(tl.int32)
    end = tl.minimum(tl.maximum(tl.load(CU + i + 1, mask=i < n, other=0), 0), total).to(tl.int32)
    return tl.maximum(end - start, 0)


@triton.jit
def schedule_kernel(CU, SLOTS, n, total, slots, TILE: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr):
    """SLOTS [2, slots]: sequence (-1: none) and first row of each tile, sequences by falling length.

    Each program places BLOCK sequences: the first slot of one is the number of tiles of all that come before it.
    """
    mine = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    length = _segments(CU, mine, n, total)
    before = tl.zeros((BLOCK,), tl.int32)
    every = tl.zeros((STEP,), tl.int32)
    for j0 in range(0, n, STEP):
        other = j0 + tl.arange(0, STEP)
        other_length = _segments(CU, other, n, total)
        tiles = tl.cdiv(other_length, TILE)
        every += tiles
        longer = other_length[None, :] > length[:, None]
        same = (other_length[None, :] == length[:, None]) & (other[None, :] < mine[:, None])
        before += tl.sum(tl.where(longer | same, tiles[None, :], 0), 1)
    tiles = tl.cdiv(length, TILE)
    for t in range(0, tl.max(tiles, 0)):
        at = before + t
        here = (t < tiles) & (at < slots)
        tl.store(SLOTS + at, mine, mask=here)
        tl.store(SLOTS + slots + at, tl.zeros((BLOCK,), tl.int32) + t * TILE, mask=here)
    if tl.program_id(0) == 0:
        for s0 in range(tl.sum(every, 0), slots, STEP):
            unused = s0 + tl.arange(0, STEP)
            tl.store(SLOTS + unused, tl.full((STEP,), -1, tl.int32), mask=unused < slots)


def tile_slots(cu_seqlens: Tensor, total: int, longest: int, tile: int) -> Tensor:
    """int32 [2, slots]: sequence and first row of every tile of ``tile`` rows, -1 where a slot is unused.

    Args:
        cu_seqlens: [n + 1] on the device.
        total: tokens.
        longest: a bound of the longest sequence known on the host, or <= 0.
        tile: rows.
    """
    n = cu_seqlens.shape[0] - 1
    slots = total // tile + n
    if longest > 0:
        slots = min(slots, n * cdiv(longest, tile))
    out = torch.empty(2, slots, dtype=torch.int32, device=cu_seqlens.device)
    if n and slots:
        triton_runtime.launch(
            schedule_kernel, (cdiv(n, 64),), cu_seqlens, out, n, total, slots, TILE=tile, BLOCK=64, STEP=64
        )
    return out
