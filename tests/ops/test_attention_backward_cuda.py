"""varlen_attention's CUDA backward on the SIMT machine: gradients, every mask and block, odd lengths, traffic and work."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.attention_gradients import NARROW, clamped, force, gradients, low, narrow
from tests.support.cuda_machine import check_on_machine, counted, simt
from tests.support.ops import check_op
from tests.support.packed_attention import VARLEN_CASES, cu, make, prefix
from vlmops.backends import cuda_runtime, cuda_simt
from vlmops.ops import varlen_attention
from vlmops.ops._shared.cuda_attention_backward import GradShape, grad_shape, row_stats
from vlmops.ops.cross_attention.cuda_backward import ROWS
from vlmops.ops.varlen_attention import cuda as packed_forward
from vlmops.ops.varlen_attention import cuda_backward as packed
from vlmops.ops.varlen_attention.cost import cost

__all__ = ["narrow", "simt"]

BF16, FP16 = torch.bfloat16, torch.float16
CASES = {
    **{name: case for name, case in VARLEN_CASES.items() if name not in ("head 5", "head 88", "head 256")},
    "window that no row has": (dict(lengths_q=[4, 9], lengths_k=[90, 2]), dict(window=(0, 0))),
    "prefix far from window": (
        dict(lengths_q=[200], heads=1, kv_heads=1),
        dict(window=(9, 0), prefix_lens=prefix(3)),
    ),
    "a bound too wide": (dict(lengths_q=[3, 150], heads=1, kv_heads=1), dict(max_seqlen_q=170, max_seqlen_k=190)),
    "negative scale": (dict(lengths_q=[70]), dict(scale=-0.3)),
    "scale zero": (dict(lengths_q=[9]), dict(scale=0.0, causal=True)),
    "window that just reaches a tile": (dict(lengths_q=[70], heads=1, kv_heads=1), dict(window=(1, 1))),
    "window that all but covers a tile": (dict(lengths_q=[70], heads=1, kv_heads=1), dict(window=(-1, 14))),
    "head 64": (dict(lengths_q=[70, 20], dim=64, kv_heads=1), dict(causal=True)),
}
ALL_SCHEDULES = ["causal, more queries", "prefix and window", "grouped causal", "head 72"]
FP16_CASES = ["causal, more keys", "grouped", "prefix and window"]


@pytest.mark.parametrize("case", CASES)
def test_packed(case):
    shapes, options = CASES[case]
    options = {**options, "return_lse": True}
    if case in ALL_SCHEDULES:
        check_on_machine(varlen_attention, make(**shapes), options, BF16)
    else:
        check_op(varlen_attention, make(**shapes), options, backend="cuda", dtype=BF16)


@pytest.mark.parametrize("case", FP16_CASES)
def test_packed_fp16(case):
    shapes, options = CASES[case]
    check_op(varlen_attention, make(**shapes), {**options, "return_lse": True}, backend="cuda", dtype=FP16)


@pytest.mark.parametrize("block", [GradShape(2, 32, 32), GradShape(2, 32, 16), GradShape(1, 64, 32)], ids=str)
@pytest.mark.parametrize("case", ["causal, more queries", "prefix and window", "grouped", "long"])
def test_every_block(case, block, monkeypatch):
    force(monkeypatch, block)
    shapes, options = CASES[case]
    check_op(varlen_attention, make(**shapes), {**options, "return_lse": True}, backend="cuda", dtype=BF16)


@given(
    lengths=st.lists(st.tuples(st.integers(0, 70), st.integers(0, 70)), max_size=3),
    causal=st.booleans(),
    window=st.none() | st.tuples(st.integers(-1, 20), st.integers(-1, 20)),
    prefixes=st.none() | st.lists(st.integers(-3, 75), min_size=3, max_size=3),
    groups=st.sampled_from([1, 2]),
    longest=st.booleans(),
)
@settings(max_examples=25, deadline=None)
def test_any_lengths(lengths, causal, window, prefixes, groups, longest):
    args = make([a for a, _ in lengths], [b for _, b in lengths], heads=2, kv_heads=2 // groups)
    options = dict(causal=causal, window=window, return_lse=True)
    if prefixes is not None:
        options["prefix_lens"] = prefix(*prefixes[: len(lengths)])
    if longest:
        options |= dict(max_seqlen_q=70, max_seqlen_k=70)
    with pytest.MonkeyPatch.context() as patch:
        force(patch, NARROW)
        check_op(varlen_attention, args, options, backend="cuda", dtype=BF16)


@pytest.mark.parametrize("interleaved", [False, True])
def test_rope(interleaved):
    tables = tuple(torch.randn(43, 16) for _ in range(2))
    options = dict(rope=tables, rope_interleaved=interleaved)
    check_op(varlen_attention, make([9, 34]), options, backend="cuda", dtype=BF16)


@pytest.mark.parametrize("wanted", [(0, 1, 2), (0,), (1,), (2,)])
def test_some_gradients_with_rope(wanted):
    """Own tables for k, and one gradient alone."""
    rope, rope_k = tuple(torch.randn(4, 16) for _ in range(2)), tuple(torch.randn(9, 16) for _ in range(2))
    args = make([3, 1], [5, 4], grad=False)
    for i in wanted:
        args[i].requires_grad_()
    check_op(varlen_attention, args, dict(rope=rope, rope_k=rope_k), backend="cuda", dtype=BF16)


def test_the_gradient_of_lse_alone():
    check_op(lambda *a, **k: varlen_attention(*a, return_lse=True, **k)[1], make([9, 34]), dict(causal=True),
             backend="cuda", dtype=BF16)  # fmt: skip


@pytest.mark.parametrize("layout", ["expanded", "transposed", "sliced"])
def test_any_layout_of_the_gradient(layout):
    args = make([20, 30])
    grad = {
        "expanded": torch.randn(1, 2, 1).bfloat16().expand(50, 2, 16),
        "transposed": torch.randn(16, 2, 50).bfloat16().permute(2, 1, 0),
        "sliced": torch.randn(50, 2, 25).bfloat16()[..., :16],
    }[layout]
    found = gradients(varlen_attention, args, {}, grad)[1]
    assert all(map(torch.equal, found, gradients(varlen_attention, args, {}, grad.contiguous())[1]))


def test_strided_operands():
    """q, k and v of one product; and rows that do not start at 16 bytes."""
    for width in (16, 17):
        q, k, v = torch.randn(50, 3, 2, width)[..., :16].unbind(1)
        leaves = [x.requires_grad_() for x in (q.detach(), k.detach(), v.detach())]
        check_op(varlen_attention, (*leaves, cu([20, 30])), {}, backend="cuda", dtype=BF16)


def test_rows_without_keys_get_exactly_zero():
    out, (dq, dk, dv) = gradients(varlen_attention, make([90], [70]), dict(causal=True))
    assert (out[:20] == 0).all() and (dq[:20] == 0).all() and dq[25:].any(-1).all()
    _, (dq, dk, dv) = gradients(varlen_attention, make([5, 4], [0, 3]), {})
    assert (dq[:5] == 0).all() and dk.isfinite().all() and dv.isfinite().all()
    _, (_, dk, dv) = gradients(varlen_attention, make([2], [90]), dict(window=(3, 0)))
    assert (dk[:85] == 0).all() and (dv[:85] == 0).all() and dv[86:].any(-1).all()


def test_very_low_scores():
    """exp2(-lse) overflows where a key that is not there, of zeros, is not masked."""
    q, k, v, cu_q, _ = make([40], grad=False)
    leaves = [x.requires_grad_() for x in (q / 8 + 20, k / 8 - 20, v)]
    check_op(varlen_attention, (*leaves, cu_q), {}, backend="cuda", dtype=BF16)


@pytest.mark.parametrize("which", [0, 1, 2])
def test_a_nan_stays_in_its_sequence(which):
    args = low(make([20, 30, 5]))
    args[which][25] = float("nan")
    _, found = gradients(varlen_attention, args, {})
    for grad in found:
        assert grad[:20].isfinite().all() and grad[50:].isfinite().all()
    assert found[0][20:50].isnan().any() and found[1][20:50].isnan().any()


def test_a_nan_stays_in_its_row():
    """Heads of an odd number of chunks: the half step behind the last one is not the next row's first."""
    args = low(make([20], dim=24))
    args[0][7] = float("nan")
    _, (dq, _, _) = gradients(varlen_attention, args, {})
    assert torch.equal(dq.isnan().any(-1).any(-1), torch.arange(20) == 7)


def test_a_wrong_prefix_is_clamped():
    args = make([9, 40, 9])
    found, want = (
        gradients(varlen_attention, args, dict(causal=True, prefix_lens=prefix(*lengths)))[1]
        for lengths in ((-(2**31), 2**31 - 1, -7), (0, 40, 0))
    )
    assert all(map(torch.equal, found, want))


def test_the_same_bits_under_every_schedule():
    args, found = make([70, 5, 90], heads=4, kv_heads=2), []
    for name in cuda_simt.SCHEDULES:
        with cuda_simt.schedule(name, seed=3):
            found.append(gradients(varlen_attention, args, dict(causal=True))[1])
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("longest", [-1, 8])
@pytest.mark.parametrize("values", [[0, 9, 4, 8], [5, 0, 2, 900], [-7, 3, 3, 8]])
def test_a_malformed_cu_seqlens_touches_nothing_else(values, longest):
    """A GPU does not look at the values: whatever they are, no access leaves the tensors."""
    q, k, v, good, _ = low(make([4, 4]))
    bad, lse = torch.tensor(values, dtype=torch.int32), torch.zeros(2, 8)
    for cu_q, cu_k in ((bad, bad), (bad, good[[0, 1, 1, 2]]), (good[[0, 1, 1, 2]], bad)):
        args = [q, k, v, cu_q, cu_k, longest, longest, 0.3, True, -1, -1, None, 0.0, None, None, None, None, False]
        clamped(lambda a=args: packed.backward([q, lse], [q, lse], a, [True] * 3))


@pytest.mark.parametrize("fits", [True, False])
def test_large_heads_take_torchs_gradient(fits, monkeypatch):
    seen = []
    monkeypatch.setattr(packed, "gradient_fits", lambda q: fits)
    monkeypatch.setattr(
        packed.composition, "backward", lambda *a, f=packed.composition.backward: seen.append(1) or f(*a)
    )
    check_op(varlen_attention, make([5]), dict(causal=True), backend="cuda", dtype=BF16, lowprec="reference")
    assert bool(seen) != fits


def test_row_numbers():
    """Both numbers of a row, for heads that are not a power of two, and tokens and heads in any layout."""
    for tokens, dim in ((70, 16), (33, 72), (9, 200)):
        out, grad = torch.randn(2, tokens, 3, dim).bfloat16().unbind(0)
        lse, grad_lse = torch.randn(2, 3, tokens).unbind(0)
        lse[1, 5] = -torch.inf
        for transposed in (False, True):
            g = grad.transpose(0, 1).contiguous().transpose(0, 1) if transposed else grad
            stats, plan = row_stats(out, g, lse, grad_lse)
            cuda_runtime.run([plan])
            want = (out.double() * g.double()).sum(-1).t() - grad_lse.double()
            torch.testing.assert_close(stats[..., 1], want.float(), rtol=1e-5, atol=1e-4)
            want = torch.where(lse == -torch.inf, 0, lse / torch.log(torch.tensor(2.0)))
            torch.testing.assert_close(stats[..., 0], want, rtol=1e-6, atol=1e-6)


# -- work and traffic --------------------------------------------------------------------------------------------------


def saved(lengths, dim, heads=2, kv_heads=1):
    q, k, v, cu_q, _ = low(make(lengths, heads=heads, kv_heads=kv_heads, dim=dim))
    options = (-1, -1, dim**-0.5, False, -1, -1, None, 0.0, None, None, None, None, False)
    return [q, k, v, cu_q, cu_q, *options], [q, torch.zeros(heads, q.shape[0])]


@pytest.mark.parametrize(
    ("dim", "block"), [(64, GradShape(2, 32, 16)), (72, NARROW), (80, NARROW), (128, NARROW)], ids=str
)
@pytest.mark.parametrize("needs", [(True, False, False), (False, True, True)])
def test_traffic_and_work_are_the_least(dim, block, needs, monkeypatch):
    """Of one kernel: three products for dq, four for dk and dv, where the forward has two."""
    force(monkeypatch, block)
    lengths = [256, 128]  # whole tiles
    args, outs = saved(lengths, dim)
    q, k = args[:2]
    with counted() as seen:
        packed.backward([outs[0], None], outs, args, needs)
    own, other = (k, q) if needs[1] else (q, k)
    passes = sum(n * n // block.own for n in lengths) * 2  # passing rows, for every tile and query head
    stats_bytes = 8 * 2 * q.shape[0]
    least = 2 * passes * dim * 2 + (passes * 8 if needs[1] else stats_bytes)
    least += own.numel() * 2 * (4 if needs[1] else 3)  # two read, and written
    least += 2 * outs[0].numel() * 2 + stats_bytes + 4 * outs[1].numel()  # the rows' numbers
    moved = seen["global_load_bytes"] + seen["global_store_bytes"]
    blocks = 6 * 2 * 4  # each reads cu_seqlens, with every lane
    quads = 3 * stats_bytes if needs[0] else 0  # a row's numbers for each of four lanes
    assert least <= moved <= 1.01 * least + quads + blocks * 32 * 4 * 20
    straddle = 1.13 if dim % 16 else 1.0
    sectors = 32 * (seen["global_load_sectors"] + seen["global_store_sectors"])
    assert sectors <= 1.1 * straddle * least
    assert seen["shared_wavefronts"] <= 1.05 * seen["shared_wavefronts_least"]
    forward = cost(*args).flops
    factor = 2.0 if needs[1] else 1.5
    assert factor * forward <= seen["mma_flops"] <= (1.08 if dim % 16 else 1.0) * factor * forward
    assert own.shape[0] % block.own == 0 and other.shape[0] % block.others == 0


def test_causal_leaves_out_what_nobody_sees():
    args, outs = saved([256], 16, heads=1)
    args[8] = True
    with counted() as seen:
        packed.backward([outs[0], None], outs, args, [True, False, False])
    tiles = sum(-(-(row + 16) // 32) for row in range(0, 256, 16))  # of 32 keys, for a warp of 16 rows
    assert seen["mma_flops"] == tiles * 6 * 16 * 32 * 16
    with counted() as seen:
        packed.backward([outs[0], None], outs, args, [False, True, True])
    assert seen["mma_flops"] == tiles * 8 * 16 * 32 * 16


def test_a_window_leaves_out_what_nobody_sees():
    args, outs = saved([128], 16, heads=1)
    args[9], args[10] = 8, 0
    sizes = [(0, 64), (64, 128)]
    for needs, products in (((True, False, False), 6), ((False, True, True), 8)):
        with counted() as seen:
            packed.backward([outs[0], None], outs, args, needs)
        tiles = 0
        for begin, end in sizes:  # of a block's rows, or keys
            first, last = (begin, min(end + 8, 128)) if needs[1] else (max(begin - 8, 0), end)
            for at in range(first, last, 32):
                low_of, high_of = (0, 8) if needs[1] else (8, 0)
                tiles += sum(
                    at < own + 16 + high_of and min(at + 32, last) > own - low_of for own in range(begin, end, 16)
                )
        assert seen["mma_flops"] == tiles * products * 16 * 32 * 16


@pytest.mark.parametrize("needs", [(True, False, False), (False, True, True)])
def test_tiles_outside_of_a_window_are_not_walked(needs):
    """Every block inside a long sequence waits as often as the one before it."""
    waits = []
    for blocks in (4, 5, 6):
        args, outs = saved([64 * blocks], 16, heads=1)
        args[9], args[10] = 8, 8
        with counted() as seen:
            packed.backward([outs[0], None], outs, args, needs)
        waits.append(seen["barriers"])
    assert waits[2] - waits[1] == waits[1] - waits[0] > 0


def test_short_sequences_leave_warps_idle():
    args, outs = saved([16] * 6, 16, heads=2, kv_heads=2)
    with counted() as seen:
        packed.backward([outs[0], None], outs, args, [True, True, True])
    assert seen["mma_flops"] == 6 * 2 * 14 * 16 * 32 * 16


@pytest.mark.parametrize("arch", ["sm_80", "sm_89", "sm_90a"])
@pytest.mark.parametrize("keys", [True, False])
@pytest.mark.parametrize("dim", [8, 64, 72, 96, 128])
def test_shape_of_a_block(arch, keys, dim):
    """It fits, small heads twice; half as many rows where sequences are short."""
    with cuda_runtime.assume(cuda_runtime.TARGETS[arch]):
        q = torch.empty(16384, 16, dim, dtype=BF16, device="meta")
        found = grad_shape(q, 1, -1, keys)
        blocks = 2 if dim <= 64 else 1
        assert blocks * (found.shared(dim, keys) + 1024) <= cuda_runtime.shared_bytes(q) + 1024
        assert grad_shape(q, 1, 64, keys).atoms == 1 and found.others == ROWS


def test_backward_is_the_ops():
    assert packed_forward.backward is packed.backward
