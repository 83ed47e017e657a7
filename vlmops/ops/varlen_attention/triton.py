"""Triton: online softmax over exact head chunks, length-sorted tiles found on the device, a backward without atomics.

RoPE runs as one pass over q and k in front, not inside the loop: its float32 tables weigh four times a bfloat16 row, and inside
they would be read again for every head and every tile of queries; here they are read once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vlmops.backends import triton_runtime
from vlmops.backends.triton_runtime import Config
from vlmops.ops._shared.checks import cu_seqlens_list
from vlmops.ops._shared.strides import dense_rows
from vlmops.ops._shared.triton_attention import LOG2E
from vlmops.ops._shared.triton_attention_launch import (
    backward_configs,
    chunk_meta,
    forward_configs,
    row_sums,
    strides,
    why_not_attention,
)
from vlmops.ops._shared.triton_schedule import tile_slots
from vlmops.ops.rotary.triton import rotate_heads
from vlmops.ops.varlen_attention.rope import rotated
from vlmops.ops.varlen_attention.triton_backward import varlen_dkdv_kernel, varlen_dq_kernel
from vlmops.ops.varlen_attention.triton_forward import varlen_forward_kernel


def supports(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int,
    scale: float, causal: bool, left: int, right: int, prefix_lens: Tensor | None, softcap: float,
    cos_q: Tensor | None, sin_q: Tensor | None, cos_k: Tensor | None, sin_k: Tensor | None, interleaved: bool,
) -> str | None:  # fmt: skip
    """Why these kernels cannot run these arguments; None if they can."""
    return why_not_attention(q)


def _mask_meta(causal: bool, left: int, right: int, prefix_lens: Tensor | None, softcap: float) -> dict[str, bool]:
    """The constexpr switches. A prefix only shows more: without a mask it changes nothing."""
    bounded = causal or left >= 0 or right >= 0
    return {
        "LEFT": left >= 0, "RIGHT": causal or right >= 0, "PREFIX": prefix_lens is not None and bounded,
        "SOFTCAP": softcap > 0.0,
    }  # fmt: skip


def _scales(scale: float, softcap: float) -> float:
    """The factor the kernels put on raw products: scores in log2 units, except before a softcap."""
    return scale if softcap > 0.0 else scale * LOG2E


def forward(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int,
    scale: float, causal: bool, left: int, right: int, prefix_lens: Tensor | None, softcap: float,
    cos_q: Tensor | None, sin_q: Tensor | None, cos_k: Tensor | None, sin_k: Tensor | None, interleaved: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """out [Tq, Hq, D] in q's dtype, lse [Hq, Tq]."""
    (tq, heads, dim), (tk, kv_heads, _) = q.shape, k.shape
    if q.device.type == "cpu":
        cu_seqlens_list("cu_seqlens_q", cu_seqlens_q, tq)
        cu_seqlens_list("cu_seqlens_k", cu_seqlens_k, tk)
    q, k = rotated(rotate_heads, q, k, cos_q, sin_q, cos_k, sin_k, interleaved, False)
    q, k, v = dense_rows(q), dense_rows(k), dense_rows(v)
    out = q.new_empty(tq, heads, dim)
    lse = torch.empty(heads, tq, dtype=torch.float32, device=q.device)
    n = cu_seqlens_q.shape[0] - 1
    if n == 0 or tq == 0:
        return out, lse
    meta: dict[str, Any] = {**chunk_meta(dim), **_mask_meta(causal, left, right, prefix_lens, softcap)}
    span = 0 if causal else right
    unit, steps = strides(q, k, v)

    def run(config: Config) -> None:
        slots = tile_slots(cu_seqlens_q, tq, max_seqlen_q, config["BM"])
        work = slots.shape[1] * heads
        programs = min(work, triton_runtime.processors(q) * 2) if config["PERSISTENT"] else work
        triton_runtime.launch(
            varlen_forward_kernel, (programs,), q, k, v, out, lse, slots, cu_seqlens_q, cu_seqlens_k,
            cu_seqlens_q if prefix_lens is None else prefix_lens, tq, tk, slots.shape[1], heads, heads // kv_heads,
            *steps, _scales(scale, softcap), softcap, left, span, UNIT=unit, config=config, **meta,
        )  # fmt: skip

    key = f"{q.dtype} {heads} {kv_heads} {dim} {meta} {max(16, 1 << (tq // n).bit_length())}"
    run(triton_runtime.pick("varlen_attention", key, forward_configs(q, max_seqlen_q), run, q.device))
    return out, lse


def backward(
    grads: Sequence[Tensor | None], outs: Sequence[Tensor], args: Sequence[Any], needs: Sequence[bool]
) -> list[Tensor | None]:
    """Gradients of q, k, v; also takes a gradient of lse."""
    (q, k, v, cu_q, cu_k, max_q, max_k, scale, causal, left, right, prefix_lens, softcap, cos_q, sin_q, cos_k, sin_k,
     interleaved) = args  # fmt: skip
    out, lse = outs
    q, k = rotated(rotate_heads, q, k, cos_q, sin_q, cos_k, sin_k, interleaved, False)
    q, k, v = dense_rows(q), dense_rows(k), dense_rows(v)
    grad_out = torch.zeros_like(out) if grads[0] is None else dense_rows(grads[0])
    delta = row_sums(out, grad_out, grads[1])
    masks = {**_mask_meta(causal, left, right, prefix_lens, softcap), "left": left, "right": 0 if causal else right}
    dq, dk, dv = segment_gradients(
        q, k, v, grad_out, lse, delta, cu_q, cu_k, max_q, max_k, scale, softcap, prefix_lens, masks,
        (needs[0], needs[1] or needs[2]),
    )  # fmt: skip
    if cos_q is not None:
        dq, dk = rotated(rotate_heads, dq, dk, cos_q, sin_q, cos_k, sin_k, interleaved, True)
    return [dq if needs[0] else None, dk if needs[1] else None, dv if needs[2] else None]


def segment_gradients(
    q: Tensor, k: Tensor, v: Tensor, grad_out: Tensor, lse: Tensor, delta: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int,
    max_k: int, scale: float, softcap: float, prefix_lens: Tensor | None, masks: dict[str, Any], wanted: tuple[bool, bool],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dq [Tq, H, D], dk and dv [Tk, Hkv, D] of packed attention; those not ``wanted`` (dq, dk with dv) are not filled.

    Args:
        lse, delta: [H, Tq], also of an attention over more keys than these (two sources).
    """
    (tq, heads, dim), (tk, kv_heads, _) = q.shape, k.shape
    dq, dk, dv = q.new_empty(tq, heads, dim), k.new_empty(tk, kv_heads, dim), v.new_empty(tk, kv_heads, dim)
    n = cu_q.shape[0] - 1
    if n == 0:
        return dq, dk, dv
    switches = {name: masks[name] for name in ("LEFT", "RIGHT", "PREFIX", "SOFTCAP")}
    numbers = (scale, _scales(scale, softcap), softcap, masks["left"], masks["right"])
    prefix = cu_q if prefix_lens is None else prefix_lens
    unit, steps = strides(q, k, v, grad_out)
    meta: dict[str, Any] = {**chunk_meta(dim), **switches, "UNIT": unit}
    key = f"{q.dtype} {heads} {kv_heads} {dim} {switches} {max(16, 1 << (tq // n).bit_length())}"

    def run_dkdv(config: Config) -> None:
        slots = tile_slots(cu_k, tk, max_k, config["BN"])
        triton_runtime.launch(
            varlen_dkdv_kernel, (slots.shape[1], kv_heads), q, k, v, grad_out, lse, delta, dk, dv, slots, cu_q, cu_k, prefix,
            tq, tk, slots.shape[1], kv_heads, heads // kv_heads, *steps, *numbers, config=config, **meta,
        )  # fmt: skip

    def run_dq(config: Config) -> None:
        slots = tile_slots(cu_q, tq, max_q, config["BM"])
        triton_runtime.launch(
            varlen_dq_kernel, (slots.shape[1] * heads,), q, k, v, grad_out, lse, delta, dq, slots, cu_q, cu_k, prefix, tq,
            tk, slots.shape[1], heads, heads // kv_heads, *steps, *numbers, config=config, **meta,
        )  # fmt: skip

    if wanted[1]:
        configs = backward_configs(q, max_q, True)
        run_dkdv(triton_runtime.pick("varlen_attention_dkdv", key, configs, run_dkdv, q.device))
    if wanted[0]:
        configs = backward_configs(q, max_q, False)
        run_dq(triton_runtime.pick("varlen_attention_dq", key, configs, run_dq, q.device))
    return dq, dk, dv
