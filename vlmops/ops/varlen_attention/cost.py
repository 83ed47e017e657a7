"""Least traffic and FLOPs of packed attention."""

from __future__ import annotations

from torch import Tensor

from vlmops.ops._shared.cost import Cost, nbytes
from vlmops.ops._shared.masks import attention_mask, has_mask


def cost(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int,
    scale: float, causal: bool, left: int, right: int, prefix_lens: Tensor | None, softcap: float,
    cos_q: Tensor | None, sin_q: Tensor | None, cos_k: Tensor | None, sin_k: Tensor | None, interleaved: bool,
    *, block_q: int | None = None,
) -> Cost:  # fmt: skip
    """Of the forward. Reads cu_seqlens on the host: for reports and tests, not for a hot path.

    Args:
        block_q: rows of a query tile: then k and v count once for every tile pass of their sequence (what they cost
            a kernel without a cache). None: everything once.
    """
    _, heads, dim = q.shape
    pairs = passes = 0
    starts_q, starts_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    prefix = [0] * (len(starts_q) - 1) if prefix_lens is None else prefix_lens.tolist()
    for i in range(len(starts_q) - 1):
        rows, keys = starts_q[i + 1] - starts_q[i], starts_k[i + 1] - starts_k[i]
        if has_mask(causal, left, right):
            seen = attention_mask(rows, keys, causal, left, right, prefix[i], cu_seqlens_q.device)
            pairs += int(seen.sum())
            if block_q is not None:
                passes += sum(int(part.any(0).sum()) for part in seen.split(block_q)) if rows else 0
        else:
            pairs += rows * keys
            passes += 0 if block_q is None else -(-rows // block_q) * keys
    kv_bytes = nbytes(k, v) if block_q is None else 2 * passes * heads * dim * k.element_size()
    lse = q.shape[0] * heads * 4
    rope = 0
    if cos_q is not None:  # one pass over q and k before
        rope = nbytes(q, k, cos_q, sin_q) + (0 if cos_k is cos_q else nbytes(cos_k, sin_k))
    written = nbytes(q) + lse + (nbytes(q, k) if rope else 0)
    return Cost(read=nbytes(q) + kv_bytes + rope, written=written, flops=4 * pairs * heads * dim)
