"""CUDA C++ for the sm_80 class (csrc/cuda/cross_attention.cu): every row finds its own run of keys on the device.

The gradient is cuda_backward's. Without a media index it is packed attention.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vlmops.backends import cuda_runtime
from vlmops.backends.cuda_runtime import Out, Plan, f32, i32, i64
from vlmops.ops._shared.checks import cu_seqlens_list
from vlmops.ops._shared.cuda_attention import (
    LOG2E,
    THREADS,
    aligned,
    parts,
    positive_scale,
    shape,
    split_plans,
    why_not,
)
from vlmops.ops.cross_attention.cuda_backward import RUN_BYTES, backward
from vlmops.ops.cross_attention.key_ranges import check_media_index
from vlmops.ops.varlen_attention import cuda as packed

__all__ = ["backward", "forward", "supports"]


def supports(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    media_index: Tensor | None,
    scale: float,
) -> str | None:
    """Why this kernel cannot run these arguments; None if it can."""
    return why_not(q)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    media_index: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """out [Tq, Hq, D] in q's dtype, lse float32 [Hq, Tq]."""
    if media_index is None:
        return packed.forward(
            q, k, v, cu_seqlens_q, cu_seqlens_k, -1, -1, scale, False, -1, -1, None, 0.0, None, None, None, None, False
        )
    (tq, heads, dim), (tk, kv_heads, _) = q.shape, k.shape
    segments = cu_seqlens_k.shape[0] - 1
    if q.device.type == "cpu":
        cu_seqlens_list("cu_seqlens_q", cu_seqlens_q, tq)
        cu_seqlens_list("cu_seqlens_k", cu_seqlens_k, tk)
        check_media_index(media_index, segments)
    if media_index.dtype != torch.int32:
        media_index = media_index.clamp(-1, segments).to(torch.int32)
    q, scale = positive_scale(q, scale)
    q, k, v = aligned(q), aligned(k), aligned(v)
    cu, media = cu_seqlens_k.contiguous(), media_index.contiguous()
    out = q.new_empty(tq, heads, dim)
    lse = torch.empty(heads, tq, dtype=torch.float32, device=q.device)
    block = shape(q, 1, -1)
    tiles = -(-tq // block.rows)
    count = parts(q, tiles * heads, tk / max(1, cu_seqlens_q.shape[0] - 1), block.keys)

    def plan(to: Tensor, to_lse: Tensor) -> Plan:
        return Plan(
            "cross_attention.cu", "cross_attention_forward",
            (*block.defines(q), ("RANGE", media.dim() == 2), ("SPLIT", count > 1)), (tiles, heads, count), THREADS,
            (q, k, v, Out(to), Out(to_lse), cu, media, i64(q.stride(0)), i64(q.stride(1)), i64(k.stride(0)), i64(k.stride(1)),
             i64(v.stride(0)), i64(v.stride(1)), i32(tq), i32(tk), i32(segments), i32(heads // kv_heads), f32(scale * LOG2E)),
            block.shared(dim) + RUN_BYTES * block.rows,
        )  # fmt: skip

    cuda_runtime.run(split_plans(plan, out, lse, count))
    return out, lse
