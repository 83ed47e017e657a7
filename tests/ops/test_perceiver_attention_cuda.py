"""perceiver_attention's CUDA kernel on the SIMT machine: parity, every block, split keys, odd shapes, traffic and work."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import vlmops
from tests.ops import test_perceiver_attention
from tests.support.cuda_machine import check_on_machine, counted, simt
from tests.support.ops import check_op, opcheck
from vlmops.backends import cuda_runtime
from vlmops.ops import perceiver_attention
from vlmops.ops._shared.cuda_attention import Shape
from vlmops.ops.perceiver_attention import cuda as backend
from vlmops.ops.perceiver_attention.cost import cost

__all__ = ["simt"]

BF16, FP16 = torch.bfloat16, torch.float16
CASES = {
    **{name: case for name, case in test_perceiver_attention.CASES.items() if name != "odd head"},
    "whole tiles": dict(lengths=[64, 128], num_latents=64, heads=1, kv_heads=1),
    "several tiles": dict(lengths=[150, 70], num_latents=130, heads=1, kv_heads=1),
    "no context": dict(lengths=[0, 0], num_latents=5),
    "no context, no latent keys": dict(lengths=[0, 9], num_latents=5, latents=False),
    "head 24": dict(lengths=[70, 5], num_latents=8, dim=24),
    "head 72": dict(lengths=[70, 5], num_latents=8, dim=72),
    "head 80": dict(lengths=[70, 5], num_latents=8, dim=80),
    "head 96": dict(lengths=[70, 5], num_latents=8, dim=96),
    "head 128": dict(lengths=[40], num_latents=8, dim=128),
    "head 256": dict(lengths=[40], num_latents=8, dim=256, heads=1, kv_heads=1),
}
#: Those run under all three schedules of the machine.
ALL_SCHEDULES = ["ragged", "several tiles", "grouped", "head 72"]


def make(*args, **kwargs):
    """Without gradients, which test_attention_backward_cuda.py has."""
    return test_perceiver_attention.make(*args, **{"grad": False, **kwargs})


def low(args, dtype=BF16):
    return [x.to(dtype) if x is not None and x.is_floating_point() else x for x in args]


def force(monkeypatch, block=None, parts=None):
    if block is not None:
        monkeypatch.setattr(backend, "shape", lambda *_: block)
    if parts is not None:
        monkeypatch.setattr(backend, "parts", lambda *_: parts)


def run(args, num_latents, **options):
    """out and lse of the op."""
    q = args[0]
    return torch.ops.vlmops.perceiver_attention(*args, num_latents, options.get("scale", q.shape[2] ** -0.5), "cuda")


@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("case", CASES)
def test_parity(case, dtype):
    shapes = CASES[case]
    options = dict(num_latents=shapes["num_latents"])
    if case in ALL_SCHEDULES and dtype == BF16:
        check_on_machine(perceiver_attention, make(**shapes), options, dtype=dtype)
    else:
        check_op(perceiver_attention, make(**shapes), options, backend="cuda", dtype=dtype)


@pytest.mark.parametrize("count", [2, 3, 9])
@pytest.mark.parametrize(
    "case", ["equal", "ragged", "several tiles", "no latent keys", "no context", "no items", "head 72"]
)
def test_split_keys(case, count, monkeypatch):
    """Parts that are empty, that have context and latents, that begin between both."""
    force(monkeypatch, Shape(1, 32, 2), count)
    shapes = CASES[case]
    check_on_machine(perceiver_attention, make(**shapes), dict(num_latents=shapes["num_latents"]), BF16)


@pytest.mark.parametrize("count", [1, 3])
def test_latent_keys_of_other_strides(count, monkeypatch):
    force(monkeypatch, Shape(1, 32, 2), count)
    args = test_perceiver_attention.with_strided_latents([40, 3], 50, grad=False)
    assert args[3].stride() != args[1].stride()
    check_op(perceiver_attention, args, dict(num_latents=50), backend="cuda", dtype=BF16)


@pytest.mark.parametrize("block", [Shape(1, 64, 2), Shape(2, 64, 2), Shape(2, 48, 2), Shape(1, 32, 3), Shape(1, 64, 4)],
                         ids=str)  # fmt: skip
def test_every_block(block, monkeypatch):
    force(monkeypatch, block)
    check_on_machine(perceiver_attention, make([150, 0, 70], 70), dict(num_latents=70), BF16)


@given(
    lengths=st.lists(st.integers(0, 100), max_size=3),
    num_latents=st.integers(1, 70),
    groups=st.sampled_from([1, 2]),
    latents=st.booleans(),
    count=st.sampled_from([1, 2, 3]),
    atoms=st.sampled_from([1, 2]),
    scale=st.sampled_from([None, 0.4, 0.0, -0.4]),
)
@settings(max_examples=30, deadline=None)
def test_any_lengths(lengths, num_latents, groups, latents, count, atoms, scale):
    args = make(lengths, num_latents, heads=2, kv_heads=2 // groups, latents=latents)
    with pytest.MonkeyPatch.context() as patch:
        force(patch, Shape(atoms, 32, 2), count)
        check_op(perceiver_attention, args, dict(num_latents=num_latents, scale=scale), backend="cuda", dtype=BF16)


@pytest.mark.parametrize("count", [1, 2])
def test_the_log_sum_exp(count, monkeypatch):
    force(monkeypatch, Shape(1, 32, 2), count)
    args = low(make([40, 0, 3], 5, latents=False))
    out, lse = run(args, 5)
    _, want_lse = torch.ops.vlmops.perceiver_attention(*args, 5, 8**-0.5, "reference")
    torch.testing.assert_close(lse, want_lse, rtol=1e-4, atol=1e-4)
    assert torch.equal(out[5:10], torch.zeros_like(out[5:10])) and (lse[:, 5:10] == -torch.inf).all()


def test_gradients():
    check_op(perceiver_attention, make([20, 3], 4, grad=True), dict(num_latents=4), backend="cuda", dtype=BF16)


def test_strided_heads():
    """Keys and values of one product; and rows that do not start at 16 bytes, which are copied."""
    for width in (24, 25):
        k, v, kl, vl = torch.randn(60, 2, 2, width)[..., :24].unbind(1) + torch.randn(8, 2, 2, width)[..., :24].unbind(
            1
        )
        args = (torch.randn(8, 2, 24), k, v, kl, vl, make([35, 25], 4)[-1])
        check_op(perceiver_attention, args, dict(num_latents=4), backend="cuda", dtype=BF16)


@pytest.mark.parametrize("count", [1, 2])
def test_a_nan_stays_in_its_item(count, monkeypatch):
    force(monkeypatch, Shape(1, 32, 2), count)
    q, k, v, kl, vl, cu = low(make([40, 50, 9], 4))
    v[45], vl[9] = float("nan"), float("nan")
    out, lse = run((q, k, v, kl, vl, cu), 4)
    assert out[:4].isfinite().all() and out[4:].isnan().all() and lse.isfinite().all()
    k[47] = float("nan")
    _, lse = run((q, k, v, kl, vl, cu), 4)
    assert lse[:, 4:8].isnan().all() and lse[:, :4].isfinite().all() and lse[:, 8:].isfinite().all()


@pytest.mark.parametrize("count", [1, 3])
def test_large_scores_do_not_overflow(count, monkeypatch):
    force(monkeypatch, Shape(1, 32, 2), count)
    q, k, *rest = make([90], 4)
    check_op(perceiver_attention, (q * 60, k * 60, *rest), dict(num_latents=4), backend="cuda", dtype=BF16)


def test_two_runs_agree_to_the_bit(monkeypatch):
    force(monkeypatch, Shape(1, 32, 2), 3)
    args = low(make([100, 40], 6, dim=24))
    from vlmops.backends import cuda_simt

    found = []
    for name in cuda_simt.SCHEDULES:
        with cuda_simt.schedule(name, seed=3):
            found.append(run(args, 6)[0])
    assert all(torch.equal(found[0], other) for other in found)


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("values", [[0, 9, 4], [5, 0, 900], [-7, 3, 8]])
def test_a_malformed_cu_seqlens_touches_nothing_else(values, count, monkeypatch):
    """A GPU does not look at the values: whatever they are, no access leaves the tensors (the machine looks)."""
    force(monkeypatch, Shape(1, 32, 2), count)
    *args, _ = low(make([4, 4], 3))
    bad = torch.tensor(values, dtype=torch.int32)
    with vlmops.use_backend("cuda"), pytest.raises(ValueError, match="cu_seqlens_context: expected to"):
        perceiver_attention(*args, bad, num_latents=3)
    monkeypatch.setattr(backend, "cu_seqlens_list", lambda *_: None)
    with vlmops.use_backend("cuda"):
        assert perceiver_attention(*args, bad, num_latents=3).isfinite().all()


@pytest.mark.parametrize(("dim", "dtype", "why"), [(20, BF16, "a multiple of 8"), (264, BF16, "at most 256"),
                                                    (16, torch.float32, "float32")])  # fmt: skip
def test_what_it_refuses(dim, dtype, why):
    with vlmops.use_backend("cuda"), pytest.raises(vlmops.backends.BackendError, match=why):
        perceiver_attention(*low(make([4], 2, dim=dim), dtype), num_latents=2)


@pytest.mark.parametrize(
    ("dim", "latents"), [(64, True), (64, False), (72, True), (80, True), (96, True), (128, False)]
)
def test_traffic_and_work_are_the_least(dim, latents):
    args = low(make([256, 192], 64, dim=dim, latents=latents, kv_heads=1))
    with counted() as seen:
        perceiver_attention(*args, num_latents=64)
    least = cost(*args, 64, 1.0, block_q=64)
    moved = seen["global_load_bytes"] + seen["global_store_bytes"]
    assert least.bytes <= moved <= 1.01 * least.bytes + 4 * 128 * 2 * 4  # every lane's reads of cu_seqlens
    straddle = 1.13 if dim % 16 else 1.0  # a row of 72 elements touches one sector more
    assert 32 * (seen["global_load_sectors"] + seen["global_store_sectors"]) <= 1.05 * straddle * least.bytes
    assert seen["shared_wavefronts"] <= 1.05 * seen["shared_wavefronts_least"]
    assert least.flops <= seen["mma_flops"] <= (1.12 if dim % 16 else 1.0) * least.flops


@pytest.mark.parametrize("dim", [64, 72])
def test_traffic_of_split_keys(dim, monkeypatch):
    """The forward reads and works as much as without; parts are written once and read once, in whole sectors."""
    force(monkeypatch, Shape(1, 64, 2), 2)
    args = low(make([256], 64, dim=dim))
    with counted() as seen:
        perceiver_attention(*args, num_latents=64)
    least, parts = cost(*args, 64, 1.0, block_q=64), 2 * 2 * 64 * (dim + 1) * 4
    more = 64 * dim * 2 * 2  # the second part reads the queries again
    moved = seen["global_load_bytes"] + seen["global_store_bytes"]
    lse = 2 * 2 * 64 * 2 * 4 * (dim // 4)  # both of a row's, twice, for every thread of it
    assert moved <= 1.01 * (least.bytes + 2 * parts + more) + lse + 8 * 128 * 4
    scattered = 32 * 5 * 2 * (64 * dim // 64)  # a sector for each lse of a warp's rows
    sectors = 32 * (seen["global_load_sectors"] + seen["global_store_sectors"])
    assert sectors <= 1.05 * (1.13 if dim % 16 else 1.0) * (least.bytes + 2 * parts + more) + scattered
    assert seen["shared_wavefronts"] <= 1.05 * seen["shared_wavefronts_least"]
    assert least.flops <= seen["mma_flops"] <= (1.12 if dim % 16 else 1.0) * least.flops


def test_a_warp_without_latents_does_no_work():
    with counted() as seen:
        perceiver_attention(*low(make([64, 64], 8, dim=64, latents=False)), num_latents=8)
    assert seen["mma_flops"] == 2 * 2 * 4 * 16 * 64 * 64


@pytest.mark.parametrize(("arch", "items", "latents", "tokens", "count"), [
    ("sm_80", 1, 64, 4096, 13), ("sm_90a", 1, 64, 4096, 16), ("sm_80", 1, 64, 400, 1), ("sm_80", 2, 64, 400, 1),
    ("sm_80", 4, 64, 16384, 3), ("sm_80", 16, 64, 65536, 1), ("sm_89", 1, 1, 1 << 20, 17), ("sm_89", 1, 300, 1 << 20, 3),
])  # fmt: skip
def test_how_often_keys_are_split(arch, items, latents, tokens, count):
    """As often as fills two blocks a processor, where every part has four tiles: from shapes alone."""
    q = torch.empty(items * latents, 16, 64, dtype=BF16, device="meta")
    k = torch.empty(tokens, 16, 64, dtype=BF16, device="meta")
    cu = torch.empty(items + 1, dtype=torch.int32, device="meta")
    with cuda_runtime.record(cuda_runtime.TARGETS[arch]) as plans:
        backend.forward(q, k, k, None, None, cu, latents, 0.125)
    assert plans[0].grid[2] == count and len(plans) == 1 + (count > 1)
    assert plans[0].shared <= cuda_runtime.TARGETS[arch].shared // 2


def test_opcheck():
    q, k, v, kl, vl, cu = low(make([9, 3], 4))
    leaves = [x.requires_grad_() for x in (q, k, v, kl, vl)]
    opcheck(torch.ops.vlmops.perceiver_attention.default, (*leaves, cu, 4, 0.5, "cuda"))
