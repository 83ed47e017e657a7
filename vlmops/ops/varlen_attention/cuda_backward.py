"""CUDA C++ for the sm_80 class: the gradients of packed attention (csrc/cuda/varlen_attention_backward.cu), without atomics."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vlmops.backends import cuda_runtime
from vlmops.backends.cuda_runtime import Out, Plan, f32, i32, i64
from vlmops.ops._shared.cuda_attention import THREADS, aligned, score_scales, sequence_slots, window_bounds
from vlmops.ops._shared.cuda_attention_backward import (
    grad_shape,
    gradient_fits,
    gradient_of,
    row_stats,
)
from vlmops.ops.rotary.cuda import rotate_heads
from vlmops.ops.varlen_attention import composition
from vlmops.ops.varlen_attention.rope import rotated

__all__ = ["backward", "segment_gradients"]


def backward(
    grads: Sequence[Tensor | None], outs: Sequence[Tensor], args: Sequence[Any], needs: Sequence[bool]
) -> list[Tensor | None]:
    """Gradients of q, k, v; also takes a gradient of lse. Larger heads than these kernels take: the ``torch`` backend's."""
    (q, k, v, cu_q, cu_k, max_q, max_k, scale, causal, left, right, prefix_lens, softcap, cos_q, sin_q, cos_k, sin_k,
     interleaved) = args  # fmt: skip
    if not gradient_fits(q):
        return composition.backward(grads, outs, args, needs)
    out, lse = outs
    q, k = rotated(rotate_heads, q, k, cos_q, sin_q, cos_k, sin_k, interleaved, False)
    grad_out = gradient_of(out, grads[0])
    stats, plan = row_stats(aligned(out), grad_out, lse, grads[1])
    (dq, dk, dv), plans = segment_gradients(
        aligned(q), aligned(k), aligned(v), grad_out, stats, cu_q, cu_k, max_q, max_k, scale, (needs[0], needs[1] or needs[2]),
        (left, 0 if causal else right), prefix_lens, softcap,
    )  # fmt: skip
    cuda_runtime.run([plan, *plans])
    if cos_q is not None:
        dq, dk = _rotated_back(dq, dk, needs, cos_q, sin_q, cos_k, sin_k, interleaved)
    return [dq if needs[0] else None, dk if needs[1] else None, dv if needs[2] else None]


def _rotated_back(
    dq: Tensor, dk: Tensor, needs: Sequence[bool], cos_q: Tensor, sin_q: Tensor, cos_k: Tensor, sin_k: Tensor,
    interleaved: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """dq and dk turned back, those that are needed: the others were never written."""
    if needs[0] and needs[1]:
        return rotated(rotate_heads, dq, dk, cos_q, sin_q, cos_k, sin_k, interleaved, True)
    if needs[0]:
        dq = rotate_heads(dq, None, cos_q, sin_q, interleaved, True)[0]
    elif needs[1]:
        dk = rotate_heads(dk, None, cos_k, sin_k, interleaved, True)[0]
    return dq, dk


def segment_gradients(
    q: Tensor, k: Tensor, v: Tensor, grad_out: Tensor, stats: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int,
    scale: float, wanted: tuple[bool, bool], window: tuple[int, int] = (-1, -1), prefix_lens: Tensor | None = None,
    softcap: float = 0.0,
) -> tuple[tuple[Tensor, Tensor, Tensor], list[Plan]]:  # fmt: skip
    """dq [Tq, H, D], dk and dv [Tk, Hkv, D] of packed attention, and the launches that fill those ``wanted`` (dq, dk with dv).

    Args:
        q, grad_out: [Tq, H, D], aligned, as k, v [Tk, Hkv, D].
        stats: [H, Tq, 2] as ``row_stats`` has them, also of an attention over more keys than these (two sources).
        window: keys to the left and right, -1 for all.
    """
    (tq, heads, dim), (tk, kv_heads, _) = q.shape, k.shape
    n = cu_q.shape[0] - 1
    dq, dk, dv = q.new_empty(tq, heads, dim), k.new_empty(tk, kv_heads, dim), v.new_empty(tk, kv_heads, dim)
    cu_q, cu_k = cu_q.contiguous(), cu_k.contiguous()
    if prefix_lens is not None:
        prefix_lens = prefix_lens.to(torch.int32).contiguous()
    bounds = window_bounds(*window)

    def plan(entry: str, outs: tuple[Tensor, ...], own: Tensor, longest: int, keys: bool) -> Plan:
        block = grad_shape(own, n, longest, keys)
        slots, per_sequence = sequence_slots(own.shape[0], n, longest, block.own)
        return Plan(
            "varlen_attention_backward.cu", entry, (*block.defines(q), ("SOFTCAP", softcap > 0.0)),
            (slots if own.shape[0] else 0, own.shape[1] if n else 0, 1), THREADS,
            (q, k, v, grad_out, stats, *map(Out, outs), cu_q, cu_k, prefix_lens,
             *(i64(x.stride(i)) for x in (q, k, v, grad_out) for i in (0, 1)), i32(tq), i32(tk), i32(n),
             i32(heads // kv_heads), i32(per_sequence), i32(bounds[0]), i32(bounds[1]), f32(scale),
             *map(f32, score_scales(scale, softcap))),
            block.shared(dim, keys),
        )  # fmt: skip

    plans = []
    if wanted[1]:
        plans.append(plan("varlen_attention_dkdv", (dk, dv), k, max_k, True))
    if wanted[0]:
        plans.append(plan("varlen_attention_dq", (dq,), q, max_q, False))
    return (dq, dk, dv), plans
