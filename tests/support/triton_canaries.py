"""Small kernels that show what Triton's interpreter gets wrong. Run as a program it prints upstream's answers."""

from __future__ import annotations

import json
import os
import sys

os.environ["TRITON_INTERPRET"] = "1"

import torch
import triton
import triton.language as tl


@triton.jit
def add(X, Y, OUT, n, B: tl.constexpr):
    i = tl.program_id(0) * B + tl.arange(0, B)
    tl.store(OUT + i, tl.load(X + i, mask=i < n) + tl.load(Y + i, mask=i < n), mask=i < n)


@triton.jit
def narrow(X, OUT, B: tl.constexpr):
    i = tl.arange(0, B)
    tl.store(OUT + i, tl.load(X + i).to(OUT.dtype.element_ty))


@triton.jit
def row_sum(X, OUT, B: tl.constexpr):
    tl.store(OUT, tl.sum(tl.load(X + tl.arange(0, B)), 0))


@triton.jit
def product(X, Y, OUT, B: tl.constexpr):
    i = tl.arange(0, B)
    at = i[:, None] * B + i[None, :]
    tl.store(OUT + at, tl.dot(tl.load(X + at), tl.load(Y + at)))


@triton.jit
def read_past_the_end(X, OUT, B: tl.constexpr):
    tl.store(OUT + tl.arange(0, B), tl.load(X + 1 + tl.arange(0, B)))


@triton.jit
def same_address(OUT, STEP: tl.constexpr):
    tl.store(OUT + tl.program_id(0) * STEP, 1.0)


@triton.jit
def count_before(OUT, n, B: tl.constexpr):
    """Each program writes how many ran before it: what no kernel may do."""
    me = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
    i = tl.arange(0, B)
    before = tl.sum(tl.load(OUT + i, mask=i < n, other=0.0), 0)
    ran = (tl.sqrt(8.0 * before + 1.0) - 1.0) / 2.0
    tl.store(OUT + me, ran + 1.0)


@triton.jit
def add_atomically(OUT):
    tl.atomic_add(OUT, 1.0)


def answers() -> dict[str, bool]:
    """Which of the known faults show, on this process's interpreter."""
    torch.manual_seed(0)
    x, y = (torch.randn(64) for _ in range(2))
    bx, by = x.bfloat16(), y.bfloat16()
    out = torch.empty(64, dtype=torch.bfloat16)
    add[(1,)](bx, by, out, 64, 64)
    faults = {"bfloat16 sum": not torch.equal(out, bx + by)}
    narrow[(1,)](x, out, 64)
    faults["float32 to bfloat16"] = not torch.equal(out, x.bfloat16())
    narrow[(1,)](x, eighth := torch.empty(64, dtype=torch.float8_e4m3fn), 64)
    faults["float32 to e4m3"] = not torch.equal(eighth.view(torch.uint8), x.to(torch.float8_e4m3fn).view(torch.uint8))
    one = torch.empty(1, dtype=torch.bfloat16)
    row_sum[(1,)](bx, one, 64)
    faults["bfloat16 reduction"] = abs(float(one) - float(bx.double().sum())) > 0.1
    square = torch.empty(16, 16)
    a, b = (torch.randn(16, 16).bfloat16() for _ in range(2))
    product[(1,)](a, b, square, 16)
    faults["bfloat16 product"] = not torch.allclose(square, a.float() @ b.float(), atol=1e-3)
    try:
        read_past_the_end[(1,)](torch.zeros(64), torch.zeros(64), 64)
        faults["reads past the end"] = True
    except Exception:
        faults["reads past the end"] = False
    try:
        same_address[(2,)](torch.zeros(4), 0)
        faults["write race"] = True
    except Exception:
        faults["write race"] = False
    return faults


if __name__ == "__main__":
    json.dump(answers(), sys.stdout)
