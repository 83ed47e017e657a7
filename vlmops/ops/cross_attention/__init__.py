"""Text queries over visual keys, ungated: the attention of Flamingo, Idefics and Mllama.

Which images a token may see is a number (or a half-open range) per token, never a dense [text, image] mask. Gates,
output projection and query/key norms are the caller's: ``vlmops.ops.linear`` has the gate, ``vlmops.ops.rms_norm`` the
norm.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vlmops.ops._shared import checks
from vlmops.ops._shared.registry import Op

__all__ = ["cross_attention"]


def _fake(q: Tensor, *args: object) -> tuple[Tensor, Tensor]:
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    return out, q.new_empty(q.shape[1], q.shape[0], dtype=torch.float64 if q.dtype == torch.float64 else torch.float32)


OP = Op(
    __name__,
    "(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q, Tensor cu_seqlens_k, Tensor? media_index, float scale) "
    "-> (Tensor, Tensor)",
    differentiable=["q", "k", "v"],
    fake=_fake,
    autocast=["q", "k", "v"],
    saved_outputs=[0, 1],
    tiny=lambda q, k, *_: q.shape[0] * q.shape[1] * q.shape[2] < 4096,
)


def cross_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    *,
    media_index: Tensor | None = None,
    scale: float | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """softmax(scale * q k^T) v, every query over the key segments it may see.

    Args:
        q: [Tq, Hq, D], packed text tokens; float32, bfloat16, float16 (float64 on reference and torch).
        k: [Tk, Hkv, D], packed visual tokens, Hq a multiple of Hkv (head h reads key head h // (Hq // Hkv)).
        v: [Tk, Hkv, D].
        cu_seqlens_q: int32 [n + 1] on q's device: where each text sequence starts.
        cu_seqlens_k: int32 [m + 1]: where each key segment (image) starts, over the whole batch.
        media_index: int32 [Tq], number of the one segment a query sees, -1 for none; or [Tq, 2], a half-open range of
            consecutive segments (empty: none). None: query sequence i sees segment i, n = m. On a CPU a number outside
            the segments is an error, on a GPU it is clamped.
        scale: factor on q k^T; None: 1 / sqrt(D).
        return_lse: also return the log-sum-exp of the scores.

    Returns:
        out [Tq, Hq, D] in q's dtype, contiguous; with ``return_lse`` also lse float32 [Hq, Tq].
        A query that sees no key gives exactly 0 and lse -inf.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape, dtype or device, malformed cu_seqlens, or a
            media_index that names no segment.

    Source: Flamingo (Alayrac et al. 2022), where text before the first image sees nothing; Idefics; Mllama, whose rows
    without an image see every key, which is the range [first, last] here.
    """
    checks.check_heads(q, k, v)
    tq, _, d = q.shape
    checks.check_cu_seqlens("cu_seqlens_q", cu_seqlens_q, q.device)
    checks.check_cu_seqlens("cu_seqlens_k", cu_seqlens_k, q.device)
    if media_index is None:
        if cu_seqlens_k.shape != cu_seqlens_q.shape:
            raise ValueError(
                f"media_index: needed where there are {cu_seqlens_q.shape[0] - 1} query sequences and "
                f"{cu_seqlens_k.shape[0] - 1} key segments"
            )
    else:
        checks.check_tensor("media_index", media_index, layout="[Tq] or [Tq, 2]")
        if media_index.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"media_index: expected int32 [Tq] or [Tq, 2], got {checks.describe(media_index)}")
        if media_index.shape not in ((tq,), (tq, 2)):
            raise ValueError(f"media_index: expected [{tq}] or [{tq}, 2], got {checks.describe(media_index)}")
        checks.check_same_device("media_index", media_index, q.device, "q")
    out, lse = OP(q, k, v, cu_seqlens_q, cu_seqlens_k, media_index, d**-0.5 if scale is None else float(scale))
    return (out, lse) if return_lse else out
