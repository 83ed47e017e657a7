"""The Triton rotary kernel in the interpreter: parity, gradients, odd shapes, traffic."""

from __future__ import annotations

import pytest
import torch

import vlmops
from tests.support import triton_interpreter
from tests.support.ops import check_op
from vlmops.ops import rotary
from vlmops.ops.rotary.cost import cost

pytest.importorskip("triton")
triton_interpreter.install()

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def make(tokens=7, heads=3, heads_k=2, dim=8, turned=None, strided=False):
    wide = 2 if strided else 1
    x = torch.randn(tokens, heads * wide, dim)[:, ::wide].requires_grad_()
    k = torch.randn(tokens, heads_k, dim, requires_grad=True) if heads_k else None
    cos, sin = (torch.randn(tokens, turned or dim) for _ in range(2))
    return x, k, cos, sin


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("case", [
    dict(), dict(heads_k=0), dict(dim=72), dict(dim=80, tokens=33), dict(dim=128, turned=64, heads_k=1),
    dict(dim=10, turned=6), dict(tokens=1), dict(strided=True), dict(tokens=0),
])  # fmt: skip
def test_parity(case, interleaved, dtype):
    x, k, cos, sin = make(**case)
    check_op(
        rotary, (x, cos, sin), dict(interleaved=interleaved) | ({} if k is None else dict(k=k)),
        backend="triton", dtype=dtype,
    )  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
def test_traffic_is_the_least(dtype):
    x, k, cos, sin = (t.detach().to(dtype) for t in make(tokens=40, dim=80))
    with triton_interpreter.count() as seen, vlmops.use_backend("triton"):
        rotary(x, cos.float(), sin.float(), k=k)
    least = cost(x, k, cos.float(), sin.float(), False)
    assert least.bytes <= seen.bytes <= 1.15 * least.bytes
