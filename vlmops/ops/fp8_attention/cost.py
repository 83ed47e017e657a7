"""Least traffic and FLOPs of fp8 attention: a scale of all tokens means that q, k and v are read before anything is rounded."""

from __future__ import annotations

from torch import Tensor

from vlmops.ops._shared.cost import Cost, nbytes
from vlmops.ops._shared.masks import attention_mask, has_mask


def cost(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int,
    scale: float, causal: bool, left: int, right: int, *, block_q: int | None = None,
) -> Cost:  # fmt: skip
    """Of the forward. Reads cu_seqlens on the host: for reports and tests, not for a hot path.

    q, k and v are read twice (their largest magnitudes, then to round them) and written in one byte each, rows of q and k padded
    to a multiple of 32 and of v to one of 16, as e4m3 products want them.

    Args:
        block_q: rows of a query tile: then rounded k and v count once for every tile pass of their sequence. None: once.
    """
    (tq, heads, dim), kv_heads = q.shape, k.shape[1]
    key_row, value_row = -(-dim // 32) * 32, -(-dim // 16) * 16
    pairs = passes = 0
    starts_q, starts_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    for i in range(len(starts_q) - 1):
        rows, keys = starts_q[i + 1] - starts_q[i], starts_k[i + 1] - starts_k[i]
        if has_mask(causal, left, right):
            seen = attention_mask(rows, keys, causal, left, right, 0, cu_seqlens_q.device)
            pairs += int(seen.sum())
            if block_q is not None and rows:
                passes += sum(int(part.any(0).sum()) for part in seen.split(block_q))
        else:
            pairs += rows * keys
            passes += 0 if block_q is None else -(-rows // block_q) * keys
    q8 = tq * heads * key_row
    kv8 = k.shape[0] * kv_heads * (key_row + value_row)
    kv_read = kv8 if block_q is None else passes * heads * (key_row + value_row)
    before = Cost(read=2 * nbytes(q, k, v), written=q8 + kv8)
    return before + Cost(read=q8 + kv_read, written=nbytes(q) + 4 * tq * heads, flops=4 * pairs * heads * dim)
