"""CUDA C++: few rows as a stream of the packed weight, more on tensor cores. Forward only (csrc/cuda/quantized_linear.cu).

Rounded activations and many rows of float32 are left to the other backends.
"""

from __future__ import annotations

from math import gcd

import torch
from torch import Tensor

from vlmops.backends import cuda_runtime
from vlmops.backends.cuda_runtime import CTYPE, Out, Plan, i32, i64, vector
from vlmops.ops.linear.cuda import Tile, flatten, tile_of

FEW = 8  # rows up to which the weight is streamed past sums instead of tiles
WARP = 32
THREADS = 128
WARPS = THREADS // WARP
WARPS_WANTED = 16  # of an SM, so that enough loads are under way: else a warp takes fewer columns, then a part of k
ALIGNED = 16  # bytes of the widest access to the weight
MOST = 2**31 - 2**13  # sizes are 32-bit, and so is the step past a row's end
#: Tiles of linear's, all 64 columns of x at a time: an int4 byte holds two numbers 64 columns apart.
TILES = LARGE, SMALL, FLAT = Tile(128, 128, 64, 64, 32), Tile(64, 64, 64, 32, 32), Tile(16, 128, 64, 16, 32)


def supports(
    x: Tensor, data: Tensor, scale: Tensor, zero: Tensor | None, kind: str, group_size: int, columns: int,
    bias: Tensor | None, activation: str, gate: Tensor | None, row_mask: Tensor | None, residual: Tensor | None,
    quantize_activations: bool,
) -> str | None:  # fmt: skip
    """Why this kernel cannot run these arguments; None if it can."""
    for t in (bias, gate, residual):
        if t is not None and t.dtype != x.dtype:
            return f"{str(t.dtype)[6:]} beside {str(x.dtype)[6:]}"
    if quantize_activations:
        return "quantize_activations"
    rows, n = x.shape[:-1].numel(), data.shape[0]
    if rows > FEW and x.dtype == torch.float32:
        return f"{rows} rows of float32 (at most {FEW})"
    if max(rows, n, columns) > MOST:
        return f"a product of {rows} x {columns} by {n} x {columns} (each at most {MOST})"
    return cuda_runtime.why_not(x)


def forward(
    x: Tensor, data: Tensor, scale: Tensor, zero: Tensor | None, kind: str, group_size: int, columns: int,
    bias: Tensor | None, activation: str, gate: Tensor | None, row_mask: Tensor | None, residual: Tensor | None,
    quantize_activations: bool,
) -> Tensor:  # fmt: skip
    """[..., N] in x's dtype."""
    rows = flatten(x)
    out = x.new_empty(rows.shape[0], data.shape[0])
    if out.numel():
        residual = None if residual is None else flatten(residual)
        row_mask = None if row_mask is None else row_mask.reshape(-1).contiguous()
        plan = forward_plan(rows, data, scale, zero, kind, group_size, bias, activation, gate, row_mask, residual, out)
        cuda_runtime.run([plan])
    return out.view(*x.shape[:-1], data.shape[0])


def share(n: int, row_bytes: int, processors: int) -> tuple[int, int]:
    """Columns a warp takes and warps that share them along k: few reads of x, as long as there are warps enough.

    Args:
        n: rows of the weight.
        row_bytes: of one.
        processors: SMs.
    """
    wanted = WARPS_WANTED * processors
    columns = next((c for c in (4, 2) if n >= c * wanted), 1)
    split = next((s for s in (1, 2) if n * s >= columns * wanted), 4)
    while split > 1 and row_bytes < split * WARP * ALIGNED:  # a part without a byte
        split //= 2
    return columns, split


def forward_plan(
    x: Tensor, data: Tensor, scale: Tensor, zero: Tensor | None, kind: str, group_size: int, bias: Tensor | None,
    activation: str, gate: Tensor | None, row_mask: Tensor | None, residual: Tensor | None, out: Tensor,
) -> Plan:  # fmt: skip
    """The launch. x [M, K] and residual have unit stride in a row, ``row_mask`` is dense, ``out`` [M, N] has elements."""
    (m, k), n = x.shape, data.shape[0]
    if data.stride(1) != 1 or data.data_ptr() % ALIGNED or (n > 1 and data.stride(0) % ALIGNED):
        data = data.new_empty(data.shape).copy_(data)
    bias = None if bias is None else bias.contiguous()
    gate_step = 0 if gate is None or gate.numel() == 1 else 1
    gate = None if gate is None else gate.contiguous()
    scale, zero = scale.contiguous(), None if zero is None else zero.contiguous()
    processors = cuda_runtime.processors(x)
    common = (
        ("T", CTYPE[x.dtype]), ("ACT", activation or "none"), ("KIND", kind), ("GROUP", group_size), ("VEC", vector([x], [k])),
    )  # fmt: skip
    tensors = (x, data, scale, zero, bias, gate, row_mask, residual, Out(out))
    strides = (i64(x.stride(0)), i64(data.stride(0)), i64(0 if residual is None else residual.stride(0)))
    if m > FEW:
        tile = tile_of(m, n, processors, TILES)
        return Plan(
            "quantized_linear.cu", "quantized_gemm",
            (*common, ("EACH", vector([scale], [n])), ("OUT", vector([out, residual, bias, gate if gate_step else None], [n])),
             *tile.defines),
            (tile.tiles(m, n), 1, 1), tile.threads, (*tensors, *strides, i32(m), i32(n), i32(k), i32(gate_step)),
            shared=tile.shared,
        )  # fmt: skip
    columns, split = share(n, data.shape[1], processors)
    each = gcd(columns, vector([scale], [n]))
    if zero is not None:
        each = gcd(each, vector([zero], [n]))
    # Sixteen columns of a row of x are two accesses, of which each lane has its own two: half of each sector. That is
    # little for two rows; for more, an access to the weight is eight columns.
    width = 16 if m <= 2 else 8
    return Plan(
        "quantized_linear.cu", "quantized_few_rows",
        (*common, ("ZERO", zero is not None), ("EACH", each), ("ROWS", m), ("COLS", columns), ("SPLIT", split),
         ("BYTES", width)),
        (-(-n // (columns * WARPS // split)), 1, 1), THREADS, (*tensors, *strides, i32(n), i32(k), i32(gate_step)),
    )  # fmt: skip
