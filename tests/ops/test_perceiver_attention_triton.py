"""perceiver_attention's Triton kernels in the interpreter: parity, gradients of both sources, traffic."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import vlmops
from tests.ops.test_perceiver_attention import CASES, DTYPES, make
from tests.support import triton_interpreter
from tests.support.ops import check_op
from vlmops.ops import perceiver_attention
from vlmops.ops._shared.triton_attention_launch import forward_configs
from vlmops.ops.perceiver_attention.cost import cost

pytest.importorskip("triton")
triton_interpreter.install()

MORE = {
    "several tiles": dict(lengths=[150, 70], num_latents=130, heads=1, kv_heads=1),
    "head 72": dict(lengths=[70, 5], num_latents=8, dim=72),
    "head 96": dict(lengths=[70, 5], num_latents=8, dim=96),
    "head 128": dict(lengths=[40], num_latents=8, dim=128),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES | MORE)
def test_parity(case, dtype):
    shapes = (CASES | MORE)[case]
    options = dict(num_latents=shapes["num_latents"])
    check_op(perceiver_attention, make(**shapes), options, backend="triton", dtype=dtype)


@given(
    lengths=st.lists(st.integers(0, 40), max_size=3),
    num_latents=st.integers(1, 20),
    groups=st.sampled_from([1, 2]),
    latents=st.booleans(),
)
@settings(max_examples=20, deadline=None)
def test_any_lengths(lengths, num_latents, groups, latents):
    args = make(lengths, num_latents, heads=2 * groups, latents=latents)
    check_op(perceiver_attention, args, dict(num_latents=num_latents), backend="triton", dtype=torch.float32)


@pytest.mark.parametrize("latents", [False, True])
@pytest.mark.parametrize("dim", [64, 72, 96])
def test_traffic_and_work_are_the_least(dim, latents):
    args = [
        x if x is None or not x.is_floating_point() else x.bfloat16()
        for x in make([256, 192], 64, dim=dim, latents=latents, grad=False)
    ]
    block = forward_configs(args[0], 64, 4)[0]["BM"]
    least = cost(*args, 64, 1.0, block_q=block)
    with triton_interpreter.count() as seen, vlmops.use_backend("triton"):
        perceiver_attention(*args, num_latents=64)
    assert least.bytes <= seen.bytes <= 1.15 * least.bytes
    assert least.flops <= seen.flops <= (1.12 if dim == 72 else 1.0) * least.flops
