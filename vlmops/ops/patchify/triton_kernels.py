"""Products whose one operand is read from pixels in place, and gradients that go back to where the pixels came from.

A patch vector has F frames of KF = C * AREA elements. STILL: all frames of a patch are one picture (it repeats itself), whose
pixels are loaded once for the weights of every frame.
"""

from __future__ import annotations

import triton
import triton.language as tl

from vlmops.ops._shared.triton_gemm import finish
from vlmops.ops.patchify.triton_pixels import (
    find_patches,
    frame_start,
    patch_tile,
    per_channel,
    pixel_offsets,
    weight_offsets,
)

__all__ = ["patchify_forward_kernel", "patchify_images_kernel", "patchify_weight_kernel", "sum_rows_kernel"]


@triton.jit
def _load_weight(
    W, column, column_ok, k, f, w_row, w_channel, w_frame, w_pixel, C: tl.constexpr, F: tl.constexpr, AREA: tl.constexpr,
    LAST: tl.constexpr, DENSE: tl.constexpr, EVEN_K: tl.constexpr, W_UNIT: tl.constexpr,
):  # fmt: skip
    """[BN, BK] of frame f of the weight, zeros outside."""
    offset = weight_offsets(k, f, w_channel, w_frame, w_pixel, C, F, AREA, LAST, DENSE)
    mask = column_ok[:, None]
    if not EVEN_K:
        mask = mask & (k < C * AREA)[None, :]
    return tl.load(W + column.to(tl.int64)[:, None] * w_row * W_UNIT + offset[None, :], mask=mask, other=0.0)


@triton.jit
def patchify_forward_kernel(
    IMAGES, TABLE, STATS, W, BIAS, POSITION, OUT, M, N, images, bits, per, cells, columns, length, s_image, s_frame,
    s_channel, s_line, s_pixel, w_row, w_channel, w_frame, w_pixel, each, p_stride,
    C: tl.constexpr, F: tl.constexpr, AREA: tl.constexpr, P: tl.constexpr, FORM: tl.constexpr, MERGE: tl.constexpr,
    LAST: tl.constexpr, LINE: tl.constexpr, STILL: tl.constexpr, NORMALISE: tl.constexpr, DENSE: tl.constexpr,
    UNIT: tl.constexpr, C_UNIT: tl.constexpr, W_UNIT: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_POSITION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """OUT [M, N] = patch vectors W^T + bias + position [each, N] of row % each."""
    tiles_m, tiles_n = tl.cdiv(M, BM), tl.cdiv(N, BN)
    group = tl.program_id(0) // (GROUP * tiles_n)
    inside = tl.program_id(0) % (GROUP * tiles_n)
    rows_here = tl.minimum(tiles_m - group * GROUP, GROUP)
    row = (group * GROUP + inside % rows_here) * BM + tl.arange(0, BM)
    column = inside // rows_here * BN + tl.arange(0, BN)
    base, frame_step, last, step_c, step_y, step_x = find_patches(
        row, M, TABLE, images, bits, per, cells, columns, length, s_image, s_frame, s_channel, s_line, s_pixel, C, F, P,
        FORM, MERGE, UNIT, C_UNIT,
    )  # fmt: skip
    KF: tl.constexpr = C * AREA
    EVEN_K: tl.constexpr = KF % BK == 0
    LOADS: tl.constexpr = 1 if STILL else F
    DTYPE: tl.constexpr = W.dtype.element_ty
    acc = tl.zeros((BM, BN), tl.float32)
    for i in range(0, tl.cdiv(KF, BK) * LOADS):
        k, f = i // LOADS * BK + tl.arange(0, BK), i % LOADS
        start = base
        if LOADS > 1:
            start = frame_start(base, frame_step, last, f)
        a = patch_tile(
            IMAGES, STATS, start, row < M, k, step_c, step_y, step_x, DTYPE, C, AREA, P, FORM, LAST, LINE, NORMALISE,
            EVEN_K,
        )  # fmt: skip
        if STILL:
            for g in tl.static_range(F):
                b = _load_weight(
                    W, column, column < N, k, g, w_row, w_channel, w_frame, w_pixel, C, F, AREA, LAST, DENSE, EVEN_K, W_UNIT
                )  # fmt: skip
                acc = tl.dot(a, b.T, acc, input_precision="ieee")
        else:
            b = _load_weight(
                W, column, column < N, k, f, w_row, w_channel, w_frame, w_pixel, C, F, AREA, LAST, DENSE, EVEN_K, W_UNIT
            )  # fmt: skip
            acc = tl.dot(a, b.T, acc, input_precision="ieee")
    if HAS_POSITION:
        at = POSITION + (row % each).to(tl.int64)[:, None] * p_stride + column[None, :]
        acc += tl.load(at, mask=(row < M)[:, None] & (column < N)[None, :], other=0.0).to(tl.float32)
    finish(
        acc, acc, BIAS, BIAS, BIAS, BIAS, BIAS, BIAS, OUT, row, column, M, N, 0, N, "", False, HAS_BIAS, False, "", False,
        False, False,
    )  # fmt: skip


@triton.jit
def patchify_images_kernel(
    GRAD, TABLE, STATS, W, OUT, M, E, g_units, images, bits, per, cells, columns, length, s_image, s_frame, s_channel,
    s_line, s_pixel, w_row, w_channel, w_frame, w_pixel,
    C: tl.constexpr, F: tl.constexpr, AREA: tl.constexpr, P: tl.constexpr, FORM: tl.constexpr, MERGE: tl.constexpr,
    LAST: tl.constexpr, LINE: tl.constexpr, STILL: tl.constexpr, SCALED: tl.constexpr,
    DENSE: tl.constexpr, UNIT: tl.constexpr, C_UNIT: tl.constexpr, W_UNIT: tl.constexpr, G_UNIT: tl.constexpr,
    BM: tl.constexpr, BK: tl.constexpr, BE: tl.constexpr,
):  # fmt: skip
    """OUT, laid out as the images: GRAD W, each pixel written by the one patch it lies in.

    A program has the same pixels of every frame, so that frames which are one picture are added up in it.
    """
    KF: tl.constexpr = C * AREA
    EVEN_K: tl.constexpr = KF % BK == 0
    tiles_k: tl.constexpr = (KF + BK - 1) // BK
    row = tl.program_id(0) // tiles_k * BM + tl.arange(0, BM)
    k = tl.program_id(0) % tiles_k * BK + tl.arange(0, BK)
    base, frame_step, last, step_c, step_y, step_x = find_patches(
        row, M, TABLE, images, bits, per, cells, columns, length, s_image, s_frame, s_channel, s_line, s_pixel, C, F, P,
        FORM, MERGE, UNIT, C_UNIT,
    )  # fmt: skip
    mask = (row < M)[:, None] & (k < KF)[None, :]
    scale = tl.full((BK,), 1.0, tl.float32)
    if SCALED:
        scale = per_channel(STATS + C, k, C, AREA, LAST)
    grads = GRAD + row.to(tl.int64)[:, None] * g_units * G_UNIT
    SUMS: tl.constexpr = 1 if STILL else F
    TERMS: tl.constexpr = F // SUMS
    acc = tl.zeros((BM, BK), tl.float32)
    for f in range(0, SUMS):
        for i in range(0, tl.cdiv(E, BE) * TERMS):
            e = i // TERMS * BE + tl.arange(0, BE)
            dy = tl.load(grads + e[None, :], mask=(row < M)[:, None] & (e < E)[None, :], other=0.0)
            w = _load_weight(
                W, e, e < E, k, f + i % TERMS, w_row, w_channel, w_frame, w_pixel, C, F, AREA, LAST, DENSE, EVEN_K, W_UNIT
            )  # fmt: skip
            acc = tl.dot(dy, w, acc, input_precision="ieee")
        dx = (acc * scale[None, :]).to(OUT.dtype.element_ty)
        whole = (f < last) | (f == SUMS - 1)
        at = OUT + frame_start(base, frame_step, last, f)[:, None]
        at += pixel_offsets(k, step_c, step_y, step_x, C, AREA, P, FORM, LAST, LINE)
        tl.store(at, dx, mask=mask & whole[:, None])
        acc = tl.where((f < last)[:, None], 0.0, acc)


@triton.jit
def patchify_weight_kernel(
    GRAD, IMAGES, TABLE, STATS, OUT, M, E, chunk, g_units, images, bits, per, cells, columns, length, s_image, s_frame,
    s_channel, s_line, s_pixel,
    C: tl.constexpr, F: tl.constexpr, AREA: tl.constexpr, P: tl.constexpr, FORM: tl.constexpr, MERGE: tl.constexpr,
    LAST: tl.constexpr, LINE: tl.constexpr, STILL: tl.constexpr, NORMALISE: tl.constexpr, UNIT: tl.constexpr,
    C_UNIT: tl.constexpr, G_UNIT: tl.constexpr, BE: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """OUT [parts, E, K]: GRAD^T times the patch vectors, gathered again, of each part of ``chunk`` tokens."""
    KF: tl.constexpr = C * AREA
    EVEN_K: tl.constexpr = KF % BK == 0
    LOADS: tl.constexpr = 1 if STILL else F
    tiles_k: tl.constexpr = (KF + BK - 1) // BK
    tile = tl.program_id(0) // LOADS
    f = tl.program_id(0) % LOADS
    e = tile // tiles_k * BE + tl.arange(0, BE)
    k = tile % tiles_k * BK + tl.arange(0, BK)
    acc = tl.zeros((BE, BK), tl.float32)
    end = tl.minimum(M, (tl.program_id(1) + 1) * chunk)
    for r0 in range(tl.program_id(1) * chunk, end, BR):
        row = r0 + tl.arange(0, BR)
        base, frame_step, last, step_c, step_y, step_x = find_patches(
            row, M, TABLE, images, bits, per, cells, columns, length, s_image, s_frame, s_channel, s_line, s_pixel, C, F, P,
            FORM, MERGE, UNIT, C_UNIT,
        )  # fmt: skip
        start = base
        if LOADS > 1:
            start = frame_start(base, frame_step, last, f)
        at = GRAD + row.to(tl.int64)[:, None] * g_units * G_UNIT + e[None, :]
        dy = tl.load(at, mask=(row < end)[:, None] & (e < E)[None, :], other=0.0)
        a = patch_tile(
            IMAGES, STATS, start, row < end, k, step_c, step_y, step_x, dy.dtype, C, AREA, P, FORM, LAST, LINE, NORMALISE,
            EVEN_K,
        )  # fmt: skip
        acc = tl.dot(dy.T, a, acc, input_precision="ieee")
    lines = OUT + (tl.program_id(1).to(tl.int64) * E + e)[:, None] * (KF * F)
    mask = (e < E)[:, None] & (k < KF)[None, :]
    for g in tl.static_range(F // LOADS):
        place = weight_offsets(k, f + g, 0, 0, 0, C, F, AREA, LAST, True)
        tl.store(lines + place[None, :], acc.to(OUT.dtype.element_ty), mask=mask)


@triton.jit
def sum_rows_kernel(X, OUT, rows, width, stride, chunk, BR: tl.constexpr, BC: tl.constexpr):
    """OUT [parts, width]: X [rows, width] summed over each part of ``chunk`` rows, always in the same order."""
    column = tl.program_id(0).to(tl.int64) * BC + tl.arange(0, BC)
    end = tl.minimum(rows, (tl.program_id(1) + 1) * chunk)
    total = tl.zeros((BC,), tl.float32)
    for r0 in range(tl.program_id(1) * chunk, end, BR):
        row = r0 + tl.arange(0, BR)
        at = X + row.to(tl.int64)[:, None] * stride + column[None, :]
        mask = (row < end)[:, None] & (column < width)[None, :]
        total += tl.sum(tl.load(at, mask=mask, other=0.0).to(tl.float32), 0)
    at = OUT + tl.program_id(1).to(tl.int64) * width + column
    tl.store(at, total.to(OUT.dtype.element_ty), mask=column < width)
