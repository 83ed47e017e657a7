"""A fixed number of queries an image over its tokens and, optionally, over latents: every resampler's attention.

Keys come from two places, [context; latents], and are read where they lie instead of being concatenated.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vlmops.ops._shared import checks
from vlmops.ops._shared.registry import Op

__all__ = ["perceiver_attention"]


def _fake(q: Tensor, *args: object) -> tuple[Tensor, Tensor]:
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    return out, q.new_empty(q.shape[1], q.shape[0], dtype=torch.float64 if q.dtype == torch.float64 else torch.float32)


OP = Op(
    __name__,
    "(Tensor q, Tensor k_context, Tensor v_context, Tensor? k_latent, Tensor? v_latent, Tensor cu_seqlens_context, "
    "int num_latents, float scale) -> (Tensor, Tensor)",
    differentiable=["q", "k_context", "v_context", "k_latent", "v_latent"],
    fake=_fake,
    autocast=["q", "k_context", "v_context", "k_latent", "v_latent"],
    saved_outputs=[0, 1],
    tiny=lambda q, *_: q.shape[0] * q.shape[1] * q.shape[2] < 4096,
)


def perceiver_attention(
    q: Tensor,
    k_context: Tensor,
    v_context: Tensor,
    k_latent: Tensor | None,
    v_latent: Tensor | None,
    cu_seqlens_context: Tensor,
    *,
    num_latents: int,
    scale: float | None = None,
) -> Tensor:
    """softmax(scale * q [k_context; k_latent]^T) [v_context; v_latent] for each of n packed items.

    Args:
        q: [n * num_latents, Hq, D], the latents' queries, item behind item; float32, bfloat16, float16 (float64 on
            reference and torch).
        k_context: [Tc, Hkv, D], packed context tokens, Hq a multiple of Hkv (head h reads key head h // (Hq // Hkv)).
        v_context: [Tc, Hkv, D].
        k_latent: [n * num_latents, Hkv, D]: item i also sees its own latents' keys. None: context only (Q-Former,
            Qwen-VL's resampler).
        v_latent: [n * num_latents, Hkv, D] or None, as ``k_latent``.
        cu_seqlens_context: int32 [n + 1] on q's device: where each item's context starts.
        num_latents: queries an item.
        scale: factor on q k^T; None: 1 / sqrt(D).

    Returns:
        out [n * num_latents, Hq, D] in q's dtype, contiguous; 0 where there is no key.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape, dtype or device, or malformed cu_seqlens_context.

    Source: Perceiver (Jaegle et al. 2021); Flamingo's resampler (Alayrac et al. 2022), with keys [context; latents];
    Idefics2's, with grouped queries.
    """
    checks.check_heads(
        q, k_context, v_context, key="k_context", value="v_context", queries="n * num_latents", keys="Tc"
    )
    (tq, hq, d), hkv = q.shape, k_context.shape[1]
    checks.check_cu_seqlens("cu_seqlens_context", cu_seqlens_context, q.device)
    n = cu_seqlens_context.shape[0] - 1
    if num_latents < 1:
        raise ValueError(f"num_latents: expected at least 1, got {num_latents}")
    checks.check_shape("q", q, (n * num_latents, hq, d), f"[{n} items * {num_latents} latents, Hq, D]")
    if (k_latent is None) != (v_latent is None):
        raise ValueError("v_latent: expected a tensor exactly where k_latent is one")
    if k_latent is not None and v_latent is not None:
        for name, x in (("k_latent", k_latent), ("v_latent", v_latent)):
            checks.check_tensor(name, x, dim=3, layout="[n * num_latents, Hkv, D]")
            checks.check_shape(name, x, (tq, hkv, d))
            checks.check_dtype(name, x, q.dtype, "q")
            checks.check_same_device(name, x, q.device, "q")
    scale = d**-0.5 if scale is None else float(scale)
    out, _ = OP(q, k_context, v_context, k_latent, v_latent, cu_seqlens_context, int(num_latents), scale)
    return out
