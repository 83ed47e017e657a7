"""Attention inside each packed sequence: the one attention of every vision tower.

All images of a batch lie behind each other in one [total_tokens, heads, head_dim] tensor, without padding, as in
FlashAttention's varlen interface (Dao, 2023). Windows, causal and prefix-bidirectional masks, grouped queries,
soft-capping and rotary embedding are options of the same op.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vlmops.ops._shared import checks
from vlmops.ops._shared.registry import Op

__all__ = ["varlen_attention"]


def _fake(q: Tensor, *args: object) -> tuple[Tensor, Tensor]:
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    return out, q.new_empty(q.shape[1], q.shape[0], dtype=torch.float64 if q.dtype == torch.float64 else torch.float32)


OP = Op(
    __name__,
    "(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q, Tensor cu_seqlens_k, int max_seqlen_q, int max_seqlen_k, "
    "float scale, bool causal, int left, int right, Tensor? prefix_lens, float softcap, Tensor? cos_q, Tensor? sin_q, "
    "Tensor? cos_k, Tensor? sin_k, bool interleaved) -> (Tensor, Tensor)",
    differentiable=["q", "k", "v"],
    fake=_fake,
    autocast=["q", "k", "v"],
    saved_outputs=[0, 1],
    tiny=lambda q, k, *_: q.shape[0] * q.shape[1] * q.shape[2] < 4096,
)


def varlen_attention(
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
    prefix_lens: Tensor | None = None,
    softcap: float = 0.0,
    rope: tuple[Tensor, Tensor] | None = None,
    rope_k: tuple[Tensor, Tensor] | None = None,
    rope_interleaved: bool = False,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """softmax(scale * q k^T + mask) v inside each packed sequence.

    Args:
        q: [Tq, Hq, D], any token and head strides; float32, bfloat16, float16 (float64 on reference and torch).
        k: [Tk, Hkv, D], Hq a multiple of Hkv (grouped queries: head h reads key head h // (Hq // Hkv)).
        v: [Tk, Hkv, D].
        cu_seqlens_q: int32 [n + 1] on q's device, 0 = first < ... <= last = Tq: where each sequence starts.
        cu_seqlens_k: the same for k and v; None: equal to ``cu_seqlens_q``.
        max_seqlen_q: longest query sequence, if known on the host: a bound some GPU kernels want. None: Tq.
        max_seqlen_k: longest key sequence, likewise. None: Tk.
        scale: factor on q k^T; None: 1 / sqrt(D).
        causal: query i of Lq sees keys up to i + Lk - Lq (bottom-right aligned).
        window: (left, right) keys seen on each side of that position; -1 is unbounded.
        prefix_lens: int32 [n]; keys before it are seen by every query of the sequence (PaliGemma's prefix).
        softcap: s > 0 replaces a score x by s * tanh(x / s) (Gemma 2).
        rope: (cos, sin), each [Tq, D]: rotary tables applied to q, and to k unless ``rope_k`` is given.
        rope_k: (cos, sin), each [Tk, D]: k's own tables; needed where Tk != Tq.
        rope_interleaved: pairs are (2i, 2i + 1) instead of (i, i + D/2).
        return_lse: also return the log-sum-exp of the scores.

    Returns:
        out [Tq, Hq, D] in q's dtype, contiguous; with ``return_lse`` also lse float32 [Hq, Tq].
        A query that sees no key gives 0 and lse -inf.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape, dtype or device, or malformed cu_seqlens.

    Source: FlashAttention-2's varlen interface; masks as in PyTorch's flex_attention; rotary as in transformers.
    """
    checks.check_heads(q, k, v)
    (tq, _, d), tk = q.shape, k.shape[0]
    cu_seqlens_k = checks.check_key_cu_seqlens(q, k, cu_seqlens_q, cu_seqlens_k)
    if prefix_lens is not None:
        checks.check_shape("prefix_lens", prefix_lens, (cu_seqlens_q.shape[0] - 1,), "[n], one a sequence")
        checks.check_same_device("prefix_lens", prefix_lens, q.device, "q")
    left, right = check_window(window)
    cos_q, sin_q = check_rope("rope", rope, tq, d, q.device)
    cos_k, sin_k = check_rope("rope_k", rope_k, tk, d, q.device)
    if cos_q is not None and cos_k is None:
        if tk != tq:
            raise ValueError(f"rope_k: needed where k has {tk} tokens and q {tq}")
        cos_k, sin_k = cos_q, sin_q
    out, lse = OP(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q or -1, max_seqlen_k or -1,
        d**-0.5 if scale is None else float(scale), causal, left, right, prefix_lens, float(softcap),
        cos_q, sin_q, cos_k, sin_k, rope_interleaved,
    )  # fmt: skip
    return (out, lse) if return_lse else out


def check_window(window: tuple[int, int] | None) -> tuple[int, int]:
    """(left, right), -1 for unbounded; ValueError for anything else."""
    if window is None:
        return -1, -1
    if len(window) != 2 or window[0] < -1 or window[1] < -1:
        raise ValueError(f"window: expected (left, right) with -1 for unbounded, got {window}")
    return int(window[0]), int(window[1])


def check_rope(
    name: str, rope: tuple[Tensor, Tensor] | None, tokens: int, head_dim: int, device: torch.device
) -> tuple[Tensor | None, Tensor | None]:
    """The two tables of a rope argument, checked to be [tokens, head_dim] (an even head_dim)."""
    if rope is None:
        return None, None
    cos, sin = rope
    if head_dim % 2:
        raise ValueError(f"{name}: expected an even head_dim, got {head_dim}")
    for part, table in ((f"{name} cos", cos), (f"{name} sin", sin)):
        checks.check_tensor(part, table, dim=2, layout="[T, D]")
        checks.check_shape(part, table, (tokens, head_dim))
        checks.check_same_device(part, table, device, "q")
    return cos, sin
