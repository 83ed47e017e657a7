"""Which run of packed keys each query sees, from its media_index: plain tensors, used by every backend."""

from __future__ import annotations

import torch
from torch import Tensor

from vlmops.ops._shared.checks import cu_seqlens_list
from vlmops.ops._shared.dense_attention import Segment

__all__ = ["check_media_index", "key_ranges", "query_runs", "sequence_segments"]


def check_media_index(media_index: Tensor, segments: int) -> None:
    """ValueError unless every number of a CPU media_index names one of ``segments`` segments (or none).

    Raises:
        ValueError: a number below -1 or past the last segment; a range that is not 0 <= first <= last <= segments.
    """
    if media_index.numel() == 0:
        return
    low, high = (int(x) for x in media_index.aminmax())
    if media_index.dim() == 1:
        if low < -1 or high >= segments:
            raise ValueError(
                f"media_index: expected -1 or a segment number below {segments}, got values {low} to {high}"
            )
    elif low < 0 or high > segments or bool((media_index[:, 0] > media_index[:, 1]).any()):
        raise ValueError(
            f"media_index: expected half-open ranges of the {segments} segments, first <= last, "
            f"got values {low} to {high}"
        )


def key_ranges(media_index: Tensor, cu_seqlens_k: Tensor) -> tuple[Tensor, Tensor]:
    """First and one past the last key of each query, int64 [Tq] each; equal where it sees none. Clamps, never syncs."""
    segments = cu_seqlens_k.shape[0] - 1
    if media_index.dim() == 1:
        at = media_index.long().clamp(-1, segments - 1)
        first, last = at.clamp(min=0), at + 1
    else:
        first, last = media_index.long().clamp(0, segments).unbind(1)
    begin, end = cu_seqlens_k[first].long(), cu_seqlens_k[torch.maximum(first, last)].long()
    return torch.where(last > first, begin, 0), torch.where(last > first, end, 0)


def sequence_segments(cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, tq: int, tk: int) -> list[Segment]:
    """Query sequence i over key segment i (CPU), both cu_seqlens checked."""
    starts_q = cu_seqlens_list("cu_seqlens_q", cu_seqlens_q, tq)
    starts_k = cu_seqlens_list("cu_seqlens_k", cu_seqlens_k, tk)
    return [Segment(*starts_q[i : i + 2], *starts_k[i : i + 2]) for i in range(len(starts_q) - 1)]


def query_runs(media_index: Tensor, cu_seqlens_k: Tensor, tk: int) -> tuple[Tensor | None, list[Segment]]:
    """Queries grouped by what they see (CPU).

    Returns:
        order: int64 [Tq] that brings queries with the same keys together, None where they lie so already.
        segments: the groups, in that order.
    """
    begin, end = key_ranges(media_index, cu_seqlens_k)
    code = begin * (tk + 1) + end
    order = None
    if bool((code[1:] < code[:-1]).any()):
        code, order = torch.sort(code, stable=True)
    values, counts = torch.unique_consecutive(code, return_counts=True)
    segments, q0 = [], 0
    for value, count in zip(values.tolist(), counts.tolist(), strict=True):
        segments.append(Segment(q0, q0 + count, value // (tk + 1), value % (tk + 1)))
        q0 += count
    return order, segments
