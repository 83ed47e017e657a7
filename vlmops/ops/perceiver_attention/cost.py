"""Least traffic and FLOPs of a resampler's attention."""

from __future__ import annotations

from torch import Tensor

from vlmops.ops._shared.cost import Cost, nbytes


def cost(
    q: Tensor, k_context: Tensor, v_context: Tensor, k_latent: Tensor | None, v_latent: Tensor | None,
    cu_seqlens_context: Tensor, num_latents: int, scale: float, *, block_q: int | None = None,
) -> Cost:  # fmt: skip
    """Of the forward, from shapes alone.

    Args:
        block_q: rows of a tile of latents: then every key counts once for each tile and each query head. None: once.
    """
    tq, heads, dim = q.shape
    own = 0 if k_latent is None else num_latents
    pairs = num_latents * k_context.shape[0] + tq * own
    kv_bytes = nbytes(k_context, v_context, k_latent, v_latent)
    if block_q is not None:
        kv_bytes = -(-num_latents // block_q) * (kv_bytes // k_context.shape[1]) * heads
    return Cost(read=nbytes(q) + kv_bytes, written=nbytes(q) + 4 * tq * heads, flops=4 * pairs * heads * dim)
