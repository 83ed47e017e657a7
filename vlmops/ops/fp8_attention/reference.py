"""The oracle: the quantised formula, one sequence at a time, in float64."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from vlmops.ops._shared.checks import cu_seqlens_list
from vlmops.ops._shared.masks import attention_mask
from vlmops.ops._shared.quantisation import round_e4m3
from vlmops.ops.fp8_attention.rounding import backward, rounded_heads

__all__ = ["backward", "forward"]


def forward(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int,
    scale: float, causal: bool, left: int, right: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """out [Tq, Hq, D] in q's dtype, lse [Hq, Tq]."""
    starts_q = cu_seqlens_list("cu_seqlens_q", cu_seqlens_q, q.shape[0])
    starts_k = cu_seqlens_list("cu_seqlens_k", cu_seqlens_k, k.shape[0])
    dtype, groups = q.dtype, q.shape[1] // k.shape[1]
    q8, k8, v8 = (rounded_heads(x, torch.float64) for x in (q, k, v))
    k8, v8 = k8.repeat_interleave(groups, dim=1), v8.repeat_interleave(groups, dim=1)
    out, lse = torch.zeros_like(q8), q8.new_full((q.shape[1], q.shape[0]), float("-inf"))
    for i in range(len(starts_q) - 1):
        rows, keys = slice(starts_q[i], starts_q[i + 1]), slice(starts_k[i], starts_k[i + 1])
        visible = attention_mask(rows.stop - rows.start, keys.stop - keys.start, causal, left, right, 0, q.device)
        if not visible.numel():
            continue
        scores = torch.einsum("qhd,khd->hqk", q8[rows], k8[keys]) * (scale * math.log2(math.e))
        scores = scores.masked_fill(~visible, float("-inf"))
        base = scores.amax(-1, keepdim=True).ceil()
        base = base.masked_fill(base == float("-inf"), 0.0)
        p = torch.exp2(scores - base)  # [H, Lq, Lk]
        total = p.sum(-1)
        weights = round_e4m3(p * 256.0) / 256.0
        seen = total.masked_fill(total == 0, 1.0)
        out[rows] = torch.einsum("hqk,khd->qhd", weights / seen[..., None], v8[keys])
        lse[:, rows] = (base[..., 0] + torch.log2(total)) * math.log(2.0)
    return out.to(dtype), lse.to(torch.float64 if dtype == torch.float64 else torch.float32)
