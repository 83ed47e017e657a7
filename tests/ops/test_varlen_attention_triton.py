"""varlen_attention's Triton kernels in the interpreter: parity, gradients, every mask, odd heads and lengths, traffic."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import vlmops
from tests.support import triton_interpreter
from tests.support.ops import check_op
from tests.support.packed_attention import VARLEN_CASES, cu, make, prefix
from vlmops.ops import varlen_attention
from vlmops.ops._shared.triton_attention_launch import forward_configs
from vlmops.ops.varlen_attention.cost import cost

pytest.importorskip("triton")
triton_interpreter.install()

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", VARLEN_CASES)
def test_parity(case, dtype):
    shapes, options = VARLEN_CASES[case]
    check_op(varlen_attention, make(**shapes), {**options, "return_lse": True}, backend="triton", dtype=dtype)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dim", [8, 72, 80])
def test_rope(dim, interleaved):
    tables = tuple(torch.randn(43, dim) for _ in range(2))
    options = dict(rope=tables, rope_interleaved=interleaved)
    check_op(varlen_attention, make([9, 34], dim=dim), options, backend="triton", dtype=torch.bfloat16)


def test_rope_with_own_tables_for_k():
    rope, rope_k = tuple(torch.randn(4, 8) for _ in range(2)), tuple(torch.randn(9, 8) for _ in range(2))
    options = dict(rope=rope, rope_k=rope_k)
    check_op(varlen_attention, make([3, 1], [5, 4], dim=8), options, backend="triton", dtype=torch.float32)


@given(
    lengths=st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40)), max_size=3),
    causal=st.booleans(),
    window=st.none() | st.tuples(st.integers(-1, 20), st.integers(-1, 20)),
    prefixes=st.none() | st.lists(st.integers(0, 45), min_size=3, max_size=3),
    groups=st.sampled_from([1, 2]),
    dim=st.sampled_from([1, 8, 24]),
)
@settings(max_examples=25, deadline=None)
def test_any_lengths(lengths, causal, window, prefixes, groups, dim):
    args = make([a for a, _ in lengths], [b for _, b in lengths], heads=2, kv_heads=2 // groups, dim=dim)
    options = dict(causal=causal, window=window, return_lse=True)
    if prefixes is not None:
        options["prefix_lens"] = prefix(*prefixes[: len(lengths)])
    check_op(varlen_attention, args, options, backend="triton", dtype=torch.float32)


def test_strided_heads():
    fused = torch.randn(50, 3, 2, 24)
    q, k, v = (fused[:, i].requires_grad_() for i in range(3))
    check_op(varlen_attention, (q, k, v, cu([20, 30])), {}, backend="triton", dtype=torch.float32)


def test_a_nan_stays_in_its_sequence():
    q, k, v, cu_q, _ = make([20, 30, 5], grad=False)
    v[25], k[26] = float("nan"), float("nan")
    with vlmops.use_backend("triton"):
        out = varlen_attention(q, k, v, cu_q)
    assert out[:20].isfinite().all() and out[50:].isfinite().all() and out[20:50].isnan().any()


def test_slots_cover_every_row_once_and_long_sequences_come_first():
    from vlmops.ops._shared.triton_schedule import tile_slots

    lengths = [5, 0, 130, 40, 130, 64] * 20
    slots = tile_slots(cu(lengths), sum(lengths), -1, 64)
    seen = [(i, row) for i, row in slots.t().tolist() if i >= 0]
    assert sorted(seen) == [(i, row) for i, n in enumerate(lengths) for row in range(0, n, 64)]
    order = [lengths[i] for i, _ in seen]
    assert order == sorted(order, reverse=True)
    assert (slots[0, len(seen) :] == -1).all()


def test_a_malformed_cu_seqlens_is_refused_on_the_cpu():
    q, k, v, _, _ = make([4, 4], grad=False)
    with vlmops.use_backend("triton"), pytest.raises(ValueError, match="cu_seqlens_q: expected to be monotone"):
        varlen_attention(q, k, v, torch.tensor([0, 9, 8], dtype=torch.int32))


@pytest.mark.parametrize("dim", [64, 72, 80, 96])
@pytest.mark.parametrize("causal", [False, True])
def test_traffic_and_work_are_the_least(dim, causal):
    q, k, v, cu_q, _ = make([256, 128], heads=1, kv_heads=1, dim=dim, grad=False)
    q, k, v = (x.bfloat16() for x in (q, k, v))
    with triton_interpreter.count() as seen, vlmops.use_backend("triton"):
        varlen_attention(q, k, v, cu_q, causal=causal)
    options = (-1, -1, 1.0, causal, -1, -1, None, 0.0, None, None, None, None, False)
    block = forward_configs(q, -1)[0]
    least = cost(q, k, v, cu_q, cu_q, *options, block_q=block["BM"])
    assert seen.bytes <= 1.15 * least.bytes
    if not causal:  # tiles on the diagonal are half empty
        assert least.flops <= seen.flops <= (1.12 if dim == 72 else 1.0) * least.flops


def test_rope_adds_one_pass():
    q, k, v, cu_q, _ = make([128], heads=4, kv_heads=4, dim=80, grad=False)
    q, k, v = (x.bfloat16() for x in (q, k, v))
    cos, sin = torch.randn(128, 80), torch.randn(128, 80)
    with triton_interpreter.count() as seen, vlmops.use_backend("triton"):
        varlen_attention(q, k, v, cu_q, rope=(cos, sin))
    block = forward_configs(q, -1)[0]
    args = (q, k, v, cu_q, cu_q, -1, -1, 1.0, False, -1, -1, None, 0.0, cos, sin, cos, sin, False)
    assert seen.bytes <= 1.15 * cost(*args, block_q=block["BM"]).bytes


def test_persistent_grid_gives_the_same(monkeypatch):
    from vlmops.ops.varlen_attention import triton as backend

    q, k, v, cu_q, _ = make([70, 5, 90, 33], grad=False)
    with vlmops.use_backend("triton"):
        plain = varlen_attention(q, k, v, cu_q)
        persistent = forward_configs(q, -1)[-1]
        assert persistent["PERSISTENT"]
        monkeypatch.setattr(backend, "forward_configs", lambda *a: [persistent])
        with triton_interpreter.count() as seen:
            assert torch.equal(varlen_attention(q, k, v, cu_q), plain)
    assert seen.programs <= 8 + 2  # two a processor, and the schedule
