"""varlen_attention's sm_90a kernel (TMA, wgmma) on the SIMT machine: parity of every mask and head size; when it is taken."""

from __future__ import annotations

import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import vlmops
from tests.support import packed_attention
from tests.support.cuda_machine import check_on_machine, counted, simt
from tests.support.ops import check_op
from tests.support.packed_attention import VARLEN_CASES, cu, prefix
from vlmops.backends import cuda_runtime
from vlmops.ops import varlen_attention
from vlmops.ops._shared import cuda_sm90
from vlmops.ops.varlen_attention import cuda as backend
from vlmops.ops.varlen_attention import cuda_sm90 as sm90

__all__ = ["simt"]

BF16, FP16 = torch.bfloat16, torch.float16
make = functools.partial(packed_attention.make, grad=False)  # the kernels have no backward


@pytest.fixture(autouse=True)
def asked(monkeypatch, simt):
    """This kernel, also where few queries would split their keys between blocks of the other one."""
    monkeypatch.setenv(cuda_sm90.VARIABLE, "1")
    monkeypatch.setattr(backend, "parts", lambda *_: 1)


def check(args, options, dtype=BF16):
    check_op(varlen_attention, args, {**options, "return_lse": True}, backend="cuda", dtype=dtype)


def taken(args, options):
    """Whether the call was this kernel's."""
    with counted() as seen:
        varlen_attention(*(x.bfloat16() if x.is_floating_point() else x for x in args), **options)
    return seen["tma_copies"] > 0


LEFT_OUT = {"head 5", "head 256", "empty", "nothing", "many sequences"}
CASES = {
    **{name: case for name, case in VARLEN_CASES.items() if name not in LEFT_OUT},
    "many sequences": (dict(lengths_q=[(7 * i) % 5 for i in range(40)], heads=1, kv_heads=1), {}),
    "a ring that turns round": (dict(lengths_q=[20], lengths_k=[640], heads=1, kv_heads=1), {}),
    "ring and causal": (dict(lengths_q=[150], lengths_k=[400], heads=1, kv_heads=1), dict(causal=True)),
    "window that no row has": (dict(lengths_q=[4, 9], lengths_k=[90, 2]), dict(window=(0, 0))),
    "prefix far from window": (dict(lengths_q=[400], heads=1, kv_heads=1), dict(window=(9, 0), prefix_lens=prefix(3))),
    "prefix of two tiles": (dict(lengths_q=[500], heads=1, kv_heads=1), dict(window=(9, 0), prefix_lens=prefix(200))),
    "wide window": (dict(lengths_q=[400], heads=1, kv_heads=1), dict(window=(200, 100))),
    "one key of a tile not seen": (dict(lengths_q=[128], lengths_k=[142], heads=1, kv_heads=1), dict(causal=True)),
    "one key in the last tile": (dict(lengths_q=[20], lengths_k=[129], heads=1, kv_heads=1), {}),
    "a bound too wide": (dict(lengths_q=[3, 150]), dict(max_seqlen_q=170)),
    "negative scale": (dict(lengths_q=[70]), dict(scale=-0.3)),
    "whole tiles": (dict(lengths_q=[128, 256], heads=1, kv_heads=1), {}),
}  # fmt: skip
#: Those run under all three schedules of the machine.
ALL_SCHEDULES = ["long", "prefix and window", "grouped", "head 72", "head 128", "ring and causal"]


@pytest.mark.parametrize("case", CASES)
def test_parity(case):
    shapes, options = CASES[case]
    args = make(**{"dim": 64, **shapes})
    if case in ALL_SCHEDULES:
        check_on_machine(varlen_attention, args, {**options, "return_lse": True}, BF16)
    else:
        check(args, options)


@pytest.mark.parametrize("dim", sm90.DIMS)
def test_every_head(dim):
    args = make([130, 9], heads=1, kv_heads=1, dim=dim)
    check(args, dict(causal=True), FP16)
    assert taken(args, {})


@given(
    lengths=st.lists(st.tuples(st.integers(0, 140), st.integers(0, 140)), min_size=1, max_size=3),
    causal=st.booleans(),
    window=st.none() | st.tuples(st.integers(-1, 20), st.integers(-1, 20)),
    prefixes=st.none() | st.lists(st.integers(-3, 85), min_size=3, max_size=3),
)
@settings(max_examples=12, deadline=None)
def test_any_lengths(lengths, causal, window, prefixes):
    args = make([a for a, _ in lengths], [b for _, b in lengths], heads=2, kv_heads=1, dim=64)
    options = dict(causal=causal, window=window)
    if prefixes is not None:
        options["prefix_lens"] = prefix(*prefixes[: len(lengths)])
    check(args, options)


def test_strided_heads():
    """q, k and v of one product."""
    q, k, v = torch.randn(50, 3, 2, 72)[..., :64].unbind(1)
    check((q, k, v, cu([20, 30])), {})
    assert taken((q, k, v, cu([20, 30])), {})


def test_a_nan_stays_in_its_sequence():
    """Tiles reach into the next sequence: its keys are masked, its values cleared."""
    q, k, v, cu_q, _ = make([20, 30, 5], dim=64)
    q, k, v = (x.bfloat16() for x in (q, k, v))
    q[25], v[25], k[26] = float("nan"), float("nan"), float("inf")
    with vlmops.use_backend("cuda"):
        out, lse = varlen_attention(q, k, v, cu_q, return_lse=True)
    assert out[:20].isfinite().all() and out[50:].isfinite().all() and out[20:50].isnan().all()
    assert lse[:, :20].isfinite().all() and lse[:, 50:].isfinite().all()


def test_a_wrong_prefix_is_clamped():
    q, k, v, cu_q, _ = (x.half() if x.is_floating_point() else x for x in make([9, 40, 9], dim=64))
    with vlmops.use_backend("cuda"):
        found, want = (
            varlen_attention(q, k, v, cu_q, causal=True, prefix_lens=prefix(*lengths))
            for lengths in ((-(2**31), 2**31 - 1, -7), (0, 40, 0))
        )
    assert torch.equal(found, want)


def test_large_scores_do_not_overflow():
    q, k, v, cu_q, _ = make([40], dim=64)
    check((q * 60, k * 60, v, cu_q), {})


@pytest.mark.parametrize("values", [[0, 9, 4, 8], [5, 0, 2, 900], [-7, 3, 3, 8]])
def test_a_malformed_cu_seqlens_touches_nothing_else(values, monkeypatch):
    from vlmops.backends import cuda_simt

    q, k, v, _, _ = make([4, 4], dim=64)
    monkeypatch.setattr(backend, "cu_seqlens_list", lambda *_: None)
    found = ""
    try:
        with vlmops.use_backend("cuda"):
            varlen_attention(q.half(), k.half(), v.half(), torch.tensor(values, dtype=torch.int32))
    except cuda_simt.SimtError as error:
        found = str(error)
    # Two sequences may own one row, and write it one after the other.
    assert not found or "race" in found
    assert not any(word in found for word in ("out-of-bounds", "misaligned", "uninitialised", "async", "deadlock"))


def test_work_and_traffic():
    """A tile of keys once for both warpgroups, by whole sectors; no product for rows that are not there."""
    q, k, v, cu_q, _ = make([256, 64], heads=2, kv_heads=1, dim=64)
    q, k, v = (x.bfloat16() for x in (q, k, v))
    with counted() as seen:
        varlen_attention(q, k, v, cu_q)
    # blocks of a head: two with two tiles of keys, one with half a tile, of which one warpgroup has rows
    assert seen["mma_flops"] == 2 * (2 * 2 * 128 + 64) * 128 * 64 * 2 * 2
    row = 64 * 2
    # the tile of 64 rows begins inside the tensor, and ends with it
    least = 2 * (2 * (128 + 2 * 256) + 64 + 2 * 64) * row + q.numel() * 2 + 2 * 320 * 4
    blocks = 2 * (320 // 128 + 2)
    assert least <= seen["global_load_bytes"] + seen["global_store_bytes"] <= least + blocks * 384 * 6 * 4  # cu_seqlens
    assert seen["global_store_sectors"] == seen["global_store_sectors_least"]
    assert seen["tma_copies"] == 2 * (2 * (1 + 4) + 3)


def test_a_gap_between_prefix_and_window_is_not_read():
    q, k, v, cu_q, _ = make([640], heads=1, kv_heads=1, dim=64)
    with counted() as seen:
        varlen_attention(q.half(), k.half(), v.half(), cu_q, window=(8, 0), prefix_lens=prefix(16))
    # of 5 blocks: the queries; the tile with the prefix, and the two a window of 128 + 8 keys takes (the first: one in all)
    assert seen["tma_copies"] == 5 + 2 * (1 + 2 + 3 * 3)


def test_a_window_leaves_out_what_nobody_sees():
    q, k, v, cu_q, _ = make([640], heads=1, kv_heads=1, dim=64)
    with counted() as seen:
        varlen_attention(q.half(), k.half(), v.half(), cu_q, window=(8, 0))
    # of 5 blocks: the queries; the two tiles a window of 128 + 8 keys takes (the first: one), the second for one warpgroup
    assert seen["tma_copies"] == 5 + 2 * (1 + 4 * 2)
    assert seen["mma_flops"] == (2 + 4 * 3) * 64 * 128 * 64 * 2 * 2


# -- when it is taken ----------------------------------------------------------------------------------------------------


def entries(target, dim=64, dtype=BF16, tokens=4096):
    q, k = (torch.empty(tokens, heads, dim, dtype=dtype, device="meta") for heads in (16, 4))
    cu_q = torch.empty(2, dtype=torch.int32, device="meta")
    with cuda_runtime.record(cuda_runtime.TARGETS[target]) as plans:
        backend.forward(q, k, k, cu_q, cu_q, -1, -1, 0.1, True, -1, -1, None, 0.0, None, None, None, None, False)
    return plans


def test_only_on_capability_9_0_and_where_it_is_asked_for(monkeypatch):
    for target in cuda_runtime.TARGETS:
        (plan,) = entries(target)
        hopper = target == "sm_90a"
        assert (plan.entry, plan.arch) == (
            ("varlen_attention_sm90", "sm90a") if hopper else ("varlen_attention_forward", "sm80")
        )
    for dim in (24, 256):
        assert [p.arch for p in entries("sm_90a", dim)] == ["sm80"]
    monkeypatch.delenv(cuda_sm90.VARIABLE)
    assert [p.arch for p in entries("sm_90a")] == ["sm80"]


@pytest.mark.parametrize("dim", sm90.DIMS)
def test_the_launch_on_a_hopper(dim):
    (plan,) = entries("sm_90a", dim)
    assert plan.maps == 3 and dict(plan.defines)["STAGES"] == 2 and plan.shared <= cuda_runtime.TARGETS["sm_90a"].shared
    assert len(plan.packed()) == 3 * 128 + 8 * (len(plan.args) - 3)
