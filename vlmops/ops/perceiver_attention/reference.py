"""The oracle: keys and values concatenated item by item, any dtype (computed in float64)."""

from __future__ import annotations

import torch
from torch import Tensor

from vlmops.ops._shared.checks import cu_seqlens_list
from vlmops.ops._shared.masks import safe_softmax


def forward(
    q: Tensor, k_context: Tensor, v_context: Tensor, k_latent: Tensor | None, v_latent: Tensor | None,
    cu_seqlens_context: Tensor, num_latents: int, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """out [n * num_latents, Hq, D] in q's dtype, lse [Hq, n * num_latents]."""
    starts = cu_seqlens_list("cu_seqlens_context", cu_seqlens_context, k_context.shape[0])
    dtype, repeat = q.dtype, q.shape[1] // k_context.shape[1]
    q = q.double()
    outs, lses = [q.new_empty(0, *q.shape[1:])], [q.new_empty(q.shape[1], 0)]
    for i in range(len(starts) - 1):
        own = slice(i * num_latents, (i + 1) * num_latents)
        k, v = k_context[starts[i] : starts[i + 1]], v_context[starts[i] : starts[i + 1]]
        if k_latent is not None and v_latent is not None:
            k, v = torch.cat((k, k_latent[own])), torch.cat((v, v_latent[own]))
        k, v = (x.double().repeat_interleave(repeat, dim=1) for x in (k, v))
        p, lse = safe_softmax(torch.einsum("qhd,khd->hqk", q[own], k) * scale)
        outs.append(torch.einsum("hqk,khd->qhd", p, v))
        lses.append(lse)
    lse_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    return torch.cat(outs).to(dtype), torch.cat(lses, dim=1).to(lse_dtype)
