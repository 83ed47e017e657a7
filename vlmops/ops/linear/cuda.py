"""CUDA C++: tensor-core tiles with the epilogue in registers, exact float32 tiles, few rows as a stream of the weight.

Forward only (csrc/cuda/linear.cu); the gradients are those of the ``torch`` backend.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from vlmops.backends import cuda_runtime
from vlmops.backends.cuda_runtime import CTYPE, Out, Plan, i32, i64, vector
from vlmops.ops.linear import cuda_sm90

FEW = 4  # rows up to which the weight is streamed past sums instead of tiles
WARP = 32
STREAM_THREADS = 128
WARPS_WANTED = 16  # of an SM, so that enough loads are under way: else a warp takes fewer columns
FLOAT_TILE, FLOAT_THREADS = 64, 256
STAGES = 3
MOST = 2**31 - 256  # sizes are 32-bit, and so is the end of a last tile


class Tile(NamedTuple):
    """A block's part of the product, its step along k, a warp's part."""

    bm: int
    bn: int
    bk: int
    wm: int
    wn: int

    @property
    def threads(self) -> int:
        return self.bm // self.wm * (self.bn // self.wn) * WARP

    @property
    def shared(self) -> int:
        """Bytes, of 16-bit elements."""
        return STAGES * (self.bm + self.bn) * self.bk * 2

    @property
    def defines(self) -> tuple[tuple[str, int], ...]:
        """What specialises a kernel of these tiles."""
        return (("BM", self.bm), ("BN", self.bn), ("BK", self.bk), ("WM", self.wm), ("WN", self.wn), ("STAGES", STAGES))

    def tiles(self, m: int, n: int) -> int:
        return -(-m // self.bm) * -(-n // self.bn)


TILES = LARGE, SMALL, FLAT = Tile(128, 128, 32, 64, 32), Tile(64, 64, 32, 32, 32), Tile(16, 128, 64, 16, 32)


def supports(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, gate: Tensor | None, row_mask: Tensor | None,
             residual: Tensor | None, inference: bool) -> str | None:  # fmt: skip
    """Why these kernels cannot run these arguments; None if they can."""
    for t in (weight, bias, gate, residual):
        if t is not None and t.dtype != x.dtype:
            return f"{str(t.dtype)[6:]} beside {str(x.dtype)[6:]}"
    rows, (n, k) = x.shape[:-1].numel(), weight.shape
    if max(rows, n, k) > MOST:
        return f"a product of {rows} x {k} by {n} x {k} (each at most {MOST})"
    return cuda_runtime.why_not(x)


def flatten(x: Tensor) -> Tensor:
    """[..., C] as [rows, C] with unit stride inside a row, also where there are no elements."""
    x = x.reshape(x.shape[:-1].numel(), x.shape[-1])
    return x if x.stride(-1) == 1 or x.shape[1] <= 1 else x.contiguous()


def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, gate: Tensor | None, row_mask: Tensor | None,
    residual: Tensor | None, inference: bool,
) -> Tensor:  # fmt: skip
    """[..., N] in x's dtype."""
    rows = flatten(x)
    out = x.new_empty(rows.shape[0], weight.shape[0])
    if out.numel():
        residual = None if residual is None else flatten(residual)
        row_mask = None if row_mask is None else row_mask.reshape(-1).contiguous()
        cuda_runtime.run([forward_plan(rows, flatten(weight), bias, activation, gate, row_mask, residual, out)])
    return out.view(*x.shape[:-1], weight.shape[0])


def tile_of(m: int, n: int, processors: int, tiles: tuple[Tile, Tile, Tile] = TILES) -> Tile:
    """The tile for [m, n] of three: as large as leaves every SM two blocks; flat where more rows would be padding."""
    large, small, flat = tiles
    if m <= flat.bm:
        return flat
    return large if m > small.bm and large.tiles(m, n) >= 2 * processors else small


def columns_of(n: int, processors: int) -> int:
    """Columns a warp takes where the weight is streamed: fewer reads of x, as long as there are warps enough."""
    return next((c for c in (4, 2) if n >= c * WARPS_WANTED * processors), 1)


def forward_plan(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, gate: Tensor | None, row_mask: Tensor | None,
    residual: Tensor | None, out: Tensor, scale: bool = False,
) -> Plan:  # fmt: skip
    """The launch. Rows have unit stride, ``row_mask`` is dense, ``out`` [M, N] has elements; ``scale``: no tanh of the gate."""
    (m, k), n = x.shape, weight.shape[0]
    bias = None if bias is None else bias.contiguous()
    gate_step = 0 if gate is None or gate.numel() == 1 else 1
    gate = None if gate is None else gate.contiguous()
    processors = cuda_runtime.processors(x)
    vec = vector([x, weight], [k])
    each = vector([out, residual, bias, gate if gate_step else None], [n])
    common = (("T", CTYPE[x.dtype]), ("ACT", activation or "none"), ("SCALE", scale), ("VEC", vec))
    tensors = (x, weight, bias, gate, row_mask, residual, Out(out))
    strides = (i64(x.stride(0)), i64(weight.stride(0)), i64(0 if residual is None else residual.stride(0)))
    if m <= FEW:
        columns = columns_of(n, processors)
        return Plan(
            "linear.cu", "linear_few_rows", (*common, ("ROWS", m), ("COLS", columns)),
            (-(-n // (columns * STREAM_THREADS // WARP)), 1, 1), STREAM_THREADS,
            (*tensors, *strides, i32(n), i32(k), i32(gate_step)),
        )  # fmt: skip
    sizes = (i32(m), i32(n), i32(k), i32(gate_step))
    if x.dtype == torch.float32:
        return Plan(
            "linear.cu", "linear_gemm_float", (*common, ("OUT", each)), (-(-m // FLOAT_TILE) * -(-n // FLOAT_TILE), 1, 1),
            FLOAT_THREADS, (*tensors, *strides, *sizes),
        )  # fmt: skip
    if cuda_sm90.wanted(x, weight, m, n, k):
        return cuda_sm90.plan(x, weight, tensors[2:], (strides[2], *sizes), activation, scale, each)
    tile = tile_of(m, n, processors)
    return Plan(
        "linear.cu", "linear_gemm", (*common, ("OUT", each), *tile.defines),
        (tile.tiles(m, n), 1, 1), tile.threads, (*tensors, *strides, *sizes), shared=tile.shared,
    )  # fmt: skip
