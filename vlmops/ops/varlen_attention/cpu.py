"""The native CPU kernel: online softmax on transposed scores (csrc/cpu/kernels/varlen_attention.cpp)."""

from __future__ import annotations

import torch
from torch import Tensor

from vlmops.backends import native

native.define(
    "varlen_attention(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q, Tensor cu_seqlens_k, float scale, bool causal, "
    "int left, int right, Tensor? prefix_lens, float softcap, Tensor? cos_q, Tensor? sin_q, Tensor? cos_k, Tensor? sin_k, "
    "bool interleaved) -> (Tensor out, Tensor lse)"
)
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_HEAD_DIM = 512


def supports(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int,
    scale: float, causal: bool, left: int, right: int, prefix_lens: Tensor | None, softcap: float,
    cos_q: Tensor | None, sin_q: Tensor | None, cos_k: Tensor | None, sin_k: Tensor | None, interleaved: bool,
) -> str | None:  # fmt: skip
    """Why this kernel cannot run these arguments; None if it can."""
    if q.device.type != "cpu":
        return f"a tensor on {q.device}"
    if q.dtype not in _DTYPES:
        return f"{str(q.dtype)[6:]} (float32, bfloat16 and float16 only)"
    if q.shape[2] > MAX_HEAD_DIM:
        return f"head_dim {q.shape[2]} (at most {MAX_HEAD_DIM})"
    return None if native.available() else native.reason()


def forward(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int,
    scale: float, causal: bool, left: int, right: int, prefix_lens: Tensor | None, softcap: float,
    cos_q: Tensor | None, sin_q: Tensor | None, cos_k: Tensor | None, sin_k: Tensor | None, interleaved: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """out [Tq, Hq, D] in q's dtype, lse [Hq, Tq].

    A hidden key never reaches the output through q or k. A NaN or infinity in ``v`` at a hidden key may: 0 * NaN, as in
    torch's own attention.
    """
    native.load()
    return torch.ops.vlmops_cpu.varlen_attention(
        q, k, v, cu_seqlens_q, cu_seqlens_k, scale, causal, left, right, prefix_lens, softcap,
        cos_q, sin_q, cos_k, sin_k, interleaved,
    )  # fmt: skip
