"""Number the image tokens, then copy rows: two kernels, no host read of how many there are."""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["number_kernel", "select_rows_kernel"]


@triton.jit
def number_kernel(IDS, TAKEN, PLACES, tokens, features, image_token, BLOCK: tl.constexpr):
    """TAKEN [T]: the feature row each token takes, -1 for none; PLACES [N]: the token of each feature row, -1 for none.

    One program runs over all ids: they are few bytes beside the rows, and a scan across programs would need three passes.
    """
    seen = tl.program_id(0)
    for t0 in range(0, tokens, BLOCK):
        t = t0 + tl.arange(0, BLOCK)
        here = (tl.load(IDS + t, mask=t < tokens, other=image_token - 1) == image_token) & (t < tokens)
        number = seen + tl.cumsum(here.to(tl.int32), 0) - 1
        takes = here & (number < features)
        tl.store(TAKEN + t, tl.where(takes, number, -1), mask=t < tokens)
        tl.store(PLACES + number, t, mask=takes)
        seen += tl.sum(here.to(tl.int32), 0)
    for n0 in range(tl.minimum(seen, features), features, BLOCK):
        n = n0 + tl.arange(0, BLOCK)
        tl.store(PLACES + n, tl.full((BLOCK,), -1, tl.int32), mask=n < features)


@triton.jit
def select_rows_kernel(
    PICK, A, B, OUT, rows, width, a_stride, b_stride, HAS_A: tl.constexpr, HAS_B: tl.constexpr, BR: tl.constexpr,
    BC: tl.constexpr,
):  # fmt: skip
    """OUT [rows, C]: row PICK[r] of A where that is not negative, else row r of B; without A or B zeros in their place."""
    row = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    pick = tl.load(PICK + row, mask=row < rows, other=-1).to(tl.int64)
    from_a = (pick >= 0) & (row < rows)
    from_b = (pick < 0) & (row < rows)
    for c0 in range(0, width, BC):
        column = c0 + tl.arange(0, BC)
        inside = (column < width)[None, :]
        value = tl.zeros((BR, BC), OUT.dtype.element_ty)
        if HAS_B:
            value = tl.load(B + row[:, None] * b_stride + column[None, :], mask=from_b[:, None] & inside, other=0.0)
        if HAS_A:
            a = tl.load(A + pick[:, None] * a_stride + column[None, :], mask=from_a[:, None] & inside, other=0.0)
            value = tl.where(from_a[:, None], a, value)
        tl.store(OUT + row[:, None] * width + column[None, :], value, mask=(row < rows)[:, None] & inside)
