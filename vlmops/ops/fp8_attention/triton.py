"""Triton: heads rounded to e4m3 in two passes over q, k and v, then both products of an online softmax in e4m3.

Inputs in float32, and GPUs whose tensor cores have no e4m3 of this kind (sm_80, gfx942), run the same kernels on the same
numbers held in float16. Float32 does, because Hopper sums e4m3 products in fewer bits than its results are held to.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vlmops.backends import triton_runtime
from vlmops.backends.triton_runtime import Config
from vlmops.ops._shared import triton_float8
from vlmops.ops._shared.checks import cu_seqlens_list
from vlmops.ops._shared.strides import dense_rows
from vlmops.ops._shared.triton_attention import LOG2E, chunks
from vlmops.ops._shared.triton_attention_launch import strides, why_not_attention
from vlmops.ops._shared.triton_math import cdiv, next_power_of_two
from vlmops.ops._shared.triton_schedule import tile_slots
from vlmops.ops.fp8_attention.triton_kernels import (
    fp8_forward_kernel,
    head_max_kernel,
    round_heads_kernel,
    turn_heads_kernel,
)

ROWS = 64  # tokens a program of the rounding passes takes at a time
TURN_ROWS = 32  # the same where v is turned: one 32-byte sector of each row written
PARTS = 64  # most partial maxima of a head


def supports(q: Tensor, *args: Any) -> str | None:
    """Why these kernels cannot run these arguments; None if they can."""
    return why_not_attention(q)


def key_chunks(dim: int) -> tuple[int, int]:
    """Chunks of a head for q k^T: as ``chunks``, but at least 32 wide, the least an e4m3 product sums over (80 -> 64 + 32)."""
    first, second = chunks(max(32, dim))
    return first, second if second == 0 else max(32, second)


def value_chunk(dim: int) -> int:
    """The second chunk of a head of v, of which a product sums none: it may be 16 wide."""
    return chunks(max(32, dim))[1]


def holds_e4m3(q: Tensor) -> bool:
    """Whether rounded heads are float8_e4m3fn rather than float16."""
    return triton_float8.native(q) and q.dtype != torch.float32


def forward(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int,
    scale: float, causal: bool, left: int, right: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """out [Tq, Hq, D] in q's dtype, lse [Hq, Tq]."""
    (tq, heads, dim), (tk, kv_heads, _) = q.shape, k.shape
    if q.device.type == "cpu":
        cu_seqlens_list("cu_seqlens_q", cu_seqlens_q, tq)
        cu_seqlens_list("cu_seqlens_k", cu_seqlens_k, tk)
    n = cu_seqlens_q.shape[0] - 1
    if n == 0 or tq == 0:
        return q.new_empty(tq, heads, dim), q.new_empty(heads, tq, dtype=torch.float32)
    native = holds_e4m3(q)
    first, second = key_chunks(dim)
    rounded = (
        *round_heads(q, first, second, native), *round_heads(k, first, second, native),
        *turn_heads(v, cu_seqlens_k, max_seqlen_k, first, value_chunk(dim), native),
    )  # fmt: skip
    return attend(q, rounded, cu_seqlens_q, cu_seqlens_k, tk, kv_heads, max_seqlen_q, scale, causal, left, right)


def attend(
    q: Tensor, rounded: tuple[Tensor, ...], cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, tk: int, kv_heads: int, max_seqlen_q: int,
    scale: float, causal: bool, left: int, right: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The attention of rounded heads: q8, its scale, k8, its scale, turned v8, its scale. Of q only shape and dtype count."""
    q8, q_scale, k8, k_scale, v8, v_scale = rounded
    tq, heads, dim = q.shape
    out = q.new_empty(tq, heads, dim)
    lse = q.new_empty(heads, tq, dtype=torch.float32)
    n = cu_seqlens_q.shape[0] - 1
    native = holds_e4m3(q)
    first, second = key_chunks(dim)
    meta: dict[str, Any] = dict(
        D=dim, D0=first, D1=second, DV=value_chunk(dim), LEFT=left >= 0, RIGHT=causal or right >= 0, NATIVE=native
    )

    def run(config: Config) -> None:
        slots = tile_slots(cu_seqlens_q, tq, max_seqlen_q, config["BM"])
        triton_runtime.launch(
            fp8_forward_kernel, (slots.shape[1] * heads,), q8, k8, v8, q_scale, k_scale, v_scale, out, lse, slots, cu_seqlens_q,
            cu_seqlens_k, tq, tk, slots.shape[1], v8.shape[2] // 16, heads, heads // kv_heads, scale * LOG2E, left,
            0 if causal else right, config=config, **meta,
        )  # fmt: skip

    key = f"{q.dtype} {heads} {kv_heads} {dim} {meta} {max(16, 1 << (tq // n).bit_length())}"
    run(triton_runtime.pick("fp8_attention", key, forward_configs(q, max_seqlen_q, native), run, q.device))
    return out, lse


def _dtype(native: bool) -> torch.dtype:
    return torch.float8_e4m3fn if native else torch.float16


def head_max(x: Tensor, meta: dict[str, Any]) -> Tensor:
    """float32 [H, parts]: the largest finite magnitudes of parts of each head of x [T, H, D]."""
    tokens, heads, _ = x.shape
    parts = x.new_empty(heads, min(PARTS, cdiv(tokens, ROWS)), dtype=torch.float32)
    _, (step, head) = strides(x)
    triton_runtime.launch(head_max_kernel, (parts.shape[1], heads), x, parts, tokens, step, head, ROWS=ROWS, **meta)
    return parts


def _head_meta(x: Tensor, first: int, second: int) -> dict[str, Any]:
    return dict(D=x.shape[2], D0=first, D1=second, UNIT=strides(x)[0])


def round_heads(x: Tensor, first: int, second: int, native: bool) -> tuple[Tensor, Tensor]:
    """x [T, H, D] in e4m3 as [H, T, first + second], and float32 [H], a power of two a head."""
    x = dense_rows(x)
    tokens, heads, _ = x.shape
    out = x.new_empty(heads, tokens, first + second, dtype=_dtype(native))
    scale = x.new_ones(heads, dtype=torch.float32) if tokens == 0 else x.new_empty(heads, dtype=torch.float32)
    meta = _head_meta(x, first, second)
    parts = head_max(x, meta)
    _, (step, head) = strides(x)
    triton_runtime.launch(
        round_heads_kernel, (cdiv(tokens, ROWS), heads), x, parts, out, scale, tokens, parts.shape[1], step, head,
        NATIVE=native, PARTS_BLOCK=next_power_of_two(parts.shape[1]), ROWS=ROWS, **meta,
    )  # fmt: skip
    return out, scale


def turn_heads(
    x: Tensor, cu_seqlens: Tensor, longest: int, first: int, second: int, native: bool
) -> tuple[Tensor, Tensor]:
    """x [T, H, D] in e4m3 as [H, first + second, T'], and float32 [H], a power of two a head.

    Sequence i begins at column 16 (cu_seqlens[i] // 16 + i), and T' is 16 (T // 16 + n).
    """
    x = dense_rows(x)
    tokens, heads, _ = x.shape
    blocks = tokens // 16 + cu_seqlens.shape[0] - 1
    out = x.new_empty(heads, first + second, 16 * blocks, dtype=_dtype(native))
    if tokens == 0:
        return out, x.new_ones(heads, dtype=torch.float32)
    scale = x.new_empty(heads, dtype=torch.float32)
    meta = _head_meta(x, first, second)
    parts = head_max(x, meta)
    slots = tile_slots(cu_seqlens, tokens, longest, TURN_ROWS)
    _, (step, head) = strides(x)
    triton_runtime.launch(
        turn_heads_kernel, (slots.shape[1], heads), x, parts, out, scale, slots, cu_seqlens, tokens, slots.shape[1],
        parts.shape[1], blocks, step, head, NATIVE=native, PARTS_BLOCK=next_power_of_two(parts.shape[1]), ROWS=TURN_ROWS,
        **meta,
    )  # fmt: skip
    return out, scale


def forward_configs(q: Tensor, longest: int, native: bool) -> list[Config]:
    """Tiles of the forward, the default first."""
    width = sum(key_chunks(q.shape[2]))
    where = triton_runtime.target(q)
    if where.backend == "hip":
        tiles = [(128, 32, 4, 1), (64, 32, 4, 1)] if width <= 128 else [(64, 32, 4, 1)]
    elif native and width <= 128:
        tiles = [(128, 64, 8, 2), (128, 128, 8, 2), (64, 64, 4, 2)]
    elif native:
        tiles = [(64, 64, 8, 2), (64, 32, 8, 2)]
        if where.arch == 90:  # which holds a tile's sums beside the running ones
            tiles.reverse()
    elif width <= 128:
        tiles = [(64, 64, 4, 2), (128, 64, 8, 2)]
        if (
            where.arch == 80 and q.shape[2] == 96
        ):  # three loops over both chunks of a window are too much for its registers
            tiles.insert(0, (64, 32, 4, 2))
    else:
        tiles = [(64, 32, 8, 2), (32, 32, 4, 2)]
    found = []
    for bm, bn, warps, stages in tiles:
        rows = bm if longest <= 0 else max(16, min(bm, next_power_of_two(longest)))
        config = Config.of(BM=rows, BN=bn, warps=warps if rows >= 64 else 4, stages=stages)
        if config not in found:
            found.append(config)
    return found
