"""CUDA C++ for the sm_80 class: a resampler's gradients, without atomics.

Queries: csrc/cuda/perceiver_attention_backward.cu, over both sources of keys; without latent keys, and for the gradients of
either source's keys, it is packed attention.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vlmops.backends import cuda_runtime
from vlmops.backends.cuda_runtime import Out, Plan, f32, i32, i64
from vlmops.ops._shared.cuda_attention import THREADS, aligned, score_scales
from vlmops.ops._shared.cuda_attention_backward import (
    grad_shape,
    gradient_fits,
    gradient_of,
    row_stats,
)
from vlmops.ops.perceiver_attention import composition
from vlmops.ops.varlen_attention.cuda_backward import segment_gradients

__all__ = ["backward"]


def backward(
    grads: Sequence[Tensor | None], outs: Sequence[Tensor], args: Sequence[Any], needs: Sequence[bool]
) -> list[Tensor | None]:
    """Gradients of q and of both sources' keys and values; also takes a gradient of lse.

    Larger heads than these kernels take: the ``torch`` backend's.
    """
    q, k_context, v_context, k_latent, v_latent, cu, num_latents, scale = args
    if not gradient_fits(q):
        return composition.backward(grads, outs, args, needs)
    out, lse = outs
    q, k, v, grad_out = aligned(q), aligned(k_context), aligned(v_context), gradient_of(out, grads[0])
    stats, first = row_stats(aligned(out), grad_out, lse, grads[1])
    starts = torch.arange(0, q.shape[0] + 1, num_latents, dtype=torch.int32, device=q.device)
    alone = k_latent is None or v_latent is None
    (dq, dk, dv), plans = segment_gradients(
        q, k, v, grad_out, stats, starts, cu, num_latents, -1, scale, (needs[0] and alone, needs[1] or needs[2])
    )
    found = [dq if needs[0] else None, dk if needs[1] else None, dv if needs[2] else None]
    if alone:
        cuda_runtime.run([first, *plans])
        return [*found, None, None]
    kl, vl = aligned(k_latent), aligned(v_latent)
    (_, dkl, dvl), more = segment_gradients(
        q, kl, vl, grad_out, stats, starts, starts, num_latents, num_latents, scale, (False, needs[3] or needs[4])
    )
    if needs[0]:
        more.append(_query_plan(q, k, v, kl, vl, grad_out, stats, dq, cu, num_latents, scale))
    cuda_runtime.run([first, *plans, *more])
    return [*found, dkl if needs[3] else None, dvl if needs[4] else None]


def _query_plan(
    q: Tensor, k: Tensor, v: Tensor, kl: Tensor, vl: Tensor, grad_out: Tensor, stats: Tensor, dq: Tensor, cu: Tensor,
    num_latents: int, scale: float,
) -> Plan:  # fmt: skip
    """The launch that fills dq [n * num_latents, H, D] from both sources."""
    (tq, heads, dim), (tk, kv_heads, _) = q.shape, k.shape
    items = tq // num_latents
    block = grad_shape(q, items, num_latents, False)
    tiles = -(-num_latents // block.own)
    return Plan(
        "perceiver_attention_backward.cu", "perceiver_attention_dq", block.defines(q), (items * tiles, heads, 1), THREADS,
        (q, k, v, kl, vl, grad_out, stats, Out(dq), cu.contiguous(),
         *(i64(x.stride(i)) for x in (q, k, v, kl, vl, grad_out) for i in (0, 1)), i32(tk), i32(items), i32(num_latents),
         i32(tiles), i32(heads // kv_heads), f32(scale), f32(score_scales(scale, 0.0)[0])),
        block.shared(dim, False),
    )  # fmt: skip
