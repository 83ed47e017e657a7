"""Least traffic and FLOPs of cross attention."""

from __future__ import annotations

import torch
from torch import Tensor

from vlmops.ops._shared.cost import Cost, nbytes
from vlmops.ops.cross_attention.key_ranges import key_ranges


def cost(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    media_index: Tensor | None,
    scale: float,
    *,
    block_q: int | None = None,
) -> Cost:
    """Of the forward. Reads the index on the host: for reports and tests.

    Args:
        block_q: rows of a query tile: then the keys between the first and the last that a tile sees count once for it.
            None: k and v once.
    """
    tq, heads, dim = q.shape
    if media_index is None:
        media_index = torch.repeat_interleave(
            torch.arange(cu_seqlens_q.shape[0] - 1, device=q.device), cu_seqlens_q.diff()
        )
    begin, end = key_ranges(media_index, cu_seqlens_k)
    pairs = int((end - begin).sum())
    kv_bytes = nbytes(k, v)
    if block_q is not None:
        keys = 0
        for first, last in zip(begin.split(block_q), end.split(block_q), strict=True):
            some = last > first
            keys += int(last[some].max() - first[some].min()) if bool(some.any()) else 0
        kv_bytes = 2 * keys * heads * dim * k.element_size()
    return Cost(read=nbytes(q) + kv_bytes + 8 * tq, written=nbytes(q) + 4 * tq * heads, flops=4 * pairs * heads * dim)
