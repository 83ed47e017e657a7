"""Plain PyTorch: the numbers that e4m3 holds, in float32; sequence by sequence on the CPU, chunked masks elsewhere."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from vlmops.ops._shared.checks import cu_seqlens_list
from vlmops.ops._shared.dense_attention import CHUNK_BYTES
from vlmops.ops._shared.masks import attention_mask, has_mask
from vlmops.ops._shared.quantisation import round_e4m3
from vlmops.ops.fp8_attention.rounding import backward, rounded_heads
from vlmops.ops.varlen_attention.composition import visible_chunk

__all__ = ["backward", "forward"]


def forward(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int,
    scale: float, causal: bool, left: int, right: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """out [Tq, Hq, D] in q's dtype, lse [Hq, Tq]."""
    work = torch.promote_types(q.dtype, torch.float32)
    tq, tk, groups = q.shape[0], k.shape[0], q.shape[1] // k.shape[1]
    q8, k8, v8 = (rounded_heads(x, work).transpose(0, 1) for x in (q, k, v))  # [H, T, D]
    k8, v8 = k8.repeat_interleave(groups, dim=0), v8.repeat_interleave(groups, dim=0)
    out, lse = q.new_empty(q.shape), q8.new_empty(q.shape[1], tq)
    on_host = q.device.type == "cpu"
    starts_q = cu_seqlens_list("cu_seqlens_q", cu_seqlens_q, tq) if on_host else [0, tq]
    starts_k = cu_seqlens_list("cu_seqlens_k", cu_seqlens_k, tk) if on_host else [0, tk]
    for i in range(len(starts_q) - 1):
        q0, q1, k0, k1 = starts_q[i], starts_q[i + 1], starts_k[i], starts_k[i + 1]
        whole = None
        if on_host and has_mask(causal, left, right):
            whole = attention_mask(q1 - q0, k1 - k0, causal, left, right, 0, q.device)
        step = max(1, CHUNK_BYTES // max(1, 4 * (k1 - k0) * q.shape[1]))
        for first in range(q0, q1, step):
            last = min(first + step, q1)
            if on_host:
                visible = None if whole is None else whole[first - q0 : last - q0]
            else:
                visible = visible_chunk(
                    first, last, tk=tk, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k, causal=causal, left=left,
                    right=right, prefix_lens=None,
                )  # fmt: skip
            found, lse[:, first:last] = _rows(q8[:, first:last], k8[:, k0:k1], v8[:, k0:k1], visible, scale)
            out[first:last] = found.transpose(0, 1).to(q.dtype)
    return out, lse


def _rows(q8: Tensor, k8: Tensor, v8: Tensor, visible: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """Some query rows [H, L, D] over keys [H, Lk, D]: out [H, L, D], lse [H, L]."""
    if k8.shape[1] == 0:
        return torch.zeros_like(q8), q8.new_full(q8.shape[:2], float("-inf"))
    scores = (q8 @ k8.transpose(1, 2)) * (scale * math.log2(math.e))
    if visible is not None:
        scores = scores.masked_fill(~visible, float("-inf"))
    base = scores.amax(-1, keepdim=True).ceil()
    base = base.masked_fill(base == float("-inf"), 0.0)
    p = torch.exp2(scores - base + 8.0)
    total = p.sum(-1, keepdim=True)
    out = (round_e4m3(p) @ v8) / total.masked_fill(total == 0, 1.0)
    return out, (base + total.log2() - 8.0).squeeze(-1) * math.log(2.0)
