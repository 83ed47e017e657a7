"""Plain PyTorch: one attention over the context, one over the latents, merged exactly by their log-sum-exps.

Neither source is copied. Merging costs one pass over the output, concatenating one over all keys and values, and there
are far fewer queries than keys.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from vlmops.ops._shared import dense_attention as dense
from vlmops.ops._shared.checks import cu_seqlens_list


def forward(
    q: Tensor, k_context: Tensor, v_context: Tensor, k_latent: Tensor | None, v_latent: Tensor | None,
    cu_seqlens_context: Tensor, num_latents: int, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """out [n * num_latents, Hq, D] in q's dtype, lse [Hq, n * num_latents]."""
    if q.device.type == "cpu":
        out, lse = _context_cpu(q, k_context, v_context, cu_seqlens_context, num_latents, scale)
    elif dense.flash_fits(q):
        cu_q = _latent_starts(q, num_latents)
        out, lse = dense.flash_varlen(q, k_context, v_context, cu_q, cu_seqlens_context, num_latents, -1, scale)
    else:
        out, lse = masked(q, k_context, v_context, cu_seqlens_context, num_latents, scale)
    if k_latent is None or v_latent is None:
        return out, lse
    return merge(out, lse, *_latents(q, k_latent, v_latent, num_latents, scale))


def merge(out: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Two attentions of the same queries over disjoint keys as one, by their log-sum-exps.

    Args:
        out, other: [T, H, D].
        lse, other_lse: [H, T].
    """
    both = torch.logaddexp(lse, other_lse)
    shift = both.masked_fill(both == float("-inf"), 0.0)  # no key on either side: both weights are exp(-inf) = 0
    weight, other_weight = (torch.exp(x - shift).t()[..., None] for x in (lse, other_lse))
    return (out * weight + other * other_weight).to(out.dtype), both


def _latent_starts(q: Tensor, num_latents: int) -> Tensor:
    return torch.arange(0, q.shape[0] + 1, num_latents, dtype=torch.int32, device=q.device)


def _context_segments(cu: Tensor, tc: int, num_latents: int) -> list[dense.Segment]:
    starts = cu_seqlens_list("cu_seqlens_context", cu, tc)
    return [
        dense.Segment(i * num_latents, (i + 1) * num_latents, starts[i], starts[i + 1]) for i in range(len(starts) - 1)
    ]


def _latent_segments(tq: int, num_latents: int) -> list[dense.Segment]:
    return [dense.Segment(i, i + num_latents, i, i + num_latents) for i in range(0, tq, num_latents)]


def _context_cpu(q: Tensor, k: Tensor, v: Tensor, cu: Tensor, num_latents: int, scale: float) -> tuple[Tensor, Tensor]:
    return dense.segment_attention(q, k, v, _context_segments(cu, k.shape[0], num_latents), scale)


def _latents(q: Tensor, k: Tensor, v: Tensor, num_latents: int, scale: float) -> tuple[Tensor, Tensor]:
    """Items are equally long here, so this is one dense batch on every device."""
    if q.device.type == "cpu":
        return dense.segment_attention(q, k, v, _latent_segments(q.shape[0], num_latents), scale)
    if dense.flash_fits(q):
        cu = _latent_starts(q, num_latents)
        return dense.flash_varlen(q, k, v, cu, cu, num_latents, num_latents, scale)
    work, repeat = dense.lse_dtype(q), q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(repeat, dim=1) for x in (k, v))
    qi, ki, vi = (x.to(work).unflatten(0, (-1, num_latents)).transpose(1, 2) for x in (q, k, v))  # [n, H, L, D]
    scores = (qi @ ki.transpose(-1, -2)) * scale
    lse = torch.logsumexp(scores, dim=-1)
    out = (torch.exp(scores - lse[..., None]) @ vi).transpose(1, 2).flatten(0, 1)
    return out.to(q.dtype), lse.transpose(0, 1).flatten(1)


# -- any device, no host read of a device value ------------------------------------------------------------------------


def visible_chunk(first: int, last: int, *, cu: Tensor, num_latents: int, tk: int) -> Tensor:
    """bool [last - first, Tk]: the context of each query's item."""
    item = torch.arange(first, last, device=cu.device).div(num_latents, rounding_mode="floor")
    key = torch.arange(tk, device=cu.device)[None]
    return (key >= cu[item][:, None]) & (key < cu[item + 1][:, None])


def masked(q: Tensor, k: Tensor, v: Tensor, cu: Tensor, num_latents: int, scale: float) -> tuple[Tensor, Tensor]:
    """The context's part with masks over all keys, chunked over queries."""
    return dense.chunked_attention(
        q, k, v, partial(visible_chunk, cu=cu, num_latents=num_latents, tk=k.shape[0]), scale
    )


# -- backward ----------------------------------------------------------------------------------------------------------


def backward(
    grads: Sequence[Tensor | None], outs: Sequence[Tensor], args: Sequence[Any], needs: Sequence[bool]
) -> list[Tensor | None]:
    """Each source on its own: lse and the row sum of grad * out belong to the whole row, so the parts just add up."""
    q, k_context, v_context, k_latent, v_latent, cu, num_latents, scale = args
    out, lse = outs
    grad_out = torch.zeros_like(out) if grads[0] is None else grads[0]
    delta = dense.row_delta(grad_out, grads[1], out)
    if q.device.type == "cpu":
        tiles = dense.segment_tiles(_context_segments(cu, k_context.shape[0], num_latents), q.shape[1])
    else:
        visible = partial(visible_chunk, cu=cu, num_latents=num_latents, tk=k_context.shape[0])
        tiles = dense.chunked_tiles(q, k_context, visible)
    dq, dk, dv = dense.attention_backward(q, k_context, v_context, grad_out, lse, delta, tiles, scale)
    if k_latent is None:
        return [dq, dk, dv, None, None]
    tiles = dense.segment_tiles(_latent_segments(q.shape[0], num_latents), q.shape[1])
    dq_latent, dk_latent, dv_latent = dense.attention_backward(
        q, k_latent, v_latent, grad_out, lse, delta, tiles, scale
    )
    return [dq + dq_latent, dk, dv, dk_latent, dv_latent]
