"""Plain-PyTorch attention over rectangles of packed tokens: what the ``torch`` backends of the three attentions share.

A rectangle (``Segment``) is a run of queries that all see the same run of keys. On the CPU rectangles are known on the
host and run as dense batches; on other devices masks are made on the device, chunk by chunk, without a host read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from vlmops.ops._shared.masks import safe_softmax
from vlmops.ops._shared.strides import dense_rows

CHUNK_BYTES = 1 << 28  # scores held at once by the chunked paths

#: One piece of a backward: query rows, key rows, and which of them are visible (None: all).
Tile = tuple[tuple[int, int], tuple[int, int], Tensor | None]


class Segment(NamedTuple):
    """Queries q0..q1 see keys k0..k1; ``tag`` tells the mask rule apart (varlen_attention: the prefix length)."""

    q0: int
    q1: int
    k0: int
    k1: int
    tag: int = 0


def lse_dtype(x: Tensor) -> torch.dtype:
    """float64 for float64, else float32."""
    return torch.promote_types(x.dtype, torch.float32)


# -- CPU: one SDPA call for each group of equal rectangles -------------------------------------------------------------


def gather(x: Tensor, starts: Sequence[int], length: int) -> Tensor:
    """The runs at ``starts`` of packed x [T, H, D] as [n, H, length, D]: a view if they lie in a row, else a copy."""
    first, n = starts[0], len(starts)
    if all(start == first + i * length for i, start in enumerate(starts)):
        part = x[first : first + n * length].unflatten(0, (n, length))
    elif all(start == first for start in starts):
        part = x[first : first + length].expand(n, -1, -1, -1)
    else:
        part = torch.stack([x[start : start + length] for start in starts])
    return part.transpose(1, 2)


def batch_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, softcap: float
) -> tuple[Tensor, Tensor]:
    """Dense attention of one batch of rectangles on the CPU.

    Args:
        q: [B, Hq, Lq, D].
        k, v: [B, Hkv, Lk, D], Hq a multiple of Hkv.
        mask: bool [Lq, Lk], True where visible; None: all.

    Returns:
        out [B, Hq, Lq, D] in q's dtype, lse [B, Hq, Lq]; no visible key gives 0 and -inf.
    """
    repeat = q.shape[1] // max(1, k.shape[1])
    if repeat > 1 and mask is None:
        # The query heads of one key head are more rows over the same keys: no copy of k and v for grouped queries.
        rows = q.shape[2]
        out, lse = batch_attention(q.unflatten(1, (-1, repeat)).flatten(2, 3), k, v, None, scale, softcap)
        return out.unflatten(2, (repeat, rows)).flatten(1, 2), lse.unflatten(2, (repeat, rows)).flatten(1, 2)
    if repeat > 1:
        k, v = (x.repeat_interleave(repeat, dim=1) for x in (k, v))
    # torch's fused CPU kernel turns a NaN query into 0 where there are fewer than 16 keys: plain formula then.
    small = q.shape[2] == 0 or k.shape[2] < 16 or q.shape[0] == 0
    hidden_rows = mask is not None and not small and not bool(mask.any(dim=-1).all())
    if softcap == 0.0 and not small and not hidden_rows and q.shape[1] > 0:
        bias = (
            None
            if mask is None
            else torch.zeros(mask.shape, dtype=q.dtype).masked_fill(~mask, float("-inf"))[None, None]
        )
        # It reads rows as if they were dense: with another inner stride it computes garbage.
        q, k, v = dense_rows(q), dense_rows(k), dense_rows(v)
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, False, attn_mask=bias, scale=scale
        )
    work = lse_dtype(q)
    scores = (q.to(work) @ k.to(work).transpose(-1, -2)) * scale
    if softcap > 0:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    p, lse = safe_softmax(scores)
    return (p @ v.to(work)).to(q.dtype), lse


def segment_attention(
    q: Tensor, k: Tensor, v: Tensor, segments: Sequence[Segment], scale: float, softcap: float = 0.0,
    mask_of: Callable[[int, int, int], Tensor | None] | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Attention of packed q [Tq, Hq, D] over k, v [Tk, Hkv, D], rectangle by rectangle; equal ones are one call.

    Args:
        segments: rectangles whose query rows lie behind each other and cover q.
        mask_of: visible keys, bool [Lq, Lk], from (Lq, Lk, tag); None: every key of the rectangle.

    Returns:
        out [Tq, Hq, D] in q's dtype, contiguous; lse [Hq, Tq].
    """
    segments = [s for s in segments if s.q1 > s.q0]  # keys without queries, as a KV cache's free room, cost nothing
    if not segments:
        return torch.empty_like(q, memory_format=torch.contiguous_format), q.new_empty(
            q.shape[1], 0, dtype=lse_dtype(q)
        )
    alike: dict[tuple[int, int, int], list[int]] = {}
    for i, s in enumerate(segments):
        alike.setdefault((s.q1 - s.q0, s.k1 - s.k0, s.tag), []).append(i)
    outs, lses = ([q.new_empty(0)] * len(segments) for _ in range(2))
    for (len_q, len_k, tag), indices in alike.items():
        mask = mask_of(len_q, len_k, tag) if mask_of is not None else None
        starts_k = [segments[i].k0 for i in indices]
        out, lse = batch_attention(
            gather(q, [segments[i].q0 for i in indices], len_q), gather(k, starts_k, len_k), gather(v, starts_k, len_k),
            mask, scale, softcap,
        )  # fmt: skip
        for j, i in enumerate(indices):
            outs[i], lses[i] = out[j].transpose(0, 1), lse[j]
    return torch.cat(outs), torch.cat(lses, dim=1).to(lse_dtype(q))


def segment_tiles(
    segments: Iterable[Segment], heads: int, mask_of: Callable[[int, int, int], Tensor | None] | None = None
) -> Iterable[Tile]:
    """The same rectangles as pieces of a backward, cut into chunks of queries that bound the memory of the scores."""
    for s in segments:
        if s.q0 == s.q1:
            continue
        visible = mask_of(s.q1 - s.q0, s.k1 - s.k0, s.tag) if mask_of is not None else None
        rows = max(1, CHUNK_BYTES // max(1, 8 * (s.k1 - s.k0) * heads))
        for first in range(s.q0, s.q1, rows):
            last = min(first + rows, s.q1)
            yield (first, last), (s.k0, s.k1), None if visible is None else visible[first - s.q0 : last - s.q0]


# -- any device, no host read of a device value ------------------------------------------------------------------------


def flash_fits(q: Tensor) -> bool:
    """Whether torch's FlashAttention kernel takes these heads."""
    half = q.dtype in (torch.bfloat16, torch.float16)
    return q.device.type == "cuda" and half and q.shape[2] % 8 == 0 and q.shape[2] <= 256


def flash_varlen(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_q: int, max_k: int,
    scale: float, causal: bool = False, left: int = -1, right: int = -1,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """torch's own FlashAttention varlen kernel: out [Tq, Hq, D], lse [Hq, Tq]."""
    out, lse, *_ = torch.ops.aten._flash_attention_forward(
        q, k, v, cu_seqlens_q.int(), cu_seqlens_k.int(), max_q if max_q > 0 else q.shape[0],
        max_k if max_k > 0 else k.shape[0], 0.0, causal, False, scale=scale,
        window_size_left=left if left >= 0 else None, window_size_right=right if right >= 0 else None,
    )  # fmt: skip
    return out, lse


def chunked_attention(
    q: Tensor, k: Tensor, v: Tensor, visible: Callable[[int, int], Tensor], scale: float, softcap: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Masked attention over all keys, chunked over queries to bound memory.

    Args:
        visible: ``visible(first, last)`` is bool [last - first, Tk], made on the device.

    Returns:
        out [Tq, Hq, D] in q's dtype, lse [Hq, Tq].
    """
    work, tk = lse_dtype(q), k.shape[0]
    repeat = q.shape[1] // k.shape[1]
    keys = k.repeat_interleave(repeat, dim=1).to(work).permute(1, 2, 0)  # [H, D, Tk]
    values = v.repeat_interleave(repeat, dim=1).to(work).transpose(0, 1)  # [H, Tk, D]
    rows = max(1, CHUNK_BYTES // max(1, 4 * tk * q.shape[1]))
    outs, lses = [], []
    for first in range(0, q.shape[0], rows):
        last = min(first + rows, q.shape[0])
        scores = (q[first:last].to(work).transpose(0, 1) @ keys) * scale  # [H, rows, Tk]
        if softcap > 0:
            scores = softcap * torch.tanh(scores / softcap)
        p, lse = safe_softmax(scores.masked_fill(~visible(first, last), float("-inf")))
        outs.append((p @ values).transpose(0, 1).to(q.dtype))
        lses.append(lse)
    if not outs:
        return torch.empty_like(q, memory_format=torch.contiguous_format), q.new_empty(q.shape[1], 0, dtype=work)
    return torch.cat(outs), torch.cat(lses, dim=1)


def chunked_tiles(q: Tensor, k: Tensor, visible: Callable[[int, int], Tensor]) -> Iterable[Tile]:
    """Pieces of a backward where rectangles are not known on the host: every chunk of queries against all keys."""
    rows = max(1, CHUNK_BYTES // max(1, 8 * k.shape[0] * q.shape[1]))
    for first in range(0, q.shape[0], rows):
        last = min(first + rows, q.shape[0])
        yield (first, last), (0, k.shape[0]), visible(first, last)


# -- backward ----------------------------------------------------------------------------------------------------------


def row_delta(grad_out: Tensor, grad_lse: Tensor | None, out: Tensor) -> Tensor:
    """[H, Tq]: sum of grad * out over each head, less the gradient of lse (a z-loss), which enters here."""
    work = lse_dtype(out)
    delta = (grad_out.to(work) * out.to(work)).sum(-1).t()
    return delta if grad_lse is None else delta - grad_lse.to(work)


def attention_backward(
    q: Tensor, k: Tensor, v: Tensor, grad_out: Tensor, lse: Tensor, delta: Tensor, tiles: Iterable[Tile],
    scale: float, softcap: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """FlashAttention-2's backward in plain PyTorch: scores again from q, k and lse, one tile at a time.

    ``lse`` and ``delta`` [H, Tq] belong to the whole row, so that a row whose keys come from two sources is
    differentiated source by source.

    Returns:
        dq [Tq, Hq, D], dk and dv [Tk, Hkv, D], in float32 (float64 for float64).
    """
    work = lse_dtype(q)
    repeat = q.shape[1] // k.shape[1]
    dq = torch.zeros(q.shape, dtype=work, device=q.device)
    dk, dv = (torch.zeros(k.shape[0], q.shape[1], q.shape[2], dtype=work, device=q.device) for _ in range(2))
    for (q0, q1), (k0, k1), visible in tiles:
        if k1 <= k0 or q1 <= q0:
            continue
        qi = q[q0:q1].to(work).transpose(0, 1)  # [H, rows, D]
        ki, vi = (x[k0:k1].to(work).repeat_interleave(repeat, dim=1).transpose(0, 1) for x in (k, v))
        gi = grad_out[q0:q1].to(work).transpose(0, 1)
        scores = (qi @ ki.transpose(-1, -2)) * scale
        if softcap > 0:
            capped = torch.tanh(scores / softcap)
            scores = softcap * capped
        row = lse[:, q0:q1].to(work)[..., None]
        p = torch.exp(scores - row.masked_fill(row == float("-inf"), float("inf")))
        if visible is not None:
            p = p.masked_fill(~visible, 0.0)
        ds = p * (gi @ vi.transpose(-1, -2) - delta[:, q0:q1, None])
        if softcap > 0:
            ds = ds * (1 - capped * capped)
        ds = ds * scale
        dq[q0:q1] += (ds @ ki).transpose(0, 1)
        dk[k0:k1] += (ds.transpose(-1, -2) @ qi).transpose(0, 1)
        dv[k0:k1] += (p.transpose(-1, -2) @ gi).transpose(0, 1)
    if repeat > 1:
        dk, dv = (x.unflatten(1, (-1, repeat)).sum(2) for x in (dk, dv))
    return dq, dk, dv
