"""CUDA C++: norm, first product with activation and gating in its epilogue, norm, second product; at most four launches.

Forward only; the gradients are those of the ``torch`` backend. The first product is csrc/cuda/mlp.cu where it is gated (both
products of a column in the registers of one thread, x read once for both) or gathers, else linear's kernel; the second one is
linear's, with LayerScale and the residual in its epilogue. Norms are passes of their own: the statistics of a row are known only
after all of it was read. Between the passes rows are rounded to x's dtype.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from vlmops.backends import cuda_runtime
from vlmops.backends.cuda_runtime import CTYPE, Out, Plan, i32, i64, vector
from vlmops.ops._shared.strides import dense_rows
from vlmops.ops.linear import cuda as linear
from vlmops.ops.linear.cuda import FEW, FLOAT_THREADS, FLOAT_TILE, MOST, STREAM_THREADS, WARP, Tile
from vlmops.ops.mlp.layout import gather_rows
from vlmops.ops.norms import cuda as norms

#: Of sums: a block has half as many columns of h, a warp both products of 32.
GATED_TILES = (Tile(128, 128, 32, 32, 64), Tile(64, 128, 32, 32, 64), Tile(16, 128, 64, 16, 64))


class Rows(NamedTuple):
    """[m, k] that the first product reads: a matrix, or tokens [pictures, height * width, k / 4] in blocks of 2 x 2."""

    x: Tensor
    m: int
    k: int
    height: int = 0  # 0: a matrix
    width: int = 0


def supports(
    x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, w_gate: Tensor | None,
    b_gate: Tensor | None, activation: str, residual: Tensor | None, norm: str, norm_weight: Tensor | None,
    norm_bias: Tensor | None, norm_eps: float, mid_norm: str, mid_weight: Tensor | None, mid_bias: Tensor | None,
    mid_eps: float, layer_scale: Tensor | None, gather: str, height: int, width: int, inference: bool,
) -> str | None:  # fmt: skip
    """Why these kernels cannot run these arguments; None if they can."""
    for t in (w1, b1, w2, b2, w_gate, b_gate, residual, norm_weight, norm_bias, mid_weight, mid_bias, layer_scale):
        if t is not None and t.dtype != x.dtype:
            return f"{str(t.dtype)[6:]} beside {str(x.dtype)[6:]}"
    rows, (hidden, k), n = x.shape[:-1].numel(), w1.shape, w2.shape[0]
    if max(rows, hidden, k, n) > MOST:
        return f"products of {rows} x {k} by {hidden} x {k} and by {n} x {hidden} (each at most {MOST})"
    for kind, size in ((norm, x.shape[-1]), (mid_norm, hidden)):
        if kind and size > norms.MAX_WIDTH:
            return f"a norm over {size} elements (at most {norms.MAX_WIDTH})"
    return cuda_runtime.why_not(x)


def forward(
    x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, w_gate: Tensor | None,
    b_gate: Tensor | None, activation: str, residual: Tensor | None, norm: str, norm_weight: Tensor | None,
    norm_bias: Tensor | None, norm_eps: float, mid_norm: str, mid_weight: Tensor | None, mid_bias: Tensor | None,
    mid_eps: float, layer_scale: Tensor | None, gather: str, height: int, width: int, inference: bool,
) -> Tensor:  # fmt: skip
    """[..., N] in x's dtype."""
    shape = (x.shape[0] // 4,) if gather == "merge2x2" else (x.shape[0], x.shape[1] // 4) if gather else x.shape[:-1]
    n, plans = w2.shape[0], list[Plan]()
    out = x.new_empty(math.prod(shape), n)
    if out.numel():
        x = _norm(plans, x, norm, norm_weight, norm_bias, norm_eps)
        weights = [linear.flatten(w) for w in (w1, w_gate) if w is not None]
        h = x.new_empty(out.shape[0], w1.shape[0])
        if h.numel():
            read = rows_of(plans, x, gather, height, width, weights)
            plans.append(hidden_plan(read, weights, b1, b_gate, activation, h))
        h = _norm(plans, h, mid_norm, mid_weight, mid_bias, mid_eps)
        residual = None if residual is None else linear.flatten(residual)
        scale = layer_scale is not None
        plans.append(linear.forward_plan(h, linear.flatten(w2), b2, "", layer_scale, None, residual, out, scale))
        cuda_runtime.run(plans)
    return out.view(*shape, n)


def _norm(plans: list[Plan], x: Tensor, kind: str, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """LayerNorm or RMSNorm over the last dimension, dense, its launch added to ``plans``; x itself for ""."""
    if kind == "" or x.numel() == 0:
        return x
    rows = dense_rows(x.reshape(-1, x.shape[-1]))
    out = x.new_empty(rows.shape)
    plans.append(norms.forward_plan(rows, None, weight, bias, out, out, eps, 0.0, kind == "layer_norm", False))
    return out.view(x.shape)


def rows_of(plans: list[Plan], x: Tensor, gather: str, height: int, width: int, weights: list[Tensor]) -> Rows:
    """What the first product reads; a copy only where elements do not lie together, or accesses would be of 2 bytes.

    Args:
        plans: those that write x, run before it is copied.
    """
    k = weights[0].shape[1]
    if gather == "" or (gather == "merge2x2" and x.is_contiguous()):
        rows = linear.flatten(x if gather == "" else x.view(x.shape[0] // 4, k))
        return Rows(rows, *rows.shape)
    x = dense_rows(x)
    if gather == "merge2x2":  # strided: a picture of two columns
        x, height, width = x[None], x.shape[0] // 2, 2
    if vector([x, *weights], [k // 4]) * x.element_size() >= 4:
        return Rows(x, x.shape[0] * x.shape[1] // 4, k, height, width)
    cuda_runtime.run(plans)
    plans.clear()
    rows = gather_rows(x, "pixel_shuffle", height, width).reshape(-1, k)
    return Rows(rows, *rows.shape)


def hidden_plan(
    rows: Rows, weights: list[Tensor], b1: Tensor | None, b_gate: Tensor | None, activation: str, out: Tensor
) -> Plan:
    """The launch of the first product. ``weights``: w1, and w_gate if there is one; ``out`` [M, H] has elements."""
    gated, gathers = len(weights) == 2, rows.height > 0
    if not gated and not gathers:
        return linear.forward_plan(rows.x, weights[0], b1, activation, None, None, None, out)
    x, m, k = rows.x, rows.m, rows.k
    n, processors = out.shape[1], cuda_runtime.processors(x)
    b1, b_gate = (None if b is None else b.contiguous() for b in (b1, b_gate))
    vec = vector([x, *weights], [k // 4 if gathers else k])
    common = (("T", CTYPE[x.dtype]), ("ACT", activation), ("GATED", gated), ("GATHER", gathers), ("VEC", vec))
    each = ("OUT", vector([out, b1, b_gate], [n]))
    w1, w_gate = weights[0], weights[1] if gated else None
    args = (
        x, w1, w_gate, b1, b_gate, Out(out), i64(x.stride(-2)), i64(x.stride(0) if gathers else 0), i64(w1.stride(0)),
        i64(0 if w_gate is None else w_gate.stride(0)), i32(m), i32(n), i32(k),
        i32(rows.height * rows.width // 4 if gathers else 1), i32(rows.width // 2 if gathers else 1),
    )  # fmt: skip
    sums = n * len(weights)
    if m <= FEW:
        columns = max(1, linear.columns_of(sums, processors) // len(weights))
        return Plan(
            "mlp.cu", "mlp_few_rows", (*common, ("ROWS", m), ("COLS", columns)),
            (-(-n // (columns * STREAM_THREADS // WARP)), 1, 1), STREAM_THREADS, args,
        )  # fmt: skip
    if x.dtype == torch.float32:
        return Plan(
            "mlp.cu", "mlp_gemm_float", (*common, each), (-(-m // FLOAT_TILE) * -(-n // FLOAT_TILE), 1, 1), FLOAT_THREADS, args
        )  # fmt: skip
    large, small, flat = GATED_TILES if gated else linear.TILES
    if vec == 1:  # elements one by one, through registers: too many for the flat tile's few threads
        flat = small
    tile = linear.tile_of(m, sums, processors, (large, small, flat))
    return Plan(
        "mlp.cu", "mlp_gemm", (*common, each, *tile.defines), (tile.tiles(m, sums), 1, 1), tile.threads, args,
        shared=tile.shared,
    )  # fmt: skip
