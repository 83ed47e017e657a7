"""Triton: few rows stream the packed weight, more rows meet it on tensor cores as it leaves the registers.

With ``quantize_activations`` both operands are e4m3 where the GPU's tensor cores take it, and float16 that holds the same numbers
elsewhere and for float32 results: Hopper sums e4m3 products in fewer bits than those are held to.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from vlmops.backends import triton_runtime
from vlmops.backends.triton_runtime import Config
from vlmops.ops._shared import triton_float8
from vlmops.ops._shared.strides import dense_rows
from vlmops.ops._shared.triton_math import cdiv, next_power_of_two
from vlmops.ops.quantized_linear.triton_kernels import (
    quantize_rows_kernel,
    quantized_gemm_kernel,
    quantized_gemv_kernel,
)

FEW = 4  # rows up to which the weight is streamed past sums instead of tensor cores
WHOLE = 16384  # columns up to which a row that is rounded lives in the registers of one block


def supports(x: Tensor, data: Tensor, *args: Any) -> str | None:
    """Why these kernels cannot run these arguments; None if they can."""
    return triton_runtime.why_not(x)


def forward(
    x: Tensor, data: Tensor, scale: Tensor, zero: Tensor | None, kind: str, group_size: int, columns: int,
    bias: Tensor | None, activation: str, gate: Tensor | None, row_mask: Tensor | None, residual: Tensor | None,
    quantize_activations: bool,
) -> Tensor:  # fmt: skip
    """[..., N] in x's dtype."""
    a, n, k = x.reshape(-1, columns), data.shape[0], columns
    m = a.shape[0]
    out = x.new_empty(*x.shape[:-1], n)
    if m == 0 or n == 0:
        return out
    native = kind == "fp8" and triton_float8.native(x)
    if kind == "fp8":
        data = data.view(torch.float8_e4m3fn if native else torch.uint8)
    a = a if a.stride(1) == 1 or k <= 1 else a.contiguous()
    a_scale = None
    if quantize_activations:
        a, a_scale = quantize_rows(a, native and x.dtype != torch.float32)
    la = a.stride(0) if m > 1 else max(1, k)
    unit = math.gcd(16, la)
    rest = None if residual is None else residual.reshape(m, n)
    rest = None if rest is None else dense_rows(rest)
    mask = None if row_mask is None else row_mask.reshape(-1).contiguous().view(torch.uint8)
    given = (zero, bias if bias is None else bias.contiguous(), gate if gate is None else gate.contiguous(), mask, rest)
    tensors = [a, a if a_scale is None else a_scale, data, scale, *(out if t is None else t for t in given), out]
    blocks = data.shape[1] // (64 if kind == "int4" else 128)
    sizes = (m, n, k, blocks, la // unit, 0 if rest is None else rest.stride(0))
    meta: dict[str, Any] = dict(
        KIND=kind, GROUP=group_size, HAS_ZERO=zero is not None, NATIVE=native, A_SCALED=a_scale is not None, LA_UNIT=unit,
        ACTIVATION=activation, HAS_BIAS=bias is not None,
        GATE_KIND="" if gate is None else "scalar" if gate.numel() == 1 else "vector", HAS_MASK=mask is not None,
        HAS_RESIDUAL=rest is not None,
    )  # fmt: skip
    key = f"{x.dtype} {kind} {group_size} {n} {k} {activation} {quantize_activations} {m.bit_length()}"
    if m <= FEW:

        def stream(config: Config) -> None:
            triton_runtime.launch(
                quantized_gemv_kernel, (cdiv(n, config["BN"]),), *tensors, *sizes, ROWS=next_power_of_two(m),
                RUN=scale_run(kind, group_size, config["BK"]), config=config, **meta,
            )  # fmt: skip

        stream(triton_runtime.pick("quantized_gemv", key, gemv_configs(m, data.shape[1]), stream, x.device))
        return out

    def run(config: Config) -> None:
        tiles = cdiv(m, config["BM"]) * cdiv(n, config["BN"])
        triton_runtime.launch(
            quantized_gemm_kernel, (tiles,), *tensors, *sizes, EVEN_K=k == blocks * 128, config=config, **meta
        )

    configs = gemm_configs(a, m, n, kind)
    run(triton_runtime.pick("quantized_gemm", key, configs, run, x.device))
    return out


def quantize_rows(x: Tensor, native: bool) -> tuple[Tensor, Tensor]:
    """x [M, K] in e4m3 (its numbers in float16 where kernels cannot hold e4m3), and float32 [M], a power of two a row."""
    m, k = x.shape
    out = x.new_empty(m, k, dtype=torch.float8_e4m3fn if native else torch.float16)
    scale = x.new_empty(m, dtype=torch.float32)
    block = next_power_of_two(k) if k <= WHOLE else 4096
    triton_runtime.launch(
        quantize_rows_kernel, (m,), x, out, scale, k, x.stride(0), NATIVE=native, WHOLE=k <= WHOLE, BLOCK=block,
        warps=max(1, min(16, block // 512)),
    )  # fmt: skip
    return out, scale


def scale_run(kind: str, group_size: int, block: int) -> int:
    """Bytes of a row, at most ``block``, that share a scale: as many as columns, or half where an int4 block is one group."""
    if kind == "int4" and group_size >= 128:
        group_size //= 2
    return math.gcd(group_size, block)


def gemv_configs(rows: int, row_bytes: int) -> list[Config]:
    """Rows of the weight and bytes of each that a program takes at a time, the default first; fewer for more ``rows`` of x."""
    found: list[Config] = []
    sizes = [(8, 512), (4, 512), (8, 256), (16, 512), (4, 1024)]
    for bn, bk in sizes if rows <= 2 else sizes[1:3]:
        config = Config.of(BN=bn, BK=min(bk, next_power_of_two(row_bytes)), warps=4, stages=1)
        if config not in found:
            found.append(config)
    return found


def gemm_configs(a: Tensor, m: int, n: int, kind: str) -> list[Config]:
    """Tiles, the default first; small problems get small ones, so that every SM has some. ``a``: what is multiplied, [M, K]."""
    where, size = triton_runtime.target(a), a.element_size()
    bk = 128 if size == 1 else 64
    if size == 4:
        tiles = [(32, 32, 4, 1), (16, 64, 4, 1)]
    elif where.backend == "hip":
        tiles = [(64, 64, 4, 1), (32, 64, 4, 1), (128, 64, 8, 1)]
    else:
        tiles = [(128, 128, 8, 3), (64, 128, 4, 3), (64, 64, 4, 4), (128, 64, 4, 3), (32, 64, 4, 4)]
        if where.arch == 80 and kind == "int4":  # 128 rows of the weight, in two halves, are too much for its registers
            tiles = [(128, 64, 8, 3), (64, 64, 4, 4), (32, 64, 4, 4)]
    rows = max(16, next_power_of_two(m))
    # Stable: tiles that give every SM one keep their order, then those that come nearest to it.
    tiles.sort(key=lambda t: -min(where.processors, cdiv(m, t[0]) * cdiv(n, t[1])))
    found: list[Config] = []
    for bm, bn, warps, stages in tiles:
        config = Config.of(BM=min(bm, rows), BN=bn, BK=bk, GROUP_M=8, warps=warps if rows > 32 else 4, stages=stages)
        if config not in found:
            found.append(config)
    return found
