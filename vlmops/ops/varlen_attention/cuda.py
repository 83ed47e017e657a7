"""CUDA C++ for the sm_80 class (csrc/cuda/varlen_attention.cu): blocks find their tile on the device, keys stream through a ring.

The gradient is cuda_backward's. RoPE is one pass over q and k in front, as in the Triton backend.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vlmops.backends import cuda_runtime
from vlmops.backends.cuda_runtime import Out, Plan, f32, i32, i64
from vlmops.ops._shared.checks import cu_seqlens_list
from vlmops.ops._shared.cuda_attention import (
    THREADS,
    Shape,
    aligned,
    parts,
    positive_scale,
    score_scales,
    sequence_slots,
    shape,
    split_plans,
    why_not,
    window_bounds,
)
from vlmops.ops.rotary.cuda import rotate_heads
from vlmops.ops.varlen_attention import cuda_sm90
from vlmops.ops.varlen_attention.cuda_backward import backward
from vlmops.ops.varlen_attention.rope import rotated

__all__ = ["Shape", "backward", "forward", "shape", "supports"]


def supports(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int,
    scale: float, causal: bool, left: int, right: int, prefix_lens: Tensor | None, softcap: float,
    cos_q: Tensor | None, sin_q: Tensor | None, cos_k: Tensor | None, sin_k: Tensor | None, interleaved: bool,
) -> str | None:  # fmt: skip
    """Why this kernel cannot run these arguments; None if it can."""
    return why_not(q)


def forward(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int,
    scale: float, causal: bool, left: int, right: int, prefix_lens: Tensor | None, softcap: float,
    cos_q: Tensor | None, sin_q: Tensor | None, cos_k: Tensor | None, sin_k: Tensor | None, interleaved: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """out [Tq, Hq, D] in q's dtype, lse float32 [Hq, Tq]."""
    (tq, heads, dim), tk = q.shape, k.shape[0]
    if q.device.type == "cpu":
        cu_seqlens_list("cu_seqlens_q", cu_seqlens_q, tq)
        cu_seqlens_list("cu_seqlens_k", cu_seqlens_k, tk)
    q, k = rotated(rotate_heads, q, k, cos_q, sin_q, cos_k, sin_k, interleaved, False)
    if softcap <= 0.0:
        q, scale = positive_scale(q, scale)
    out = q.new_empty(tq, heads, dim)
    lse = torch.empty(heads, tq, dtype=torch.float32, device=q.device)
    cuda_runtime.run(forward_plans(q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, scale, causal, left, right,
                                   prefix_lens, softcap))  # fmt: skip
    return out, lse


def forward_plans(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int,
    scale: float, causal: bool, left: int, right: int, prefix_lens: Tensor | None, softcap: float,
) -> list[Plan]:  # fmt: skip
    """The launches; scale > 0, or a softcap."""
    q, k, v = aligned(q), aligned(k), aligned(v)
    cu_seqlens_q, cu_seqlens_k = cu_seqlens_q.contiguous(), cu_seqlens_k.contiguous()
    (tokens, heads, dim), n = q.shape, cu_seqlens_q.shape[0] - 1
    block = shape(q, n, max_seqlen_q)
    slots, per_sequence = sequence_slots(tokens, n, max_seqlen_q, block.rows)
    if prefix_lens is not None:
        prefix_lens = prefix_lens.to(torch.int32).contiguous()
    bounds = window_bounds(left, 0 if causal else right)
    scaled = score_scales(scale, softcap)
    seen = min(k.shape[0] / max(1, n), block.rows + sum(bounds))
    count = parts(q, slots * heads, seen, block.keys) if prefix_lens is None else 1
    if count == 1 and cuda_sm90.wanted(q, k, v):
        return [cuda_sm90.plan(q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, prefix_lens, max_seqlen_q, bounds, softcap > 0.0,
                               scaled)]  # fmt: skip

    def plan(to: Tensor, to_lse: Tensor) -> Plan:
        return Plan(
            "varlen_attention.cu", "varlen_attention_forward",
            (*block.defines(q), ("SOFTCAP", softcap > 0.0), ("SPLIT", count > 1)),
            (slots if tokens else 0, heads if n else 0, count), THREADS,
            (q, k, v, Out(to), Out(to_lse), cu_seqlens_q, cu_seqlens_k, prefix_lens, i64(q.stride(0)), i64(q.stride(1)),
             i64(k.stride(0)), i64(k.stride(1)), i64(v.stride(0)), i64(v.stride(1)), i32(tokens), i32(k.shape[0]), i32(n),
             i32(heads // k.shape[1]), i32(per_sequence), i32(bounds[0]), i32(bounds[1]), f32(scaled[0]), f32(scaled[1])),
            block.shared(dim),
        )  # fmt: skip

    return split_plans(plan, out, lse, count)
