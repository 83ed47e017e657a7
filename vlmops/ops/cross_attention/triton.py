"""Triton: every query row with its own run of keys; without a media index it is packed attention."""

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
from vlmops.ops._shared.triton_math import cdiv
from vlmops.ops.cross_attention.key_ranges import check_media_index, key_ranges
from vlmops.ops.cross_attention.triton_kernels import cross_dkdv_kernel, cross_dq_kernel, cross_forward_kernel
from vlmops.ops.varlen_attention import triton as packed


def supports(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    media_index: Tensor | None,
    scale: float,
) -> str | None:
    """Why these kernels cannot run these arguments; None if they can."""
    return why_not_attention(q)


def _runs(media_index: Tensor, cu_seqlens_k: Tensor) -> tuple[Tensor, Tensor]:
    """First and one past the last key of each query, int32 [Tq], found on the device."""
    begin, end = key_ranges(media_index, cu_seqlens_k)
    return begin.int(), end.int()


def _key(q: Tensor, k: Tensor) -> str:
    return f"{q.dtype} {q.shape[1]} {k.shape[1]} {q.shape[2]} {q.shape[0].bit_length()} {k.shape[0].bit_length()}"


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    media_index: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """out [Tq, Hq, D] in q's dtype, lse [Hq, Tq]."""
    (tq, heads, dim), (tk, kv_heads, _) = q.shape, k.shape
    if media_index is None:
        return packed.forward(
            q, k, v, cu_seqlens_q, cu_seqlens_k, -1, -1, scale, False, -1, -1, None, 0.0, None, None, None, None, False
        )
    if q.device.type == "cpu":
        cu_seqlens_list("cu_seqlens_q", cu_seqlens_q, tq)
        cu_seqlens_list("cu_seqlens_k", cu_seqlens_k, tk)
        check_media_index(media_index, cu_seqlens_k.shape[0] - 1)
    begin, end = _runs(media_index, cu_seqlens_k)
    q, k, v = dense_rows(q), dense_rows(k), dense_rows(v)
    out = q.new_empty(tq, heads, dim)
    lse = torch.empty(heads, tq, dtype=torch.float32, device=q.device)
    unit, steps = strides(q, k, v)

    def run(config: Config) -> None:
        triton_runtime.launch(
            cross_forward_kernel, (cdiv(tq, config["BM"]) * heads,), q, k, v, out, lse, begin, end, tq, tk, heads,
            heads // kv_heads, *steps, scale * LOG2E, UNIT=unit, BM=config["BM"], BN=config["BN"], warps=config.warps,
            stages=config.stages, **chunk_meta(dim),
        )  # fmt: skip

    configs = [c for c in forward_configs(q, -1, 3) if not c["PERSISTENT"]]
    run(triton_runtime.pick("cross_attention", _key(q, k), configs, run, q.device))
    return out, lse


def backward(
    grads: Sequence[Tensor | None], outs: Sequence[Tensor], args: Sequence[Any], needs: Sequence[bool]
) -> list[Tensor | None]:
    """Gradients of q, k, v; also takes a gradient of lse."""
    q, k, v, cu_q, cu_k, media_index, scale = args
    if media_index is None:
        packed_args = [q, k, v, cu_q, cu_k, -1, -1, scale, False, -1, -1, None, 0.0, None, None, None, None, False]
        return packed.backward(grads, outs, packed_args, needs)
    out, lse = outs
    (tq, heads, dim), (tk, kv_heads, _) = q.shape, k.shape
    q, k, v = dense_rows(q), dense_rows(k), dense_rows(v)
    grad_out = torch.zeros_like(out) if grads[0] is None else dense_rows(grads[0])
    delta = row_sums(out, grad_out, grads[1])
    begin, end = _runs(media_index, cu_k)
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    unit, steps = strides(q, k, v, grad_out)
    meta: dict[str, Any] = {**chunk_meta(dim), "UNIT": unit}

    def run_dq(config: Config) -> None:
        triton_runtime.launch(
            cross_dq_kernel, (cdiv(tq, config["BM"]) * heads,), q, k, v, grad_out, lse, delta, dq, begin, end, tq, tk, heads,
            heads // kv_heads, *steps, scale, scale * LOG2E, config=config, **meta,
        )  # fmt: skip

    def run_dkdv(config: Config) -> None:
        triton_runtime.launch(
            cross_dkdv_kernel, (cdiv(tk, config["BN"]), kv_heads), q, k, v, grad_out, lse, delta, dk, dv, begin, end, tq, tk,
            kv_heads, heads // kv_heads, *steps, scale, scale * LOG2E, SCAN=1024, config=config, **meta,
        )  # fmt: skip

    if needs[0]:
        configs = backward_configs(q, -1, False)
        run_dq(triton_runtime.pick("cross_attention_dq", _key(q, k), configs, run_dq, q.device))
    if needs[1] or needs[2]:
        configs = backward_configs(q, -1, True, True)
        run_dkdv(triton_runtime.pick("cross_attention_dkdv", _key(q, k), configs, run_dkdv, q.device))
    return [dq if needs[0] else None, dk if needs[1] else None, dv if needs[2] else None]
