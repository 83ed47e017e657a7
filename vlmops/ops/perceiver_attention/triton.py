"""Triton: one kernel over both key sources; without latent keys, and for the gradients of keys, it is packed attention."""

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
from vlmops.ops.perceiver_attention.triton_kernels import perceiver_dq_kernel, perceiver_forward_kernel
from vlmops.ops.varlen_attention import triton as packed

_NO_MASK = {"LEFT": False, "RIGHT": False, "PREFIX": False, "SOFTCAP": False, "left": -1, "right": -1}


def supports(
    q: Tensor, k_context: Tensor, v_context: Tensor, k_latent: Tensor | None, v_latent: Tensor | None,
    cu_seqlens_context: Tensor, num_latents: int, scale: float,
) -> str | None:  # fmt: skip
    """Why these kernels cannot run these arguments; None if they can."""
    return why_not_attention(q)


def _latent_starts(q: Tensor, num_latents: int) -> Tensor:
    return torch.arange(0, q.shape[0] + 1, num_latents, dtype=torch.int32, device=q.device)


def _key(q: Tensor, k: Tensor, num_latents: int) -> str:
    return f"{q.dtype} {q.shape[1]} {k.shape[1]} {q.shape[2]} {num_latents} {k.shape[0].bit_length()}"


def forward(
    q: Tensor, k_context: Tensor, v_context: Tensor, k_latent: Tensor | None, v_latent: Tensor | None,
    cu_seqlens_context: Tensor, num_latents: int, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """out [n * num_latents, Hq, D] in q's dtype, lse [Hq, n * num_latents]."""
    if q.device.type == "cpu":
        cu_seqlens_list("cu_seqlens_context", cu_seqlens_context, k_context.shape[0])
    if k_latent is None or v_latent is None:
        return packed.forward(
            q, k_context, v_context, _latent_starts(q, num_latents), cu_seqlens_context, num_latents, -1, scale, False, -1,
            -1, None, 0.0, None, None, None, None, False,
        )  # fmt: skip
    (tq, heads, dim), (tk, kv_heads, _) = q.shape, k_context.shape
    q, k, v, kl, vl = (dense_rows(x) for x in (q, k_context, v_context, k_latent, v_latent))
    out = q.new_empty(tq, heads, dim)
    lse = torch.empty(heads, tq, dtype=torch.float32, device=q.device)
    unit, steps = strides(q, k, v, kl, vl)

    def run(config: Config) -> None:
        tiles = cdiv(num_latents, config["BM"])
        triton_runtime.launch(
            perceiver_forward_kernel, (tq // num_latents * tiles * heads,), q, k, v, kl, vl, out, lse, cu_seqlens_context,
            tq, tk, num_latents, tiles, heads, heads // kv_heads, *steps, scale * LOG2E, UNIT=unit, BM=config["BM"],
            BN=config["BN"], warps=config.warps, stages=config.stages, **chunk_meta(dim),
        )  # fmt: skip

    configs = [c for c in forward_configs(q, num_latents, 4) if not c["PERSISTENT"]]
    run(triton_runtime.pick("perceiver_attention", _key(q, k, num_latents), configs, run, q.device))
    return out, lse


def backward(
    grads: Sequence[Tensor | None], outs: Sequence[Tensor], args: Sequence[Any], needs: Sequence[bool]
) -> list[Tensor | None]:
    """Gradients of q and of both sources' keys and values; also takes a gradient of lse."""
    q, k_context, v_context, k_latent, v_latent, cu, num_latents, scale = args
    out, lse = outs
    q, k, v = (dense_rows(x) for x in (q, k_context, v_context))
    grad_out = torch.zeros_like(out) if grads[0] is None else dense_rows(grads[0])
    delta = row_sums(out, grad_out, grads[1])
    starts = _latent_starts(q, num_latents)
    alone = k_latent is None or v_latent is None
    common = (q, k, v, grad_out, lse, delta, starts, cu, num_latents, -1, scale, 0.0, None, _NO_MASK)
    dq, dk, dv = packed.segment_gradients(*common, (needs[0] and alone, needs[1] or needs[2]))
    found = [dq if needs[0] else None, dk if needs[1] else None, dv if needs[2] else None]
    if alone:
        return [*found, None, None]
    kl, vl = dense_rows(k_latent), dense_rows(v_latent)
    if needs[0]:
        _query_gradient(dq, q, k, v, kl, vl, grad_out, lse, delta, cu, num_latents, scale)
    _, dkl, dvl = packed.segment_gradients(
        q, kl, vl, grad_out, lse, delta, starts, starts, num_latents, num_latents, scale, 0.0, None, _NO_MASK,
        (False, needs[3] or needs[4]),
    )  # fmt: skip
    return [*found, dkl if needs[3] else None, dvl if needs[4] else None]


def _query_gradient(
    dq: Tensor, q: Tensor, k: Tensor, v: Tensor, kl: Tensor, vl: Tensor, grad_out: Tensor, lse: Tensor, delta: Tensor,
    cu: Tensor, num_latents: int, scale: float,
) -> None:  # fmt: skip
    """Fill dq [n * num_latents, H, D] from both sources."""
    (tq, heads, dim), (tk, kv_heads, _) = q.shape, k.shape
    unit, steps = strides(q, k, v, kl, vl, grad_out)

    def run(config: Config) -> None:
        tiles = cdiv(num_latents, config["BM"])
        triton_runtime.launch(
            perceiver_dq_kernel, (tq // num_latents * tiles * heads,), q, k, v, kl, vl, grad_out, lse, delta, dq, cu, tq, tk,
            num_latents, tiles, heads, heads // kv_heads, *steps, scale, scale * LOG2E, UNIT=unit, config=config,
            **chunk_meta(dim),
        )  # fmt: skip

    configs = backward_configs(q, num_latents, False)
    run(triton_runtime.pick("perceiver_attention_dq", _key(q, k, num_latents), configs, run, q.device))
