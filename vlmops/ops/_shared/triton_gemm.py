"""One matrix product C = epilogue(A B) for every use: projections, both products of an MLP, and all their gradients.

A is [M, K] or its transpose, B is a weight [N, K] as nn.Linear holds it or [K, N]. Tiles are walked in groups of rows, so
that neighbouring programs share weights in the L2 cache. On sm_90 and newer both operands may come by tensor
descriptors (TMA). Sizes come in units that are constants, so that the compiler knows what divides them.
"""

from __future__ import annotations

import triton
import triton.language as tl

from vlmops.ops._shared.triton_math import activate, tanh

__all__ = ["column_factor", "epilogue", "few_rows_kernel", "finish", "gathered", "gemm_kernel", "product"]


@triton.jit
def gathered(row, column, stride, image, height, width, CHANNELS: tl.constexpr, GATHER: tl.constexpr):
    """Where [row, column] of a matrix of rows of four source rows lies: consecutive ones, or 2x2 blocks of pictures.

    row and column broadcast against each other; ``stride`` and ``image`` (int64) lead to the next source row and picture.
    """
    part = column // CHANNELS
    channel = column - part * CHANNELS
    if GATHER == "merge2x2":
        at = row.to(tl.int64) * 4 * stride + part.to(tl.int64) * stride
    else:
        blocks = (height // 2) * (width // 2)
        block = row % blocks
        first = block // (width // 2) * 2 * width + block % (width // 2) * 2
        at = (row // blocks).to(tl.int64) * image + first.to(tl.int64) * stride
        at = at + (part // 2 * width + part % 2).to(tl.int64) * stride
    return at + channel


@triton.jit
def _load_a(A, row, row_ok, k, K, la, image, height, width, CHANNELS: tl.constexpr, GATHER: tl.constexpr,
            A_T: tl.constexpr, EVEN_K: tl.constexpr):  # fmt: skip
    """[BM, BK] of A, zeros outside."""
    if GATHER != "":
        at = A + gathered(row[:, None], k[None, :], la, image, height, width, CHANNELS, GATHER)
    elif A_T:
        at = A + row[:, None] + k[None, :].to(tl.int64) * la
    else:
        at = A + row[:, None].to(tl.int64) * la + k[None, :]
    mask = row_ok[:, None]
    if not EVEN_K:
        mask = mask & (k < K)[None, :]
    return tl.load(at, mask=mask, other=0.0)


@triton.jit
def _load_b(B, column, column_ok, k, K, lb, image, height, width, CHANNELS: tl.constexpr, GATHER: tl.constexpr,
            B_T: tl.constexpr, EVEN_K: tl.constexpr):  # fmt: skip
    """[BK, BN] of B, zeros outside."""
    if GATHER != "":
        at = B + gathered(k[:, None], column[None, :], lb, image, height, width, CHANNELS, GATHER)
    elif B_T:
        at = B + column[None, :].to(tl.int64) * lb + k[:, None]
    else:
        at = B + k[:, None].to(tl.int64) * lb + column[None, :]
    mask = column_ok[None, :]
    if not EVEN_K:
        mask = mask & (k < K)[:, None]
    return tl.load(at, mask=mask, other=0.0)


@triton.jit
def _tile_a(A, m0, row, M, k0, K, la, image, height, width, CHANNELS: tl.constexpr, GATHER: tl.constexpr, A_T: tl.constexpr,
            TMA: tl.constexpr, EVEN_K: tl.constexpr, BK: tl.constexpr):  # fmt: skip
    """[BM, BK] of A by a tensor descriptor or by addresses."""
    if TMA:
        if A_T:
            a = A.load([k0, m0]).T
        else:
            a = A.load([m0, k0])
    else:
        a = _load_a(A, row, row < M, k0 + tl.arange(0, BK), K, la, image, height, width, CHANNELS, GATHER, A_T, EVEN_K)
    return a


@triton.jit
def _tile_b(B, n0, column, N, k0, K, lb, image, height, width, CHANNELS: tl.constexpr, GATHER: tl.constexpr,
            B_T: tl.constexpr, TMA: tl.constexpr, EVEN_K: tl.constexpr, BK: tl.constexpr):  # fmt: skip
    """[BK, BN] of B by a tensor descriptor or by addresses."""
    if TMA:
        if B_T:
            b = B.load([n0, k0]).T
        else:
            b = B.load([k0, n0])
    else:
        k = k0 + tl.arange(0, BK)
        b = _load_b(B, column, column < N, k, K, lb, image, height, width, CHANNELS, GATHER, B_T, EVEN_K)
    return b


@triton.jit
def product(
    tile, A, B, A_MORE, B_MORE, M, N, K, la, lb, image, height, width,
    CHANNELS: tl.constexpr, GATHER_A: tl.constexpr, GATHER_B: tl.constexpr, A_T: tl.constexpr, B_T: tl.constexpr,
    TMA: tl.constexpr, EVEN_K: tl.constexpr, PAIR: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    GROUP: tl.constexpr,
):  # fmt: skip
    """acc and other, float32 [BM, BN], of a tile; its rows [BM] and columns [BN]; its place in the grid of tiles.

    PAIR "": acc = A B. "gated": other = A B_MORE besides. "sum": acc = A B + A_MORE B_MORE.
    """
    tiles_m, tiles_n = tl.cdiv(M, BM), tl.cdiv(N, BN)
    group = tile // (GROUP * tiles_n)
    rows_here = tl.minimum(tiles_m - group * GROUP, GROUP)
    inside = tile % (GROUP * tiles_n)
    tile_m, tile_n = group * GROUP + inside % rows_here, inside // rows_here
    m0, n0 = tile_m * BM, tile_n * BN
    row, column = m0 + tl.arange(0, BM), n0 + tl.arange(0, BN)
    acc = tl.zeros((BM, BN), tl.float32)
    other = acc
    if PAIR == "gated":
        other = tl.zeros((BM, BN), tl.float32)
    for k0 in range(0, K, BK):
        a = _tile_a(A, m0, row, M, k0, K, la, image, height, width, CHANNELS, GATHER_A, A_T, TMA, EVEN_K, BK)
        b = _tile_b(B, n0, column, N, k0, K, lb, image, height, width, CHANNELS, GATHER_B, B_T, TMA, EVEN_K, BK)
        acc = tl.dot(a, b, acc, input_precision="ieee")
        if PAIR == "gated":
            b = _tile_b(
                B_MORE, n0, column, N, k0, K, lb, image, height, width, CHANNELS, GATHER_B, B_T, TMA, EVEN_K, BK
            )
            other = tl.dot(a, b, other, input_precision="ieee")
    if PAIR == "sum":
        for k0 in range(0, K, BK):
            a = _tile_a(A_MORE, m0, row, M, k0, K, la, image, height, width, CHANNELS, GATHER_A, A_T, TMA, EVEN_K, BK)
            b = _tile_b(
                B_MORE, n0, column, N, k0, K, lb, image, height, width, CHANNELS, GATHER_B, B_T, TMA, EVEN_K, BK
            )
            acc = tl.dot(a, b, acc, input_precision="ieee")
    return acc, other, row, column, tile_m, tile_n


@triton.jit
def column_factor(FACTOR, KIND: tl.constexpr, column, column_ok):
    """What multiplies a column: tanh of one number ("scalar") or of [N] ("vector"), or [N] as it is ("scale")."""
    if KIND == "scalar":
        factor = tanh(tl.load(FACTOR).to(tl.float32))
    else:
        factor = tl.load(FACTOR + column, mask=column_ok, other=0.0).to(tl.float32)
        if KIND == "vector":
            factor = tanh(factor)
    return factor


@triton.jit
def epilogue(
    acc, other, BIAS, BIAS_G, GATE, ROW_MASK, SCALE, RESIDUAL, row, column, M, N, r_stride,
    ACTIVATION: tl.constexpr, GATED: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_BIAS_G: tl.constexpr, GATE_KIND: tl.constexpr,
    HAS_MASK: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
):  # fmt: skip
    """residual + mask * tanh(gate) * scale * act(acc + bias), or act(other + bias_g) * (acc + bias) where GATED; float32."""
    row_ok, column_ok = row < M, column < N
    if HAS_BIAS:
        acc += tl.load(BIAS + column, mask=column_ok, other=0.0).to(tl.float32)[None, :]
    if GATED:
        if HAS_BIAS_G:
            other += tl.load(BIAS_G + column, mask=column_ok, other=0.0).to(tl.float32)[None, :]
        acc = activate(other, ACTIVATION) * acc
    else:
        acc = activate(acc, ACTIVATION)
    if HAS_SCALE:
        acc *= tl.load(SCALE + column, mask=column_ok, other=0.0).to(tl.float32)[None, :]
    if GATE_KIND == "scalar":
        acc *= column_factor(GATE, GATE_KIND, column, column_ok)
    elif GATE_KIND == "vector":
        acc *= column_factor(GATE, GATE_KIND, column, column_ok)[None, :]
    if HAS_MASK:
        keep = tl.load(ROW_MASK + row, mask=row_ok, other=0) != 0
        acc = tl.where(keep[:, None], acc, 0.0)
    if HAS_RESIDUAL:
        at = RESIDUAL + row[:, None].to(tl.int64) * r_stride + column[None, :]
        acc += tl.load(at, mask=row_ok[:, None] & column_ok[None, :], other=0.0).to(tl.float32)
    return acc


@triton.jit
def finish(
    acc, other, BIAS, BIAS_G, GATE, ROW_MASK, SCALE, RESIDUAL, OUT, row, column, M, N, r_stride, o_stride,
    ACTIVATION: tl.constexpr, GATED: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_BIAS_G: tl.constexpr, GATE_KIND: tl.constexpr,
    HAS_MASK: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
):  # fmt: skip
    """The epilogue of a tile at ``row`` and ``column``, written to OUT [M, N] with rows ``o_stride`` apart."""
    acc = epilogue(
        acc, other, BIAS, BIAS_G, GATE, ROW_MASK, SCALE, RESIDUAL, row, column, M, N, r_stride, ACTIVATION, GATED, HAS_BIAS,
        HAS_BIAS_G, GATE_KIND, HAS_MASK, HAS_SCALE, HAS_RESIDUAL,
    )  # fmt: skip
    at = OUT + row[:, None].to(tl.int64) * o_stride + column[None, :]
    tl.store(at, acc.to(OUT.dtype.element_ty), mask=(row < M)[:, None] & (column < N)[None, :])


@triton.jit
def _gemm_tile(
    tile, A, B, A_MORE, B_MORE, BIAS, BIAS_G, GATE, ROW_MASK, SCALE, RESIDUAL, OUT, M, N, k_units, la_units, lb_units,
    i_units, height, width, r_stride, o_stride,
    CHANNELS: tl.constexpr, GATHER_A: tl.constexpr, GATHER_B: tl.constexpr, SCATTER: tl.constexpr, A_T: tl.constexpr,
    B_T: tl.constexpr, TMA: tl.constexpr, EVEN_K: tl.constexpr, PAIR: tl.constexpr, K_UNIT: tl.constexpr,
    LA_UNIT: tl.constexpr, LB_UNIT: tl.constexpr, I_UNIT: tl.constexpr, ACTIVATION: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_BIAS_G: tl.constexpr, GATE_KIND: tl.constexpr, HAS_MASK: tl.constexpr, HAS_SCALE: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """One tile of C."""
    la, lb = tl.cast(la_units, tl.int64) * LA_UNIT, tl.cast(lb_units, tl.int64) * LB_UNIT
    image = tl.cast(i_units, tl.int64) * I_UNIT
    acc, other, row, column, _, _ = product(
        tile, A, B, A_MORE, B_MORE, M, N, k_units * K_UNIT, la, lb, image, height, width, CHANNELS, GATHER_A, GATHER_B, A_T,
        B_T, TMA, EVEN_K, PAIR, BM, BN, BK, GROUP,
    )  # fmt: skip
    if SCATTER == "":
        finish(
            acc, other, BIAS, BIAS_G, GATE, ROW_MASK, SCALE, RESIDUAL, OUT, row, column, M, N, r_stride, o_stride,
            ACTIVATION, PAIR == "gated", HAS_BIAS, HAS_BIAS_G, GATE_KIND, HAS_MASK, HAS_SCALE, HAS_RESIDUAL,
        )  # fmt: skip
    else:
        acc = epilogue(
            acc, other, BIAS, BIAS_G, GATE, ROW_MASK, SCALE, RESIDUAL, row, column, M, N, r_stride, ACTIVATION,
            PAIR == "gated", HAS_BIAS, HAS_BIAS_G, GATE_KIND, HAS_MASK, HAS_SCALE, HAS_RESIDUAL,
        )  # fmt: skip
        stride = tl.cast(o_stride, tl.int64)
        at = gathered(row[:, None], column[None, :], stride, image, height, width, CHANNELS, SCATTER)
        tl.store(OUT + at, acc.to(OUT.dtype.element_ty), mask=(row < M)[:, None] & (column < N)[None, :])


@triton.jit
def gemm_kernel(
    A, B, A_MORE, B_MORE, BIAS, BIAS_G, GATE, ROW_MASK, SCALE, RESIDUAL, OUT, M, N, k_units, la_units, lb_units, i_units,
    height, width, r_stride, o_stride,
    CHANNELS: tl.constexpr, GATHER_A: tl.constexpr, GATHER_B: tl.constexpr, SCATTER: tl.constexpr, A_T: tl.constexpr,
    B_T: tl.constexpr, TMA: tl.constexpr, EVEN_K: tl.constexpr, PAIR: tl.constexpr, K_UNIT: tl.constexpr,
    LA_UNIT: tl.constexpr, LB_UNIT: tl.constexpr, I_UNIT: tl.constexpr, ACTIVATION: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_BIAS_G: tl.constexpr, GATE_KIND: tl.constexpr, HAS_MASK: tl.constexpr, HAS_SCALE: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
    PERSISTENT: tl.constexpr,
):  # fmt: skip
    """OUT [M, N]: a tile a program, or (PERSISTENT) every num_programs-th."""
    if PERSISTENT:
        for tile in range(tl.program_id(0), tl.cdiv(M, BM) * tl.cdiv(N, BN), tl.num_programs(0)):
            _gemm_tile(
                tile, A, B, A_MORE, B_MORE, BIAS, BIAS_G, GATE, ROW_MASK, SCALE, RESIDUAL, OUT, M, N, k_units, la_units,
                lb_units, i_units, height, width, r_stride, o_stride, CHANNELS, GATHER_A, GATHER_B, SCATTER, A_T, B_T, TMA,
                EVEN_K, PAIR, K_UNIT, LA_UNIT, LB_UNIT, I_UNIT, ACTIVATION, HAS_BIAS, HAS_BIAS_G, GATE_KIND, HAS_MASK,
                HAS_SCALE, HAS_RESIDUAL, BM, BN, BK, GROUP,
            )  # fmt: skip
    else:
        _gemm_tile(
            tl.program_id(0), A, B, A_MORE, B_MORE, BIAS, BIAS_G, GATE, ROW_MASK, SCALE, RESIDUAL, OUT, M, N, k_units,
            la_units, lb_units, i_units, height, width, r_stride, o_stride, CHANNELS, GATHER_A, GATHER_B, SCATTER, A_T, B_T,
            TMA, EVEN_K, PAIR, K_UNIT, LA_UNIT, LB_UNIT, I_UNIT, ACTIVATION, HAS_BIAS, HAS_BIAS_G, GATE_KIND, HAS_MASK,
            HAS_SCALE, HAS_RESIDUAL, BM, BN, BK, GROUP,
        )  # fmt: skip


@triton.jit
def few_rows_kernel(
    A, B, B_MORE, BIAS, BIAS_G, GATE, ROW_MASK, SCALE, RESIDUAL, OUT, M, N, k_units, la_units, lb_units, r_stride, o_stride,
    ROWS: tl.constexpr, EVEN_K: tl.constexpr, PAIR: tl.constexpr, K_UNIT: tl.constexpr, LA_UNIT: tl.constexpr,
    LB_UNIT: tl.constexpr, ACTIVATION: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_BIAS_G: tl.constexpr,
    GATE_KIND: tl.constexpr, HAS_MASK: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_RESIDUAL: tl.constexpr, BN: tl.constexpr,
    BK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """OUT [M, N] for M <= ROWS of one to four (decoding): the weight is read once, no tensor cores are filled with zeros.

    Lanes keep their own sums until the end: one reduction for each output, not one for each step.
    """
    K, la, lb = k_units * K_UNIT, tl.cast(la_units, tl.int64) * LA_UNIT, tl.cast(lb_units, tl.int64) * LB_UNIT
    row, column = tl.arange(0, ROWS), tl.program_id(0) * BN + tl.arange(0, BN)
    acc = tl.zeros((ROWS, BN, BK), tl.float32)
    other = acc
    if PAIR == "gated":
        other = tl.zeros((ROWS, BN, BK), tl.float32)
    weight = column[:, None].to(tl.int64) * lb
    for k0 in tl.range(0, K, BK, num_stages=STAGES):
        k = k0 + tl.arange(0, BK)
        a = tl.load(A + row[:, None] * la + k[None, :], mask=(row < M)[:, None] & (k < K)[None, :], other=0.0)
        ok = (column < N)[:, None]
        if not EVEN_K:
            ok = ok & (k < K)[None, :]
        a = a.to(tl.float32)[:, None, :]
        acc += a * tl.load(B + weight + k[None, :], mask=ok, other=0.0).to(tl.float32)[None, :, :]
        if PAIR == "gated":
            other += a * tl.load(B_MORE + weight + k[None, :], mask=ok, other=0.0).to(tl.float32)[None, :, :]
    sums = tl.sum(acc, 2)
    gates = sums
    if PAIR == "gated":
        gates = tl.sum(other, 2)
    finish(
        sums, gates, BIAS, BIAS_G, GATE, ROW_MASK, SCALE, RESIDUAL, OUT, row, column, M, N, r_stride, o_stride, ACTIVATION,
        PAIR == "gated", HAS_BIAS, HAS_BIAS_G, GATE_KIND, HAS_MASK, HAS_SCALE, HAS_RESIDUAL,
    )  # fmt: skip
