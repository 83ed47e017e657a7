"""The oracle: dense attention, one sequence and one formula at a time, any dtype (computed in float64)."""

from __future__ import annotations

import torch
from torch import Tensor

from vlmops.ops._shared.checks import cu_seqlens_list
from vlmops.ops._shared.masks import attention_mask, safe_softmax
from vlmops.ops._shared.rope import apply_rope


def forward(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int,
    scale: float, causal: bool, left: int, right: int, prefix_lens: Tensor | None, softcap: float,
    cos_q: Tensor | None, sin_q: Tensor | None, cos_k: Tensor | None, sin_k: Tensor | None, interleaved: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """out [Tq, Hq, D] in q's dtype, lse [Hq, Tq]."""
    starts_q = cu_seqlens_list("cu_seqlens_q", cu_seqlens_q, q.shape[0])
    starts_k = cu_seqlens_list("cu_seqlens_k", cu_seqlens_k, k.shape[0])
    dtype, groups = q.dtype, q.shape[1] // k.shape[1]
    q, k, v = q.double(), k.double(), v.double()
    if cos_q is not None and sin_q is not None and cos_k is not None and sin_k is not None:
        q, k = apply_rope(q, cos_q, sin_q, interleaved), apply_rope(k, cos_k, sin_k, interleaved)
    k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    outs, lses = [q.new_empty(0, *q.shape[1:])], [q.new_empty(q.shape[1], 0)]
    for i in range(len(starts_q) - 1):
        qi, ki, vi = (
            q[starts_q[i] : starts_q[i + 1]],
            k[starts_k[i] : starts_k[i + 1]],
            v[starts_k[i] : starts_k[i + 1]],
        )
        scores = torch.einsum("qhd,khd->hqk", qi, ki) * scale  # [H, Lq, Lk]
        if softcap > 0:
            scores = softcap * torch.tanh(scores / softcap)
        prefix = int(prefix_lens[i]) if prefix_lens is not None else 0
        visible = attention_mask(len(qi), len(ki), causal, left, right, prefix, q.device)
        scores = scores.masked_fill(~visible, float("-inf"))
        p, lse = safe_softmax(scores)
        outs.append(torch.einsum("hqk,khd->qhd", p, vi))
        lses.append(lse)
    lse_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    return torch.cat(outs).to(dtype), torch.cat(lses, dim=1).to(lse_dtype)
