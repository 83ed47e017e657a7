"""cross_attention's Triton kernels in the interpreter: parity, gradients, any media index, traffic."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import vlmops
from tests.ops.test_cross_attention import CASES, DTYPES, index, make, problems
from tests.support import triton_interpreter
from tests.support.ops import check_op
from vlmops.ops import cross_attention
from vlmops.ops._shared.triton_attention_launch import forward_configs
from vlmops.ops.cross_attention.cost import cost

pytest.importorskip("triton")
triton_interpreter.install()

MORE = {
    "several tiles": (
        dict(lengths_q=[150], lengths_k=[100, 70, 40], heads=1, kv_heads=1),
        dict(media_index=index(*[-1] * 10, *[0] * 60, *[1] * 50, *[2] * 30)),
    ),
    "shuffled tiles": (
        dict(lengths_q=[140], lengths_k=[100, 70, 40], heads=1, kv_heads=1),
        dict(media_index=index(*[(5 * i) % 4 - 1 for i in range(140)])),
    ),
    "head 72": (dict(lengths_q=[5], lengths_k=[70], dim=72), dict(media_index=index(0, 0, -1, 0, 0))),
    "head 80": (dict(lengths_q=[5], lengths_k=[70], dim=80), dict(media_index=index(0, 0, -1, 0, 0))),
    "head 128": (dict(lengths_q=[20], lengths_k=[33], dim=128), {}),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES | MORE)
def test_parity(case, dtype):
    shapes, options = (CASES | MORE)[case]
    check_op(cross_attention, make(**shapes), {**options, "return_lse": True}, backend="triton", dtype=dtype)


@given(problem=problems(), groups=st.sampled_from([1, 2]), dim=st.sampled_from([1, 8, 24]))
@settings(max_examples=25, deadline=None)
def test_any_media_index(problem, groups, dim):
    tq, lengths_k, media_index = problem
    args = make([tq], lengths_k, heads=2 * groups, dim=dim)
    options = dict(media_index=media_index, return_lse=True)
    check_op(cross_attention, args, options, backend="triton", dtype=torch.float32)


def test_a_nan_that_no_row_of_the_tile_sees_stays_out():
    q, k, v, cu_q, cu_k = make([6], [20, 130, 9], grad=False)
    k[60], v[61] = float("nan"), float("nan")
    with vlmops.use_backend("triton"):
        out = cross_attention(q, k, v, cu_q, cu_k, media_index=index(0, 0, 0, -1, 0, 0))
    assert out.isfinite().all()


def test_a_wrong_media_index_is_refused_on_the_cpu():
    q, k, v, cu_q, cu_k = make([2], [4], grad=False)
    with vlmops.use_backend("triton"), pytest.raises(ValueError, match="media_index: expected -1 or a segment number"):
        cross_attention(q, k, v, cu_q, cu_k, media_index=index(0, 1))


@pytest.mark.parametrize("dim", [64, 72, 80])
def test_traffic_and_work_are_the_least(dim):
    q, k, v, cu_q, cu_k = (
        x.bfloat16() if x.is_floating_point() else x for x in make([128], [128, 64], dim=dim, grad=False)
    )
    media = index(*[0] * 64, *[1] * 64)
    block = forward_configs(q, -1, 3)[0]["BM"]
    least = cost(q, k, v, cu_q, cu_k, media, 1.0, block_q=block)
    with triton_interpreter.count() as seen, vlmops.use_backend("triton"):
        cross_attention(q, k, v, cu_q, cu_k, media_index=media)
    assert seen.bytes <= 1.15 * least.bytes
    if block == 64:  # a tile of one image's text
        assert least.flops <= seen.flops <= (1.12 if dim == 72 else 1.0) * least.flops
