"""Products with a weight in few bits: tensor cores for many rows, a stream past sums for few, e4m3 rounding of rows.

The weight is the left operand of every product, [BN, BK] times x^T [BK, BM]: it comes out of registers, where its codes were just
turned into numbers, and few rows of x fill a narrow tile instead of padding a tall one.
"""

from __future__ import annotations

import triton
import triton.language as tl

from vlmops.ops._shared.triton_float8 import decode, finite_max, power_of_two_scale, round_e4m3
from vlmops.ops._shared.triton_gemm import finish

__all__ = ["quantize_rows_kernel", "quantized_gemm_kernel", "quantized_gemv_kernel"]


@triton.jit
def _numbers(bits, KIND: tl.constexpr, NATIVE: tl.constexpr):
    """float32 of codes (a half of an int4 byte already taken out)."""
    if KIND == "fp8" and not NATIVE:
        x = decode(bits).to(tl.float32)
    else:
        x = bits.to(tl.float32)
    return x


@triton.jit
def _scales(P, column, column_ok, k, N, GROUP: tl.constexpr, WIDTH: tl.constexpr):
    """P [groups, N] for rows ``column`` and columns k [WIDTH]; [BN, 1] where those all lie in one group."""
    if GROUP == 0:
        at = column[:, None]
    elif GROUP >= WIDTH:
        at = (tl.min(k, 0) // GROUP).to(tl.int64) * N + column[:, None]
    else:
        at = (k // GROUP).to(tl.int64)[None, :] * N + column[:, None]
    return tl.load(P + at, mask=column_ok[:, None], other=0.0)


@triton.jit
def _tile(bits, SCALE, ZERO, column, column_ok, k, N, KIND: tl.constexpr, GROUP: tl.constexpr, HAS_ZERO: tl.constexpr,
          NATIVE: tl.constexpr, WIDTH: tl.constexpr, dtype: tl.constexpr):  # fmt: skip
    """[BN, WIDTH] of the weight, without the scale where one holds for the whole row."""
    w = _numbers(bits, KIND, NATIVE)
    if HAS_ZERO:
        w -= _scales(ZERO, column, column_ok, k, N, GROUP, WIDTH).to(tl.float32)
    elif KIND == "int4":
        w -= 8.0
    if GROUP > 0:
        w *= _scales(SCALE, column, column_ok, k, N, GROUP, WIDTH)
    return w.to(dtype)


@triton.jit
def _rows_of_a(A, row, row_ok, k, K, la, EVEN_K: tl.constexpr):
    """[BM, BK] of A, zeros outside."""
    at = A + row[:, None].to(tl.int64) * la + k[None, :]
    if EVEN_K:
        tile = tl.load(at, mask=row_ok[:, None], other=0.0)
    else:
        tile = tl.load(at, mask=row_ok[:, None] & (k < K)[None, :], other=0.0)
    return tile


@triton.jit
def quantized_gemm_kernel(
    A, A_SCALE, DATA, SCALE, ZERO, BIAS, GATE, ROW_MASK, RESIDUAL, OUT, M, N, K, row_blocks, la_units, r_stride,
    KIND: tl.constexpr, GROUP: tl.constexpr, HAS_ZERO: tl.constexpr, NATIVE: tl.constexpr, A_SCALED: tl.constexpr,
    LA_UNIT: tl.constexpr, EVEN_K: tl.constexpr, ACTIVATION: tl.constexpr, HAS_BIAS: tl.constexpr, GATE_KIND: tl.constexpr,
    HAS_MASK: tl.constexpr, HAS_RESIDUAL: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    GROUP_M: tl.constexpr,
):  # fmt: skip
    """OUT [M, N], a tile a program. ``row_blocks``: blocks of 128 columns in a stored row of the weight.

    BK is 64 columns a dot; an int4 step takes two, one for each half of its bytes.
    """
    la = la_units * LA_UNIT
    tiles_m, tiles_n = tl.cdiv(M, BM), tl.cdiv(N, BN)
    tile = tl.program_id(0)
    group = tile // (GROUP_M * tiles_n)
    rows_here = tl.minimum(tiles_m - group * GROUP_M, GROUP_M)
    inside = tile % (GROUP_M * tiles_n)
    row = (group * GROUP_M + inside % rows_here) * BM + tl.arange(0, BM)
    column = inside // rows_here * BN + tl.arange(0, BN)
    row_ok, column_ok = row < M, column < N
    acc = tl.zeros((BN, BM), tl.float32)
    byte = tl.arange(0, BK)
    if KIND == "int4":
        at = DATA + column[:, None].to(tl.int64) * (row_blocks * 64) + byte[None, :]
        for block in range(0, row_blocks):
            bits = tl.load(at + block * 64, mask=column_ok[:, None], other=0)
            k = block * 128 + byte
            a = _rows_of_a(A, row, row_ok, k, K, la, EVEN_K)
            w = _tile(bits & 15, SCALE, ZERO, column, column_ok, k, N, KIND, GROUP, HAS_ZERO, NATIVE, BK, a.dtype)
            acc = tl.dot(w, tl.trans(a), acc, input_precision="ieee")
            k += 64
            a = _rows_of_a(A, row, row_ok, k, K, la, EVEN_K)
            w = _tile(bits >> 4, SCALE, ZERO, column, column_ok, k, N, KIND, GROUP, HAS_ZERO, NATIVE, BK, a.dtype)
            acc = tl.dot(w, tl.trans(a), acc, input_precision="ieee")
    else:
        at = DATA + column[:, None].to(tl.int64) * (row_blocks * 128) + byte[None, :]
        for k0 in range(0, row_blocks * 128, BK):
            bits = tl.load(at + k0, mask=column_ok[:, None], other=0.0 if NATIVE else 0)
            k = k0 + byte
            a = _rows_of_a(A, row, row_ok, k, K, la, EVEN_K)
            if A.dtype.element_ty == tl.float8e4nv:
                # Hopper adds fp8 products in fewer bits than float32: each step's sum goes to full ones.
                acc = tl.dot(bits, tl.trans(a), acc, max_num_imprecise_acc=BK)
            else:
                w = _tile(bits, SCALE, ZERO, column, column_ok, k, N, KIND, GROUP, HAS_ZERO, NATIVE, BK, a.dtype)
                acc = tl.dot(w, tl.trans(a), acc, input_precision="ieee")
    if GROUP == 0:
        acc *= tl.load(SCALE + column, mask=column_ok, other=0.0)[:, None]
    if A_SCALED:
        acc *= tl.load(A_SCALE + row, mask=row_ok, other=0.0)[None, :]
    acc = tl.trans(acc)
    finish(
        acc, acc, BIAS, BIAS, GATE, ROW_MASK, SCALE, RESIDUAL, OUT, row, column, M, N, r_stride, N, ACTIVATION, False, HAS_BIAS,
        False, GATE_KIND, HAS_MASK, False, HAS_RESIDUAL,
    )  # fmt: skip


@triton.jit
def _streamed(acc, bits, A, SCALE, ZERO, row, row_ok, column, column_ok, k, first, K, N, la, KIND: tl.constexpr,
              GROUP: tl.constexpr, RUN: tl.constexpr, HAS_ZERO: tl.constexpr, NATIVE: tl.constexpr, ROWS: tl.constexpr,
              BN: tl.constexpr, BK: tl.constexpr):  # fmt: skip
    """acc [ROWS, BN, BK / 16] plus the sums of 16 products each.

    Args:
        k: [BK] columns of the weight.
        first: [BK / RUN] a column of each run of RUN bytes that shares a scale.
    """
    w = _numbers(bits, KIND, NATIVE)
    at, inside = column[:, None], column_ok[:, None]
    if GROUP > 0:
        at = (first // GROUP).to(tl.int64)[None, :] * N + column[:, None]
        inside = column_ok[:, None] & (first < K)[None, :]
    if HAS_ZERO:
        zero = tl.load(ZERO + at, mask=inside, other=0).to(tl.float32)
        w = tl.reshape(w, (BN, BK // RUN, RUN)) - zero[:, :, None]
    elif KIND == "int4":
        w -= 8.0
    w = tl.reshape(w, (BN, BK // 16, 16))
    a = tl.load(A + row[:, None] * la + k[None, :], mask=row_ok[:, None] & (k < K)[None, :], other=0.0)
    a = tl.reshape(a.to(tl.float32), (ROWS, BK // 16, 16))
    part = tl.sum(a[:, None, :, :] * w[None, :, :, :], 3)
    if GROUP > 0:
        scale = tl.load(SCALE + at, mask=inside, other=0.0)
        part = tl.reshape(part, (ROWS, BN, BK // RUN, RUN // 16)) * scale[None, :, :, None]
        part = tl.reshape(part, (ROWS, BN, BK // 16))
    return acc + part


@triton.jit
def quantized_gemv_kernel(
    A, A_SCALE, DATA, SCALE, ZERO, BIAS, GATE, ROW_MASK, RESIDUAL, OUT, M, N, K, row_blocks, la_units, r_stride,
    KIND: tl.constexpr, GROUP: tl.constexpr, HAS_ZERO: tl.constexpr, NATIVE: tl.constexpr, A_SCALED: tl.constexpr,
    LA_UNIT: tl.constexpr, ACTIVATION: tl.constexpr, HAS_BIAS: tl.constexpr, GATE_KIND: tl.constexpr, HAS_MASK: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr, ROWS: tl.constexpr, RUN: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """OUT [M, N] for M <= ROWS of one to four (decoding): every byte of the weight is read once, 16 by a thread at a time.

    BK is in bytes, RUN of which share a scale. A thread adds up the 16 products of its load; lanes are added across once, after
    the loop.
    """
    la = la_units * LA_UNIT
    row, column = tl.arange(0, ROWS), tl.program_id(0) * BN + tl.arange(0, BN)
    row_ok, column_ok = row < M, column < N
    byte, run = tl.arange(0, BK), tl.arange(0, BK // RUN) * RUN
    row_bytes = row_blocks * (64 if KIND == "int4" else 128)
    base = DATA + column[:, None].to(tl.int64) * row_bytes
    acc = tl.zeros((ROWS, BN, BK // 16), tl.float32)
    for b0 in range(0, row_bytes, BK):
        at, piece = b0 + byte, b0 + run
        mask = column_ok[:, None] & (at < row_bytes)[None, :]
        bits = tl.load(base + at[None, :], mask=mask, other=0.0 if NATIVE else 0)
        if KIND == "int4":
            k, first = at // 64 * 128 + at % 64, piece // 64 * 128 + piece % 64
            acc = _streamed(acc, bits & 15, A, SCALE, ZERO, row, row_ok, column, column_ok, k, first, K, N, la, KIND, GROUP, RUN,
                            HAS_ZERO, NATIVE, ROWS, BN, BK)  # fmt: skip
            if GROUP < 128:  # else both halves of a block lie in one group
                first += 64
            acc = _streamed(acc, bits >> 4, A, SCALE, ZERO, row, row_ok, column, column_ok, k + 64, first, K, N, la, KIND,
                            GROUP, RUN, HAS_ZERO, NATIVE, ROWS, BN, BK)  # fmt: skip
        else:
            acc = _streamed(acc, bits, A, SCALE, ZERO, row, row_ok, column, column_ok, at, piece, K, N, la, KIND, GROUP, RUN,
                            HAS_ZERO, NATIVE, ROWS, BN, BK)  # fmt: skip
    total = tl.sum(acc, 2)  # [ROWS, BN]
    if GROUP == 0:
        total *= tl.load(SCALE + column, mask=column_ok, other=0.0)[None, :]
    if A_SCALED:
        total *= tl.load(A_SCALE + row, mask=row_ok, other=0.0)[:, None]
    finish(
        total, total, BIAS, BIAS, GATE, ROW_MASK, SCALE, RESIDUAL, OUT, row, column, M, N, r_stride, N, ACTIVATION, False,
        HAS_BIAS, False, GATE_KIND, HAS_MASK, False, HAS_RESIDUAL,
    )  # fmt: skip


@triton.jit
def quantize_rows_kernel(X, OUT, SCALE, K, stride, NATIVE: tl.constexpr, WHOLE: tl.constexpr, BLOCK: tl.constexpr):
    """OUT [M, K] e4m3 (or its numbers in float16) and SCALE [M], a power of two a row; WHOLE: a row is one block."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    if WHOLE:
        x = tl.load(X + row * stride + column, mask=column < K, other=0.0).to(tl.float32)
        scale, inverse = power_of_two_scale(finite_max(x, 0))
        tl.store(OUT + row * K + column, round_e4m3(x * inverse, NATIVE), mask=column < K)
    else:
        largest = tl.zeros((BLOCK,), tl.float32)
        for k0 in range(0, K, BLOCK):
            x = tl.load(X + row * stride + k0 + column, mask=k0 + column < K, other=0.0).to(tl.float32)
            size = tl.abs(x)
            largest = tl.maximum(largest, tl.where(size < float("inf"), size, 0.0))
        scale, inverse = power_of_two_scale(tl.max(largest, 0))
        for k0 in range(0, K, BLOCK):
            x = tl.load(X + row * stride + k0 + column, mask=k0 + column < K, other=0.0).to(tl.float32)
            tl.store(OUT + row * K + k0 + column, round_e4m3(x * inverse, NATIVE), mask=k0 + column < K)
    tl.store(SCALE + row, scale)
