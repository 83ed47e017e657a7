"""The CUDA rotary kernel on the SIMT machine: parity, gradients, odd shapes, traffic."""

from __future__ import annotations

import pytest
import torch

from tests.ops.test_rotary_triton import make
from tests.support.cuda_machine import DTYPES, check_on_machine, counted, simt
from tests.support.ops import opcheck
from vlmops.backends import cuda_runtime
from vlmops.ops import rotary
from vlmops.ops.rotary import cuda as backend
from vlmops.ops.rotary.cost import cost

__all__ = ["simt"]

CASES = {
    "plain": dict(),
    "x alone": dict(heads_k=0),
    "72": dict(dim=72, tokens=5),
    "80": dict(dim=80, tokens=9),
    "partial": dict(dim=128, turned=64, heads_k=1),
    "partial, across a vector": dict(dim=24, turned=20, tokens=3),
    "odd": dict(dim=10, turned=6),
    "odd head": dict(dim=7, turned=6),
    "one token": dict(tokens=1),
    "strided": dict(strided=True),
    "no tokens": dict(tokens=0),
    "many heads": dict(tokens=2, heads=70, heads_k=9, dim=64),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_parity(case, interleaved, dtype):
    x, k, cos, sin = make(**CASES[case])
    check_on_machine(rotary, (x, cos, sin), dict(interleaved=interleaved) | ({} if k is None else dict(k=k)), dtype)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("tables", [torch.float32, torch.float16])
def test_tables_of_another_dtype(tables, interleaved):
    """float32 beside bfloat16 heads, as vision towers have it; a third dtype is converted."""
    x, _, cos, sin = make(tokens=4, dim=16)

    def call(x, cos, sin):
        return rotary(x, cos.to(tables), sin.to(tables), interleaved=interleaved)

    check_on_machine(call, (x, cos, sin), {}, torch.bfloat16)


@pytest.mark.parametrize("offset", [0, 1, 2])
def test_heads_that_start_at_an_odd_address(offset):
    """q inside a packed qkv: the width of an access follows the address and the strides."""
    wide = torch.randn(6, 3 * 16 + offset)
    x = wide[:, offset : offset + 16].unflatten(1, (2, 8)).requires_grad_()
    table = torch.randn(6, 8)
    check_on_machine(rotary, (x, table, table), {}, torch.float32)


def test_strided_last_dimension_and_tables():
    x, table = torch.randn(5, 2, 16)[..., ::2], torch.randn(5, 16)[:, ::2]
    check_on_machine(rotary, (x.requires_grad_(), table, table), {}, torch.float32)


@pytest.mark.parametrize("dim", [64, 72, 80, 128])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_traffic_is_the_least(dtype, interleaved, dim):
    x, k, cos, sin = (t.detach() for t in make(tokens=12, heads=4, heads_k=4, dim=dim))
    x, k = x.to(dtype), k.to(dtype)
    with counted() as seen:
        rotary(x, cos, sin, k=k, interleaved=interleaved)
    least = cost(x, k, cos, sin, interleaved)
    assert seen["global_load_bytes"] + seen["global_store_bytes"] == least.bytes
    assert seen["global_load_sectors"] <= 1.05 * least.read / 32
    assert seen["global_store_sectors"] <= 1.05 * least.written / 32
    # Heads of 64 and 128 share a warp evenly. Of others, lanes of two heads meet in a bank when they read the tables, once a
    # token, and heads of 72 read their partners by halves.
    assert seen["shared_wavefronts"] <= (1.0 if dim in (64, 128) else 1.7) * seen["shared_wavefronts_least"]


@pytest.mark.parametrize(("dim", "dtype", "bytes_"), [
    (64, torch.bfloat16, 16), (72, torch.bfloat16, 16), (80, torch.bfloat16, 16), (88, torch.bfloat16, 16),
    (80, torch.float32, 16), (10, torch.bfloat16, 4), (7, torch.bfloat16, 2),
])  # fmt: skip
def test_width_of_an_access(dim, dtype, bytes_):
    x, table = torch.empty(4, 3, dim, dtype=dtype, device="meta"), torch.empty(4, 6, device="meta")
    with cuda_runtime.record(cuda_runtime.TARGETS["sm_80"]) as plans:
        backend.forward(x, None, table, table, False)
    assert dict(plans[0].defines)["VEC"] * x.element_size() == bytes_


def test_offsets_beyond_32_bits():
    """Strides travel as 64-bit integers: a view with gaps of 2^33 elements is planned as such."""
    x = torch.empty(1, device="meta").as_strided((3, 2, 8), (1 << 33, 1 << 32, 1))
    table = torch.empty(3, 8, device="meta")
    with cuda_runtime.record(cuda_runtime.TARGETS["sm_80"]) as plans:
        backend.forward(x, None, table, table, False)
    assert (1 << 33).to_bytes(8, "little") in plans[0].packed()


def test_opcheck():
    x, k, cos, sin = make(tokens=4)
    opcheck(torch.ops.vlmops.rotary.default, (x, k, cos, sin, False, "cuda"))
