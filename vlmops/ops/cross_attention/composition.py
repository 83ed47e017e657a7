"""Plain PyTorch: queries grouped by what they see, SDPA on equal groups (CPU); chunked masks, no sync (GPU)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from vlmops.ops._shared import dense_attention as dense
from vlmops.ops._shared.checks import cu_seqlens_list
from vlmops.ops.cross_attention.key_ranges import check_media_index, key_ranges, query_runs, sequence_segments


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
    if q.device.type != "cpu":
        if media_index is None and dense.flash_fits(q):
            return dense.flash_varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, -1, -1, scale)
        return masked(q, k, v, cu_seqlens_q, cu_seqlens_k, media_index, scale)
    order, segments = _runs(q, k, cu_seqlens_q, cu_seqlens_k, media_index)
    if order is None:
        return dense.segment_attention(q, k, v, segments, scale)
    out, lse = dense.segment_attention(q[order], k, v, segments, scale)
    return torch.empty_like(out).index_copy_(0, order, out), torch.empty_like(lse).index_copy_(1, order, lse)


def _runs(
    q: Tensor, k: Tensor, cu_q: Tensor, cu_k: Tensor, media_index: Tensor | None
) -> tuple[Tensor | None, list[dense.Segment]]:
    if media_index is None:
        return None, sequence_segments(cu_q, cu_k, q.shape[0], k.shape[0])
    cu_seqlens_list("cu_seqlens_q", cu_q, q.shape[0])
    cu_seqlens_list("cu_seqlens_k", cu_k, k.shape[0])
    check_media_index(media_index, cu_k.shape[0] - 1)
    return query_runs(media_index, cu_k, k.shape[0])


# -- any device, no host read of a device value ------------------------------------------------------------------------


def visible_chunk(first: int, last: int, *, begin: Tensor, end: Tensor, tk: int) -> Tensor:
    """bool [last - first, Tk] from each query's first and one past its last key."""
    key = torch.arange(tk, device=begin.device)[None]
    return (key >= begin[first:last, None]) & (key < end[first:last, None])


def _ranges(q: Tensor, cu_q: Tensor, cu_k: Tensor, media_index: Tensor | None) -> tuple[Tensor, Tensor]:
    if media_index is None:
        tokens = torch.arange(q.shape[0], device=q.device)
        media_index = torch.searchsorted(cu_q[1:].contiguous(), tokens, right=True)
    return key_ranges(media_index, cu_k)


def masked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    media_index: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Masked attention over all keys, chunked over queries."""
    begin, end = _ranges(q, cu_seqlens_q, cu_seqlens_k, media_index)
    return dense.chunked_attention(q, k, v, partial(visible_chunk, begin=begin, end=end, tk=k.shape[0]), scale)


# -- backward ----------------------------------------------------------------------------------------------------------


def backward(
    grads: Sequence[Tensor | None], outs: Sequence[Tensor], args: Sequence[Any], needs: Sequence[bool]
) -> list[Tensor | None]:
    """Scores again from q, k and lse, one group of queries at a time; also takes a gradient of lse."""
    q, k, v, cu_q, cu_k, media_index, scale = args
    out, lse = outs
    grad_out = torch.zeros_like(out) if grads[0] is None else grads[0]
    delta = dense.row_delta(grad_out, grads[1], out)
    tiles: Iterable[dense.Tile]
    if q.device.type != "cpu":
        begin, end = _ranges(q, cu_q, cu_k, media_index)
        tiles = dense.chunked_tiles(q, k, partial(visible_chunk, begin=begin, end=end, tk=k.shape[0]))
        return list(dense.attention_backward(q, k, v, grad_out, lse, delta, tiles, scale))
    order, segments = _runs(q, k, cu_q, cu_k, media_index)
    tiles = dense.segment_tiles(segments, q.shape[1])
    if order is None:
        return list(dense.attention_backward(q, k, v, grad_out, lse, delta, tiles, scale))
    dq, dk, dv = dense.attention_backward(q[order], k, v, grad_out[order], lse[:, order], delta[:, order], tiles, scale)
    return [torch.empty_like(dq).index_copy_(0, order, dq), dk, dv]
