"""The oracle: one dense [Tq, Tk] mask written out from the definition, any dtype (computed in float64)."""

from __future__ import annotations

import torch
from torch import Tensor

from vlmops.ops._shared.checks import cu_seqlens_list
from vlmops.ops._shared.masks import safe_softmax
from vlmops.ops.cross_attention.key_ranges import check_media_index


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    media_index: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """out [Tq, Hq, D] in q's dtype, lse [Hq, Tq]."""
    starts_q = cu_seqlens_list("cu_seqlens_q", cu_seqlens_q, q.shape[0])
    starts_k = cu_seqlens_list("cu_seqlens_k", cu_seqlens_k, k.shape[0])
    visible = torch.zeros(q.shape[0], k.shape[0], dtype=torch.bool)
    if media_index is None:
        for i in range(len(starts_q) - 1):
            visible[starts_q[i] : starts_q[i + 1], starts_k[i] : starts_k[i + 1]] = True
    else:
        check_media_index(media_index, len(starts_k) - 1)
        for row, seen in enumerate(media_index.tolist()):
            first, last = seen if isinstance(seen, list) else (seen, seen + 1)
            if first >= 0:
                visible[row, starts_k[first] : starts_k[last]] = True
    dtype, repeat = q.dtype, q.shape[1] // k.shape[1]
    q, k, v = (x.double() for x in (q, k, v))
    k, v = (x.repeat_interleave(repeat, dim=1) for x in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q, k) * scale
    p, lse = safe_softmax(scores.masked_fill(~visible.to(q.device), float("-inf")))
    # Hidden keys take no part, whatever is in them: 0 * NaN must not reach a query that does not see it.
    out = torch.einsum("hqk,khd->qhd", p, v)
    if bool(v.detach().isnan().any()):
        parts = [torch.einsum("hk,khd->hd", p[:, i, seen], v[seen]) for i, seen in enumerate(visible)]
        out = torch.stack(parts) if parts else out
    return out.to(dtype), lse.to(torch.float64 if dtype == torch.float64 else torch.float32)
