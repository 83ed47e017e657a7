"""varlen_attention's CUDA kernel on the SIMT machine: parity, every mask, block and schedule, odd lengths, traffic and work."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import vlmops
from tests.support import packed_attention
from tests.support.cuda_machine import check_on_machine, counted, simt
from tests.support.ops import check_op, opcheck
from tests.support.packed_attention import VARLEN_CASES, cu, prefix
from vlmops.backends import cuda_runtime
from vlmops.ops import varlen_attention
from vlmops.ops.varlen_attention import cuda as backend
from vlmops.ops.varlen_attention.cost import cost
from vlmops.ops.varlen_attention.cuda import Shape

__all__ = ["simt"]

BF16, FP16 = torch.bfloat16, torch.float16
DTYPES = [BF16, FP16]
#: Blocks of 64 and of 128 rows, and the one of large heads.
NARROW, WIDE, LARGE = Shape(1, 64, 2), Shape(2, 64, 2), Shape(2, 48, 2)


make = functools.partial(packed_attention.make, grad=False)  # test_attention_backward_cuda.py has the gradients


def force(monkeypatch, block):
    monkeypatch.setattr(backend, "shape", lambda *_: block)


CASES = {
    **{name: case for name, case in VARLEN_CASES.items() if name != "head 5"},
    "one key short of a tile": (dict(lengths_q=[100]), dict(window=(-1, 62))),
    "window that no row has": (dict(lengths_q=[4, 9], lengths_k=[90, 2]), dict(window=(0, 0))),
    "prefix far from window": (dict(lengths_q=[300], heads=1, kv_heads=1), dict(window=(9, 0), prefix_lens=prefix(3))),
    "a bound too wide": (dict(lengths_q=[3, 150]), dict(max_seqlen_q=170)),
    "negative scale": (dict(lengths_q=[70]), dict(scale=-0.3)),
    "scale zero": (dict(lengths_q=[9]), dict(scale=0.0, causal=True)),
    "head 24": (dict(lengths_q=[7, 3], dim=24), {}),
    "head 64": (dict(lengths_q=[70], dim=64), {}),
    "head 128": (dict(lengths_q=[70], dim=128), {}),
}  # fmt: skip
#: Those run under all three schedules of the machine.
ALL_SCHEDULES = ["long", "causal, more queries", "prefix and window", "grouped", "head 72", "head 128"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_parity(case, dtype):
    shapes, options = CASES[case]
    check = check_on_machine if case in ALL_SCHEDULES and dtype == BF16 else _check
    check(varlen_attention, make(**shapes), {**options, "return_lse": True}, dtype=dtype)


def _check(fn, args, kwargs, dtype):
    check_op(fn, args, kwargs, backend="cuda", dtype=dtype)


@pytest.mark.parametrize("block", [NARROW, WIDE, LARGE, Shape(2, 32, 2), Shape(1, 32, 3), Shape(1, 64, 4)], ids=str)
@pytest.mark.parametrize("case", ["causal, more queries", "prefix and window", "head 80"])
def test_every_block(case, block, monkeypatch):
    """Blocks that default to other GPUs and lengths, and deeper rings."""
    force(monkeypatch, block)
    shapes, options = CASES[case]
    check_on_machine(varlen_attention, make(**shapes), {**options, "return_lse": True}, BF16)


@pytest.mark.parametrize("interleaved", [False, True])
def test_rope(interleaved):
    tables = tuple(torch.randn(43, 72) for _ in range(2))
    check_op(varlen_attention, make([9, 34], dim=72), dict(rope=tables, rope_interleaved=interleaved), backend="cuda",
             dtype=BF16)  # fmt: skip


def test_rope_with_own_tables_for_k():
    rope, rope_k = tuple(torch.randn(4, 8) for _ in range(2)), tuple(torch.randn(9, 8) for _ in range(2))
    check_op(varlen_attention, make([3, 1], [5, 4], dim=8), dict(rope=rope, rope_k=rope_k), backend="cuda", dtype=FP16)


def test_gradients():
    check_op(varlen_attention, make([5, 20], grad=True), dict(causal=True, return_lse=True), backend="cuda", dtype=BF16)


@given(
    lengths=st.lists(st.tuples(st.integers(0, 80), st.integers(0, 80)), max_size=3),
    causal=st.booleans(),
    window=st.none() | st.tuples(st.integers(-1, 20), st.integers(-1, 20)),
    prefixes=st.none() | st.lists(st.integers(-3, 85), min_size=3, max_size=3),
    groups=st.sampled_from([1, 2]),
    atoms=st.sampled_from([1, 2]),
    dim=st.sampled_from([8, 24]),
)
@settings(max_examples=30, deadline=None)
def test_any_lengths(lengths, causal, window, prefixes, groups, atoms, dim):
    args = make([a for a, _ in lengths], [b for _, b in lengths], heads=2, kv_heads=2 // groups, dim=dim)
    options = dict(causal=causal, window=window, return_lse=True)
    if prefixes is not None:
        options["prefix_lens"] = prefix(*prefixes[: len(lengths)])
    with pytest.MonkeyPatch.context() as patch:
        force(patch, Shape(atoms=atoms, keys=32, stages=2))
        check_op(varlen_attention, args, options, backend="cuda", dtype=BF16)


def test_strided_heads():
    """q, k and v of one product; and rows that do not start at 16 bytes, which are copied."""
    for width in (24, 25):
        q, k, v = torch.randn(50, 3, 2, width)[..., :24].unbind(1)
        check_op(varlen_attention, (q, k, v, cu([20, 30])), {}, backend="cuda", dtype=BF16)
    q, k, v = (torch.randn(24, 2, 50).bfloat16().permute(2, 1, 0) for _ in range(3))
    with vlmops.use_backend("cuda"):
        out = varlen_attention(q, k, v, cu([20, 30]))
        assert torch.equal(out, varlen_attention(*(x.contiguous() for x in (q, k, v)), cu([20, 30])))


def test_a_nan_stays_in_its_sequence():
    q, k, v, cu_q, _ = make([20, 30, 5])
    q, k, v = (x.bfloat16() for x in (q, k, v))
    v[25], k[26] = float("nan"), float("nan")
    with vlmops.use_backend("cuda"):
        out, lse = varlen_attention(q, k, v, cu_q, return_lse=True)
    assert out[:20].isfinite().all() and out[50:].isfinite().all() and out[20:50].isnan().all()
    assert lse[:, :20].isfinite().all() and lse[:, 20:50].isnan().all()


@pytest.mark.parametrize("which", [0, 1])
def test_a_nan_stays_in_its_row(which):
    """Heads of an odd number of chunks: the half step behind the last one is not the next row's first."""
    args = [x.half() if x.is_floating_point() else x for x in make([20], dim=24)]
    args[which][7] = float("nan")
    with vlmops.use_backend("cuda"):
        out = varlen_attention(*args[:4], causal=True)
    assert torch.equal(out.isnan().any(-1).any(-1).nonzero()[:, 0], torch.arange(7, 20)[: 1 if which == 0 else None])


def test_a_wrong_prefix_is_clamped():
    q, k, v, cu_q, _ = (x.half() if x.is_floating_point() else x for x in make([9, 40, 9]))
    with vlmops.use_backend("cuda"):
        found, want = (
            varlen_attention(q, k, v, cu_q, causal=True, prefix_lens=prefix(*lengths))
            for lengths in ((-(2**31), 2**31 - 1, -7), (0, 40, 0))
        )
    assert torch.equal(found, want)


def test_large_scores_do_not_overflow():
    q, k, v, cu_q, _ = make([40])
    check_op(varlen_attention, (q * 60, k * 60, v, cu_q), dict(return_lse=True), backend="cuda", dtype=BF16)


def test_every_slot_finds_its_sequence(monkeypatch):
    """Hundreds of sequences: the search takes two rounds of a warp; each row is written, by one block (the machine looks)."""
    force(monkeypatch, Shape(1, 32, 2))
    lengths = [(37 * i) % 7 if i % 9 else 64 + i % 5 for i in range(1100)]
    q, k, v, cu_q, _ = make(lengths, heads=1, kv_heads=1, dim=8)
    v[:] = torch.arange(1100.0).repeat_interleave(torch.tensor(lengths))[:, None, None] / 8
    with vlmops.use_backend("cuda"):
        out = varlen_attention(q.half(), k.half(), v.half(), cu_q)
    torch.testing.assert_close(out, v.half(), rtol=1e-3, atol=0)


@pytest.mark.parametrize("values", [[0, 9, 4, 8], [5, 0, 2, 900], [-7, 3, 3, 8]])
def test_a_malformed_cu_seqlens_touches_nothing_else(values, monkeypatch):
    """A GPU does not look at the values: whatever they are, no access leaves the tensors."""
    from vlmops.backends import cuda_simt

    q, k, v, _, _ = make([4, 4])
    bad = torch.tensor(values, dtype=torch.int32)
    with vlmops.use_backend("cuda"), pytest.raises(ValueError, match="cu_seqlens_q: expected to"):
        varlen_attention(q.half(), k.half(), v.half(), bad)
    monkeypatch.setattr(backend, "cu_seqlens_list", lambda *_: None)
    found = ""
    try:
        with vlmops.use_backend("cuda"):
            varlen_attention(q.half(), k.half(), v.half(), bad)
    except cuda_simt.SimtError as error:
        found = str(error)
    # Two sequences may own one row, and write it one after the other.
    assert not found or "race" in found
    assert not any(word in found for word in ("out-of-bounds", "misaligned", "uninitialised", "async", "deadlock"))


@pytest.mark.parametrize(("dim", "dtype", "why"), [(20, BF16, "a multiple of 8"), (264, BF16, "at most 256"),
                                                    (16, torch.float32, "float32")])  # fmt: skip
def test_what_it_refuses(dim, dtype, why):
    q, k, v, cu_q, _ = make([4], dim=dim)
    with vlmops.use_backend("cuda"), pytest.raises(vlmops.backends.BackendError, match=why):
        varlen_attention(q.to(dtype), k.to(dtype), v.to(dtype), cu_q)


@pytest.mark.parametrize(("dim", "block"), [(64, WIDE), (72, WIDE), (80, NARROW), (88, NARROW), (96, NARROW), (128, LARGE)],
                         ids=str)  # fmt: skip
@pytest.mark.parametrize("options", [{}, dict(causal=True), dict(left=30, right=20)], ids=str)
def test_traffic_and_work_are_the_least(dim, block, options, monkeypatch):
    force(monkeypatch, block)
    lengths = [384] if block == LARGE else [256, 128]  # whole tiles of queries and of keys
    q, k, v, cu_q, _ = make(lengths, heads=2, kv_heads=1, dim=dim)
    q, k, v = (x.bfloat16() for x in (q, k, v))
    causal, left, right = options.get("causal", False), options.get("left", -1), options.get("right", -1)
    with counted() as seen:
        varlen_attention(q, k, v, cu_q, causal=causal, window=(left, right))
    masks = (causal, left, right, None, 0.0, None, None, None, None, False)
    least = cost(q, k, v, cu_q, cu_q, -1, -1, 1.0, *masks, block_q=block.rows)
    moved = seen["global_load_bytes"] + seen["global_store_bytes"]
    broadcast = 4 * 4 * 32 * 20 * (6 + 6 * (256 // block.rows))  # every lane's reads of cu_seqlens, at the most
    assert least.bytes <= moved <= 1.01 * least.bytes + broadcast
    # whole sectors where heads are: 72 and 88 elements are not, and a row of theirs touches one more
    straddle = 1.13 if dim % 16 else 1.0
    sectors = 32 * (seen["global_load_sectors"] + seen["global_store_sectors"])
    assert sectors <= 1.1 * straddle * least.bytes
    assert seen["shared_wavefronts"] <= 1.05 * seen["shared_wavefronts_least"]
    if options == {}:  # tiles on a diagonal are half empty
        assert least.flops <= seen["mma_flops"] <= (1.06 if dim % 16 else 1.0) * least.flops


def test_short_sequences_leave_warps_idle():
    """A sequence of 16 rows is one warp's: the other three take no part in the products."""
    q, k, v, cu_q, _ = make([16] * 6, dim=64)
    with counted() as seen:
        varlen_attention(q.half(), k.half(), v.half(), cu_q, max_seqlen_q=16)
    assert seen["mma_flops"] == 6 * 2 * 4 * 16 * 64 * 64


def test_causal_skips_tiles_a_warp_does_not_see():
    q, k, v, cu_q, _ = make([256], heads=1, kv_heads=1, dim=64)
    with counted() as seen:
        varlen_attention(q.half(), k.half(), v.half(), cu_q, causal=True)
    tiles = sum(math.ceil((row + 16) / 64) for row in range(0, 256, 16))
    assert seen["mma_flops"] == tiles * 4 * 16 * 64 * 64


def test_a_window_skips_tiles_a_warp_does_not_see(monkeypatch):
    force(monkeypatch, Shape(1, 32, 2))
    q, k, v, cu_q, _ = make([128], heads=1, kv_heads=1, dim=16)
    with counted() as seen:
        varlen_attention(q.half(), k.half(), v.half(), cu_q, window=(8, 0))
    tiles = 0
    for block in (0, 64):
        for at in range(max(block - 8, 0), block + 64, 32):
            tiles += sum(at < row + 16 and at + 32 > row - 8 for row in range(block, block + 64, 16))
    assert seen["mma_flops"] == tiles * 4 * 16 * 32 * 16


def test_a_gap_between_prefix_and_window_is_not_read():
    q, k, v, cu_q, _ = make([512], heads=1, kv_heads=1, dim=64)
    with counted() as seen:
        varlen_attention(q.half(), k.half(), v.half(), cu_q, window=(8, 0), prefix_lens=prefix(16))
    # Each of 4 blocks: a tile with the prefix in it, and 128 + 8 keys; and once the queries.
    most = 4 * (64 + 136) * 2 * 128 + 512 * 128
    assert 32 * seen["global_load_sectors"] <= most + 8192  # cu_seqlens


@pytest.mark.parametrize(("arch", "dim", "tokens", "longest", "rows", "keys"), [
    ("sm_80", 64, 16384, -1, 128, 64), ("sm_80", 128, 16384, -1, 128, 48), ("sm_89", 128, 16384, -1, 128, 32),
    ("sm_80", 80, 16384, 64, 64, 64), ("sm_90a", 72, 256, -1, 64, 64), ("sm_80", 256, 16384, -1, 64, 32),
])  # fmt: skip
def test_shape_of_a_block(arch, dim, tokens, longest, rows, keys):
    q = torch.empty(tokens, 16, dim, dtype=BF16, device="meta")
    with cuda_runtime.assume(cuda_runtime.TARGETS[arch]):
        found = backend.shape(q, 1, longest)
        assert (found.rows, found.keys) == (rows, keys)
        assert found.shared(dim) <= cuda_runtime.shared_bytes(q)


@pytest.mark.parametrize("count", [2, 5])
@pytest.mark.parametrize(
    "case", ["ragged", "causal, more queries", "causal window", "no keys", "softcap causal", "grouped"]
)
def test_split_keys(case, count, monkeypatch):
    """Parts without a key for anyone, and with keys for some rows only."""
    force(monkeypatch, Shape(1, 32, 2))
    monkeypatch.setattr(backend, "parts", lambda *_: count)
    shapes, options = VARLEN_CASES[case]
    check_on_machine(varlen_attention, make(**shapes), {**options, "return_lse": True}, BF16)


@pytest.mark.parametrize(
    ("options", "count"), [({}, 13), (dict(left=100, right=100), 1), (dict(prefix=True), 1)], ids=str
)
def test_how_often_keys_are_split(options, count):
    """One query of a long context: as often as gives each processor two blocks; never with a prefix."""
    q, k = torch.empty(1, 16, 64, dtype=BF16, device="meta"), torch.empty(9000, 4, 64, dtype=BF16, device="meta")
    cu_q = torch.empty(2, dtype=torch.int32, device="meta")
    prefix_lens = cu_q[:1] if options.get("prefix") else None
    window = options.get("left", -1), options.get("right", -1)
    with cuda_runtime.record(cuda_runtime.TARGETS["sm_80"]) as plans:
        backend.forward(
            q, k, k, cu_q, cu_q, 1, -1, 1.0, False, *window, prefix_lens, 0.0, None, None, None, None, False
        )
    assert plans[0].grid[2] == count and len(plans) == 1 + (count > 1)


def test_opcheck():
    q, k, v, cu_q, cu_k = make([5, 3], grad=True)
    q, k, v = (x.detach().bfloat16().requires_grad_() for x in (q, k, v))
    opcheck(
        torch.ops.vlmops.varlen_attention.default,
        (q, k, v, cu_q, cu_k, -1, -1, 0.5, True, -1, -1, None, 0.0, None, None, None, None, False, "cuda"),
    )
