"""Packed attention with q, k, v and the softmax weights rounded to fp8 e4m3: twice the tensor-core rate, at a stated loss.

Never chosen by itself: an accuracy option for inference, beside ``varlen_attention``. Each head of q, k and v has one scale over
all tokens, found on the device. A scale is a power of two, and so is the fixed one of the softmax weights: what is rounded, and
to what, does not depend on the backend nor on the order in which keys are read.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vlmops.ops._shared import checks
from vlmops.ops._shared.registry import Op
from vlmops.ops.fp8_attention.rounding import NO_GRADIENT
from vlmops.ops.varlen_attention import check_window

__all__ = ["fp8_attention"]


def _fake(q: Tensor, *args: object) -> tuple[Tensor, Tensor]:
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    return out, q.new_empty(q.shape[1], q.shape[0], dtype=torch.float64 if q.dtype == torch.float64 else torch.float32)


OP = Op(
    __name__,
    "(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q, Tensor cu_seqlens_k, int max_seqlen_q, int max_seqlen_k, "
    "float scale, bool causal, int left, int right) -> (Tensor, Tensor)",
    differentiable=["q", "k", "v"],  # every backend's backward says that there is none
    fake=_fake,
    autocast=["q", "k", "v"],
)


def fp8_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None = None,
    *,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    scale: float | None = None,
    causal: bool = False,
    window: tuple[int, int] | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """softmax(scale * q k^T + mask) v inside each packed sequence, both products in e4m3 with float32 sums.

    With x8 = e4m3(x / s) s and s, for each head, the least power of two that brings the head's largest finite magnitude to 448:
    scores S = scale * log2(e) * q8 k8^T, base b = ceil(max S) of each row, weights p = 2^(S - b), and the result is
    (e4m3(256 p) / 256) v8 / sum(p).

    On normal random q, k, v the root-mean-square error is 5% of the output's, with scores four times as large 9%: rounding q and
    k moves a score in proportion to its size, so keys with outliers cost most. Outliers among the values cost nothing more.

    Args:
        q: [Tq, Hq, D], any token and head strides; float32, bfloat16, float16 (float64 on reference and torch).
        k: [Tk, Hkv, D], Hq a multiple of Hkv (grouped queries: head h reads key head h // (Hq // Hkv)).
        v: [Tk, Hkv, D].
        cu_seqlens_q: int32 [n + 1] on q's device, 0 = first < ... <= last = Tq: where each sequence starts.
        cu_seqlens_k: the same for k and v; None: equal to ``cu_seqlens_q``.
        max_seqlen_q: longest query sequence, if known on the host. None: Tq.
        max_seqlen_k: longest key sequence, likewise. None: Tk.
        scale: factor on q k^T; None: 1 / sqrt(D).
        causal: query i of Lq sees keys up to i + Lk - Lq (bottom-right aligned).
        window: (left, right) keys seen on each side of that position; -1 is unbounded.
        return_lse: also return the log-sum-exp of the scores.

    Returns:
        out [Tq, Hq, D] in q's dtype, contiguous; with ``return_lse`` also lse float32 [Hq, Tq].
        A query that sees no key gives 0 and lse -inf. A NaN or infinity in q makes its own row NaN, in k or v the rows of
        its sequence.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape, dtype or device, or malformed cu_seqlens.
        RuntimeError: a gradient is wanted (there is none: ``varlen_attention`` has one).

    Source: FlashAttention-3's fp8 forward (Shah et al. 2024), with a scale a head and the weights' scale of 256.
    """
    checks.check_heads(q, k, v)
    cu_seqlens_k = checks.check_key_cu_seqlens(q, k, cu_seqlens_q, cu_seqlens_k)
    for name, x in (("q", q), ("k", k), ("v", v)):
        if torch.is_grad_enabled() and x.requires_grad:
            raise RuntimeError(f"{name}: {NO_GRADIENT} call it under torch.no_grad(), or varlen_attention")
    left, right = check_window(window)
    out, lse = OP(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q or -1, max_seqlen_k or -1,
        q.shape[2] ** -0.5 if scale is None else float(scale), causal, left, right,
    )  # fmt: skip
    return (out, lse) if return_lse else out
