"""CUDA C++ for the sm_80 class (csrc/cuda/perceiver_attention.cu): context and latents are read where they lie.

The gradient is cuda_backward's.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from vlmops.backends import cuda_runtime
from vlmops.backends.cuda_runtime import Out, Plan, f32, i32, i64
from vlmops.ops._shared import cuda_attention
from vlmops.ops._shared.checks import cu_seqlens_list
from vlmops.ops._shared.cuda_attention import (
    LOG2E,
    THREADS,
    Shape,
    aligned,
    parts,
    positive_scale,
    split_plans,
    why_not,
)
from vlmops.ops.perceiver_attention.cuda_backward import backward

__all__ = ["backward", "forward", "supports"]


def supports(
    q: Tensor, k_context: Tensor, v_context: Tensor, k_latent: Tensor | None, v_latent: Tensor | None,
    cu_seqlens_context: Tensor, num_latents: int, scale: float,
) -> str | None:  # fmt: skip
    """Why this kernel cannot run these arguments; None if it can."""
    return why_not(q)


def shape(q: Tensor, items: int, num_latents: int) -> Shape:
    """The block for q [items * num_latents, H, D]; two sources leave no registers for wide tiles of large heads."""
    found = cuda_attention.shape(q, items, num_latents)
    return replace(found, keys=32) if found.atoms == 2 and q.shape[2] > 96 else found


def forward(
    q: Tensor, k_context: Tensor, v_context: Tensor, k_latent: Tensor | None, v_latent: Tensor | None,
    cu_seqlens_context: Tensor, num_latents: int, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """out [n * num_latents, Hq, D] in q's dtype, lse float32 [Hq, n * num_latents]."""
    (tq, heads, dim), (tk, kv_heads, _) = q.shape, k_context.shape
    if q.device.type == "cpu":
        cu_seqlens_list("cu_seqlens_context", cu_seqlens_context, tk)
    q, scale = positive_scale(q, scale)
    q, k, v = aligned(q), aligned(k_context), aligned(v_context)
    latent = [None if x is None else aligned(x) for x in (k_latent, v_latent)]
    cu, items = cu_seqlens_context.contiguous(), tq // num_latents
    out = q.new_empty(tq, heads, dim)
    lse = torch.empty(heads, tq, dtype=torch.float32, device=q.device)
    block = shape(q, items, num_latents)
    tiles = -(-num_latents // block.rows)
    keys = tk / max(1, items) + (0 if k_latent is None else num_latents)
    count = parts(q, items * tiles * heads, keys, block.keys)
    strides = [i64(0 if x is None else x.stride(i)) for x in (q, k, v, *latent) for i in (0, 1)]

    def plan(to: Tensor, to_lse: Tensor) -> Plan:
        return Plan(
            "perceiver_attention.cu", "perceiver_attention_forward", (*block.defines(q), ("SPLIT", count > 1)),
            (items * tiles, heads, count), THREADS,
            (q, k, v, *latent, Out(to), Out(to_lse), cu, *strides, i32(tk), i32(items), i32(num_latents), i32(tiles),
             i32(heads // kv_heads), f32(scale * LOG2E)),
            block.shared(dim),
        )  # fmt: skip

    cuda_runtime.run(split_plans(plan, out, lse, count))
    return out, lse
