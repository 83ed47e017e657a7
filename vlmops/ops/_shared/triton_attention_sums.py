"""The kernel that comes before every attention's backward: one number a row."""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["delta_kernel"]


@triton.jit
def delta_kernel(
    OUT, DO, DLSE, DELTA, total, out_stride, out_head, do_stride, do_head, dlse_head,
    D: tl.constexpr, WIDTH: tl.constexpr, HAS_DLSE: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """DELTA [H, T] = rowsum(grad_out * out) - grad_lse: what every score's gradient subtracts."""
    rows = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    head = tl.program_id(1)
    columns = tl.arange(0, WIDTH)
    mask = (rows < total)[:, None] & (columns < D)[None, :]
    o = tl.load(OUT + rows[:, None] * out_stride + head * out_head + columns[None, :], mask=mask, other=0.0)
    g = tl.load(DO + rows[:, None] * do_stride + head * do_head + columns[None, :], mask=mask, other=0.0)
    delta = tl.sum(o.to(tl.float32) * g.to(tl.float32), 1)
    if HAS_DLSE:
        delta -= tl.load(DLSE + head.to(tl.int64) * dlse_head + rows, mask=rows < total, other=0.0)
    tl.store(DELTA + head.to(tl.int64) * total + rows, delta, mask=rows < total)
