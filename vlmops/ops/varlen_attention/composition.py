"""The best plain-PyTorch composition: SDPA on batches of equal sequences (CPU), flash varlen or chunked masks (GPU)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from vlmops.ops._shared import dense_attention as dense
from vlmops.ops._shared.checks import cu_seqlens_list
from vlmops.ops._shared.masks import attention_mask, has_mask
from vlmops.ops._shared.rope import apply_rope, rotate


def forward(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int,
    scale: float, causal: bool, left: int, right: int, prefix_lens: Tensor | None, softcap: float,
    cos_q: Tensor | None, sin_q: Tensor | None, cos_k: Tensor | None, sin_k: Tensor | None, interleaved: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """out [Tq, Hq, D] in q's dtype, lse [Hq, Tq]."""
    if cos_q is not None and sin_q is not None and cos_k is not None and sin_k is not None:
        q, k = apply_rope(q, cos_q, sin_q, interleaved), apply_rope(k, cos_k, sin_k, interleaved)
    if q.device.type == "cpu":
        segments = _segments(q, k, cu_seqlens_q, cu_seqlens_k, prefix_lens)
        return dense.segment_attention(q, k, v, segments, scale, softcap, _mask_rule(causal, left, right, q.device))
    if dense.flash_fits(q) and softcap == 0.0 and prefix_lens is None:
        return dense.flash_varlen(
            q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, scale, causal, left, right
        )
    return packed_dense(q, k, v, cu_seqlens_q, cu_seqlens_k, scale, causal, left, right, prefix_lens, softcap)


# -- CPU: borders known on the host ------------------------------------------------------------------------------------


def _segments(q: Tensor, k: Tensor, cu_q: Tensor, cu_k: Tensor, prefix_lens: Tensor | None) -> list[dense.Segment]:
    starts_q = cu_seqlens_list("cu_seqlens_q", cu_q, q.shape[0])
    starts_k = cu_seqlens_list("cu_seqlens_k", cu_k, k.shape[0])
    n = len(starts_q) - 1
    prefix = prefix_lens.tolist() if prefix_lens is not None else [0] * n
    return [dense.Segment(starts_q[i], starts_q[i + 1], starts_k[i], starts_k[i + 1], prefix[i]) for i in range(n)]


def _mask_rule(causal: bool, left: int, right: int, device: torch.device) -> Callable[[int, int, int], Tensor] | None:
    """(Lq, Lk, prefix) -> visible keys; None where every key is."""
    if not has_mask(causal, left, right):
        return None
    return lambda len_q, len_k, prefix: attention_mask(len_q, len_k, causal, left, right, prefix, device)


# -- any device, no host read of a device value ------------------------------------------------------------------------


def visible_chunk(
    first: int, last: int, *, tk: int, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, causal: bool, left: int, right: int,
    prefix_lens: Tensor | None,
) -> Tensor:  # fmt: skip
    """bool [last - first, Tk]: what packed queries first..last see, from cu_seqlens on the device alone."""
    device = cu_seqlens_q.device
    tokens_q, tokens_k = torch.arange(first, last, device=device), torch.arange(tk, device=device)
    limit = cu_seqlens_q.shape[0] - 2
    seg_q = torch.searchsorted(cu_seqlens_q[1:].contiguous(), tokens_q, right=True).clamp_(max=max(limit, 0))
    seg_k = torch.searchsorted(cu_seqlens_k[1:].contiguous(), tokens_k, right=True)
    len_q, len_k = cu_seqlens_q.diff()[seg_q], cu_seqlens_k.diff()[seg_q]
    at = (tokens_q - cu_seqlens_q[seg_q] + len_k - len_q)[:, None]
    key = tokens_k[None] - cu_seqlens_k[seg_q][:, None]
    visible = torch.ones(last - first, tk, dtype=torch.bool, device=device)
    if causal:
        visible &= key <= at
    if right >= 0:
        visible &= key <= at + right
    if left >= 0:
        visible &= key >= at - left
    if prefix_lens is not None:
        visible |= key < prefix_lens[seg_q][:, None]
    return visible & (seg_q[:, None] == seg_k[None])


def packed_dense(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, scale: float, causal: bool,
    left: int, right: int, prefix_lens: Tensor | None, softcap: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Masked attention over all keys, chunked over queries to bound memory; no device value is read by the host."""
    visible = partial(
        visible_chunk, tk=k.shape[0], cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k,
        causal=causal, left=left, right=right, prefix_lens=prefix_lens,
    )  # fmt: skip
    return dense.chunked_attention(q, k, v, visible, scale, softcap)


# -- backward ----------------------------------------------------------------------------------------------------------


def backward(
    grads: Sequence[Tensor | None], outs: Sequence[Tensor], args: Sequence[Any], needs: Sequence[bool]
) -> list[Tensor | None]:
    """Scores again from q, k and lse, one tile at a time; also takes a gradient of lse."""
    (
        q,
        k,
        v,
        cu_q,
        cu_k,
        _,
        _,
        scale,
        causal,
        left,
        right,
        prefix_lens,
        softcap,
        cos_q,
        sin_q,
        cos_k,
        sin_k,
        interleaved,
    ) = args
    out, lse = outs
    grad_out = torch.zeros_like(out) if grads[0] is None else grads[0]
    qr, kr = q, k
    if cos_q is not None:
        qr, kr = apply_rope(q, cos_q, sin_q, interleaved), apply_rope(k, cos_k, sin_k, interleaved)
    tiles: Iterable[dense.Tile]
    if q.device.type == "cpu":
        tiles = dense.segment_tiles(
            _segments(q, k, cu_q, cu_k, prefix_lens), q.shape[1], _mask_rule(causal, left, right, q.device)
        )
    else:
        visible = partial(
            visible_chunk, tk=k.shape[0], cu_seqlens_q=cu_q, cu_seqlens_k=cu_k,
            causal=causal, left=left, right=right, prefix_lens=prefix_lens,
        )  # fmt: skip
        tiles = dense.chunked_tiles(q, k, visible)
    delta = dense.row_delta(grad_out, grads[1], out)
    dq, dk, dv = dense.attention_backward(qr, kr, v, grad_out, lse, delta, tiles, scale, softcap)
    if cos_q is not None:
        dq, dk = rope_backward(dq, cos_q, sin_q, interleaved), rope_backward(dk, cos_k, sin_k, interleaved)
    return [dq, dk, dv]


def rope_backward(grad: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """Transpose of ``apply_rope``: grad * cos - rotate(grad * sin)."""
    c, s = cos.to(grad.dtype)[:, None], sin.to(grad.dtype)[:, None]
    return grad * c - rotate(grad * s, interleaved)
