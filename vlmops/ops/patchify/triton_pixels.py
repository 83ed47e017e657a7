"""Where the pixels of a patch vector lie, on the device: every kernel of patchify addresses images through this file.

An address is the sum of a patch's first pixel, a frame's step and an offset of k, an index into one frame of the patch vector.
FORM says what the images are: "rows" (patch vectors already), "stack" ([n, T, C, H, W] with any strides), or a flat buffer of
mixed sizes whose images lie (T, C, H, W) "planar", (T, H, W, C) "interleaved", or some each way, "mixed". A buffer has a TABLE
[n, 6]: first token, first pixel / P^2, T, grid height, grid width, interleaved. Strides come in units, so that the compiler knows
what divides them and joins neighbouring pixels to one load.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["channel", "find_patches", "frame_start", "patch_tile", "per_channel", "pixel_offsets", "weight_offsets"]


@triton.jit
def _image_of(row, TABLE, images, bits):
    """The last image whose first token is not behind the row (images without tokens are passed over)."""
    image = tl.zeros_like(row)
    for i in range(0, bits):
        later = image + (1 << (bits - 1 - i))
        start = tl.load(TABLE + later * 6, mask=later < images, other=0)
        image = tl.where((later < images) & (start <= row), later, image)
    return image


@triton.jit
def find_patches(
    row, M, TABLE, images, bits, per, cells, columns, length, s_image, s_frame, s_channel, s_line, s_pixel,
    C: tl.constexpr, F: tl.constexpr, P: tl.constexpr, FORM: tl.constexpr, MERGE: tl.constexpr, UNIT: tl.constexpr,
    C_UNIT: tl.constexpr,
):  # fmt: skip
    """Of each token: int64 first pixel, its step to the next frame, last frame it has, steps of channel, line and pixel."""
    row = tl.minimum(row, M - 1)
    last = tl.zeros_like(row)
    frame_step = tl.cast(s_frame, tl.int64) * UNIT
    step_c, step_y, step_x = tl.cast(s_channel, tl.int64) * C_UNIT, tl.cast(s_line, tl.int64) * UNIT, s_pixel
    if FORM == "rows":
        base = row.to(tl.int64) * s_image * UNIT
    else:
        if FORM == "stack":
            image = row // per
            inside = row % per
        else:
            entry = TABLE + _image_of(row, TABLE, images, bits) * 6
            inside = row - tl.load(entry)
            first = tl.load(entry + 1).to(tl.int64) * (P * P)
            length = tl.load(entry + 2)
            columns = tl.load(entry + 4)
            cells = tl.load(entry + 3) * columns
            plane, line = cells * (P * P), columns * P
            frame_step = plane.to(tl.int64) * C
            if FORM == "planar":
                step_c, step_y, step_x = plane, line, tl.full(line.shape, 1, line.dtype)
            else:
                step_c, step_y, step_x = (
                    tl.full(line.shape, 1, line.dtype),
                    line * C,
                    tl.full(line.shape, C, line.dtype),
                )
                if FORM == "mixed":
                    turned = tl.load(entry + 5) != 0
                    step_c, step_y = tl.where(turned, step_c, plane), tl.where(turned, step_y, line)
                    step_x = tl.where(turned, C, 1)
        t, cell = inside // cells, inside % cells
        if MERGE:  # 2x2 blocks, one after the other
            block, half = cell // 4, columns // 2
            y = block // half * 2 + cell % 4 // 2
            x = block % half * 2 + cell % 2
        else:
            y, x = cell // columns, cell % columns
        last = (length - 1 - t * F).to(tl.int32)
        base = (t * F).to(tl.int64) * frame_step
        if FORM == "stack":
            base += image.to(tl.int64) * s_image * UNIT
        else:
            base += first
        base += (y * P).to(tl.int64) * step_y + (x * P).to(tl.int64) * step_x
    return base, frame_step, last, step_c, step_y, step_x


@triton.jit
def frame_start(base, frame_step, last, f):
    """First pixel of frame f of each patch; what comes after the last frame is that frame again."""
    return base + tl.minimum(last, f).to(tl.int64) * frame_step


@triton.jit
def channel(k, C: tl.constexpr, AREA: tl.constexpr, LAST: tl.constexpr):
    """Channel of element k of one frame of a patch vector."""
    if LAST:
        return k % C
    else:
        return k // AREA


@triton.jit
def per_channel(VALUES, k, C: tl.constexpr, AREA: tl.constexpr, LAST: tl.constexpr):
    """float32 VALUES [C] at the channel of each k < C * AREA; anything finite past that."""
    c = channel(k, C, AREA, LAST)
    if C <= 4:  # selected in registers: the loads do not depend on k
        value = tl.load(VALUES) + tl.zeros(c.shape, tl.float32)
        for i in tl.static_range(1, C):
            value = tl.where(c == i, tl.load(VALUES + i), value)
        return value
    else:
        return tl.load(VALUES + c, mask=k < C * AREA, other=0.0)


@triton.jit
def pixel_offsets(
    k, step_c, step_y, step_x, C: tl.constexpr, AREA: tl.constexpr, P: tl.constexpr, FORM: tl.constexpr, LAST: tl.constexpr,
    LINE: tl.constexpr,
):  # fmt: skip
    """[1, BK], or [rows, BK] of a buffer, whose images have their own steps.

    LINE: a line of the patch is one run in memory and in the patch vector, channels and all.
    """
    if FORM == "rows":
        return (k.to(tl.int64) * step_x)[None, :]
    else:
        c = channel(k, C, AREA, LAST)[None, :]
        within = k // C if LAST else k % AREA
        y, x = (within // P)[None, :], (within % P)[None, :]
        if LINE:  # the same, in the words the compiler's alignment analysis follows
            y = (k // (P * C))[None, :]
        if FORM == "stack":  # divided before it is widened
            c, y, x = c.to(tl.int64), y.to(tl.int64), x.to(tl.int64)
        if FORM != "stack":
            step_c, step_y, step_x = step_c[:, None], step_y[:, None], step_x[:, None]
        if LINE:
            return y * step_y + (k % (P * C))[None, :]
        elif FORM == "planar":
            return c * step_c + y * step_y + x
        else:
            return c * step_c + y * step_y + x * step_x


@triton.jit
def weight_offsets(
    k, f, w_channel, w_frame, w_pixel, C: tl.constexpr, F: tl.constexpr, AREA: tl.constexpr, LAST: tl.constexpr,
    DENSE: tl.constexpr,
):  # fmt: skip
    """Place of element k of frame f in a weight row; DENSE: one that lies as the patch vector runs."""
    if DENSE:
        if F == 1:
            return k
        elif LAST:
            return f * (C * AREA) + k
        else:
            return k // AREA * (F * AREA) + f * AREA + k % AREA
    else:
        within = k // C if LAST else k % AREA
        c = channel(k, C, AREA, LAST).to(tl.int64)
        return c * w_channel + tl.cast(f, tl.int64) * w_frame + within.to(tl.int64) * w_pixel


@triton.jit
def patch_tile(
    IMAGES, STATS, start, row_ok, k, step_c, step_y, step_x, DTYPE: tl.constexpr, C: tl.constexpr, AREA: tl.constexpr,
    P: tl.constexpr, FORM: tl.constexpr, LAST: tl.constexpr, LINE: tl.constexpr, NORMALISE: tl.constexpr,
    EVEN_K: tl.constexpr,
):  # fmt: skip
    """[rows, BK] of patch vectors in DTYPE, zeros outside: (pixel - shift) * scale in float32, rounded once."""
    mask = row_ok[:, None]
    if not EVEN_K:
        mask = mask & (k < C * AREA)[None, :]
    at = IMAGES + start[:, None] + pixel_offsets(k, step_c, step_y, step_x, C, AREA, P, FORM, LAST, LINE)
    x = tl.load(at, mask=mask, other=0)
    if NORMALISE:
        shift = per_channel(STATS, k, C, AREA, LAST)
        x = (x.to(tl.float32) - shift[None, :]) * per_channel(STATS + C, k, C, AREA, LAST)[None, :]
    return x.to(DTYPE)
