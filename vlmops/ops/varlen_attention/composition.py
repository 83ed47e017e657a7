"""The best plain-PyTorch composition: SDPA on batches of equal sequences (CPU), flash varlen or chunked masks (GPU)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from vlmops.ops._shared.checks import cu_seqlens_list
from vlmops.ops._shared.masks import attention_mask, has_mask, safe_softmax
from vlmops.ops._shared.rope import apply_rope, rotate

CHUNK_BYTES = 1 << 28  # scores held at once by the chunked paths


def forward(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int,
    scale: float, causal: bool, left: int, right: int, prefix_lens: Tensor | None, softcap: float,
    cos_q: Tensor | None, sin_q: Tensor | None, cos_k: Tensor | None, sin_k: Tensor | None, interleaved: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """out [Tq, Hq, D] in q's dtype, lse [Hq, Tq]."""
    if cos_q is not None:
        q, k = apply_rope(q, cos_q, sin_q, interleaved), apply_rope(k, cos_k, sin_k, interleaved)
    if q.device.type == "cpu":
        return _cpu(q, k, v, cu_seqlens_q, cu_seqlens_k, scale, causal, left, right, prefix_lens, softcap)
    plain = softcap == 0.0 and prefix_lens is None and q.dtype in (torch.bfloat16, torch.float16)
    if q.device.type == "cuda" and plain and q.shape[2] % 8 == 0 and q.shape[2] <= 256:
        return _flash(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, scale, causal, left, right)
    return packed_dense(q, k, v, cu_seqlens_q, cu_seqlens_k, scale, causal, left, right, prefix_lens, softcap)


# -- CPU: one SDPA call for each group of equal sequences --------------------------------------------------------------


def groups(starts_q: Sequence[int], starts_k: Sequence[int], prefix: Sequence[int]) -> Iterator[tuple[list[int], int, int, int]]:
    """Sequences with the same (Lq, Lk, prefix), so that 64 windows are one call: yields (indices, Lq, Lk, prefix)."""
    found: dict[tuple[int, int, int], list[int]] = {}
    for i, p in enumerate(prefix):
        found.setdefault((starts_q[i + 1] - starts_q[i], starts_k[i + 1] - starts_k[i], p), []).append(i)
    for (len_q, len_k, p), indices in found.items():
        yield indices, len_q, len_k, p


def gather(x: Tensor, starts: Sequence[int], indices: Sequence[int], length: int) -> Tensor:
    """[n, H, length, D] view (adjacent sequences) or copy of the sequences ``indices`` of packed x [T, H, D]."""
    first, n = indices[0], len(indices)
    if indices[-1] - first == n - 1:
        part = x[starts[first] : starts[first] + n * length].unflatten(0, (n, length))
    else:
        part = torch.stack([x[starts[i] : starts[i] + length] for i in indices])
    return part.transpose(1, 2)


def _cpu(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, scale: float, causal: bool,
    left: int, right: int, prefix_lens: Tensor | None, softcap: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    starts_q = cu_seqlens_list("cu_seqlens_q", cu_seqlens_q, q.shape[0])
    starts_k = cu_seqlens_list("cu_seqlens_k", cu_seqlens_k, k.shape[0])
    n = len(starts_q) - 1
    prefix = prefix_lens.tolist() if prefix_lens is not None else [0] * n
    repeat = q.shape[1] // k.shape[1]
    outs: list[Tensor | None] = [None] * n
    lses: list[Tensor | None] = [None] * n
    for indices, len_q, len_k, p in groups(starts_q, starts_k, prefix):
        qg, kg, vg = gather(q, starts_q, indices, len_q), gather(k, starts_k, indices, len_k), gather(v, starts_k, indices, len_k)
        kg, vg = (x.repeat_interleave(repeat, dim=1) if repeat > 1 else x for x in (kg, vg))
        mask = attention_mask(len_q, len_k, causal, left, right, p, q.device) if has_mask(causal, left, right) else None
        out, lse = _batch(qg, kg, vg, mask, scale, softcap)
        for j, i in enumerate(indices):
            outs[i], lses[i] = out[j].transpose(0, 1), lse[j]
    lse_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    if n == 0:
        return torch.empty_like(q, memory_format=torch.contiguous_format), q.new_empty(q.shape[1], 0, dtype=lse_dtype)
    return torch.cat([o for o in outs if o is not None]), torch.cat([s for s in lses if s is not None], dim=1).to(lse_dtype)


def _batch(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, softcap: float) -> tuple[Tensor, Tensor]:
    """Dense attention [B, H, Lq, D] of one group, with lse [B, H, Lq]."""
    # torch's fused CPU kernel turns a NaN query into 0 where there are fewer than 16 keys: those take the plain formula.
    small = q.shape[2] == 0 or k.shape[2] < 16 or q.shape[0] == 0
    hidden_rows = mask is not None and not small and not bool(mask.any(dim=-1).all())
    if softcap == 0.0 and not small and not hidden_rows and q.shape[1] > 0:
        bias = None if mask is None else torch.zeros(mask.shape, dtype=q.dtype).masked_fill(~mask, float("-inf"))[None, None]
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, False, attn_mask=bias, scale=scale)
    work = torch.promote_types(q.dtype, torch.float32)
    scores = (q.to(work) @ k.to(work).transpose(-1, -2)) * scale
    if softcap > 0:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    p, lse = safe_softmax(scores)
    return (p @ v.to(work)).to(q.dtype), lse


# -- any device, no host read of a device value ------------------------------------------------------------------------


def _flash(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_q: int, max_k: int,
    scale: float, causal: bool, left: int, right: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """torch's own FlashAttention varlen kernel."""
    out, lse, *_ = torch.ops.aten._flash_attention_forward(
        q, k, v, cu_seqlens_q.int(), cu_seqlens_k.int(), max_q if max_q > 0 else q.shape[0],
        max_k if max_k > 0 else k.shape[0], 0.0, causal, False, scale=scale,
        window_size_left=left if left >= 0 else None, window_size_right=right if right >= 0 else None,
    )  # fmt: skip
    return out, lse


def visible_chunk(
    first: int, last: int, tk: int, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, causal: bool, left: int, right: int,
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
    work = torch.promote_types(q.dtype, torch.float32)
    repeat, tk = q.shape[1] // k.shape[1], k.shape[0]
    keys = k.repeat_interleave(repeat, dim=1).to(work).permute(1, 2, 0)  # [H, D, Tk]
    values = v.repeat_interleave(repeat, dim=1).to(work).transpose(0, 1)  # [H, Tk, D]
    rows = max(1, CHUNK_BYTES // max(1, 4 * tk * q.shape[1]))
    outs, lses = [], []
    for first in range(0, q.shape[0], rows):
        last = min(first + rows, q.shape[0])
        scores = (q[first:last].to(work).transpose(0, 1) @ keys) * scale  # [H, rows, Tk]
        if softcap > 0:
            scores = softcap * torch.tanh(scores / softcap)
        visible = visible_chunk(first, last, tk, cu_seqlens_q, cu_seqlens_k, causal, left, right, prefix_lens)
        p, lse = safe_softmax(scores.masked_fill(~visible, float("-inf")))
        outs.append((p @ values).transpose(0, 1).to(q.dtype))
        lses.append(lse)
    if not outs:
        return torch.empty_like(q, memory_format=torch.contiguous_format), q.new_empty(q.shape[1], 0, dtype=work)
    return torch.cat(outs), torch.cat(lses, dim=1)


# -- backward ----------------------------------------------------------------------------------------------------------


def backward(grads: Sequence[Tensor | None], outs: Sequence[Tensor], args: Sequence[Any], needs: Sequence[bool]) -> list[Tensor | None]:
    """FlashAttention-2's backward in plain PyTorch: scores again from q, k and lse, one chunk of queries at a time.

    Also takes a gradient of lse (ring attention, z-loss): it enters where the row sum of grad * out does.
    """
    q, k, v, cu_q, cu_k, _, _, scale, causal, left, right, prefix_lens, softcap, cos_q, sin_q, cos_k, sin_k, interleaved = args
    out, lse = outs
    work = torch.promote_types(q.dtype, torch.float32)
    grad_out = torch.zeros_like(out) if grads[0] is None else grads[0]
    grad_lse = None if grads[1] is None else grads[1].to(work)
    qr, kr = q, k
    if cos_q is not None:
        qr, kr = apply_rope(q, cos_q, sin_q, interleaved), apply_rope(k, cos_k, sin_k, interleaved)
    repeat = q.shape[1] // k.shape[1]
    dq = torch.zeros(q.shape, dtype=work, device=q.device)
    dk, dv = (torch.zeros(k.shape[0], q.shape[1], q.shape[2], dtype=work, device=q.device) for _ in range(2))
    delta = (grad_out.to(work) * out.to(work)).sum(-1).t()  # [H, Tq]
    if grad_lse is not None:
        delta = delta - grad_lse
    for (q0, q1), (k0, k1), visible in _tiles(q, k, cu_q, cu_k, causal, left, right, prefix_lens):
        if k1 <= k0 or q1 <= q0:
            continue
        qi = qr[q0:q1].to(work).transpose(0, 1)  # [H, rows, D]
        ki, vi = (x[k0:k1].to(work).repeat_interleave(repeat, dim=1).transpose(0, 1) for x in (kr, v))
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
        dq[q0:q1] = (ds @ ki).transpose(0, 1)
        dk[k0:k1] += (ds.transpose(-1, -2) @ qi).transpose(0, 1)
        dv[k0:k1] += (p.transpose(-1, -2) @ gi).transpose(0, 1)
    if repeat > 1:
        dk, dv = (x.unflatten(1, (-1, repeat)).sum(2) for x in (dk, dv))
    if cos_q is not None:
        dq, dk = rope_backward(dq, cos_q, sin_q, interleaved), rope_backward(dk, cos_k, sin_k, interleaved)
    return [dq, dk, dv]


def _tiles(
    q: Tensor, k: Tensor, cu_q: Tensor, cu_k: Tensor, causal: bool, left: int, right: int, prefix_lens: Tensor | None
) -> Iterator[tuple[tuple[int, int], tuple[int, int], Tensor | None]]:
    """Query rows, key rows and visibility of each piece of the backward."""
    if q.device.type != "cpu":  # every chunk against all keys: sequence borders are not known on the host
        rows = max(1, CHUNK_BYTES // max(1, 8 * k.shape[0] * q.shape[1]))
        for first in range(0, q.shape[0], rows):
            last = min(first + rows, q.shape[0])
            visible = visible_chunk(first, last, k.shape[0], cu_q, cu_k, causal, left, right, prefix_lens)
            yield (first, last), (0, k.shape[0]), visible
        return
    starts_q, starts_k = cu_q.tolist(), cu_k.tolist()
    for i in range(len(starts_q) - 1):
        (q0, q1), (k0, k1) = starts_q[i : i + 2], starts_k[i : i + 2]
        prefix = int(prefix_lens[i]) if prefix_lens is not None else 0
        visible = attention_mask(q1 - q0, k1 - k0, causal, left, right, prefix, q.device) if has_mask(causal, left, right) else None
        rows = max(1, CHUNK_BYTES // max(1, 8 * (k1 - k0) * q.shape[1]))
        for first in range(q0, q1, rows):
            last = min(first + rows, q1)
            yield (first, last), (k0, k1), None if visible is None else visible[first - q0 : last - q0]


def rope_backward(grad: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """Transpose of ``apply_rope``: grad * cos - rotate(grad * sin)."""
    c, s = cos.to(grad.dtype)[:, None], sin.to(grad.dtype)[:, None]
    return grad * c - rotate(grad * s, interleaved)
