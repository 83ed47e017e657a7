"""perceiver_attention's CUDA backward on the SIMT machine: gradients of both sources, odd shapes, work."""

from __future__ import annotations

import pytest
import torch

import vlmops
from tests.ops import test_perceiver_attention
from tests.support.attention_gradients import clamped, low, narrow
from tests.support.cuda_machine import check_on_machine, counted, simt
from tests.support.ops import check_op
from vlmops.ops import perceiver_attention
from vlmops.ops.perceiver_attention import cuda_backward as perceiver
from vlmops.ops.perceiver_attention.cost import cost as perceiver_cost

__all__ = ["narrow", "simt"]

BF16 = torch.bfloat16

PERCEIVER = {
    **{name: case for name, case in test_perceiver_attention.CASES.items() if name != "odd head"},
    "several tiles": dict(lengths=[150, 70], num_latents=130, heads=1, kv_heads=1),
    "no context": dict(lengths=[0, 0], num_latents=5),
    "no keys": dict(lengths=[0, 9], num_latents=5, latents=False),
    "head 80": dict(lengths=[70, 5], num_latents=8, dim=80),
}


@pytest.mark.parametrize("case", PERCEIVER)
def test_perceiver(case):
    shapes = {"dim": 16, **PERCEIVER[case]}
    args, options = test_perceiver_attention.make(**shapes), dict(num_latents=shapes["num_latents"])
    if case in ("ragged", "several tiles"):
        check_on_machine(perceiver_attention, args, options, BF16)
    else:
        check_op(perceiver_attention, args, options, backend="cuda", dtype=BF16)


@pytest.mark.parametrize("wanted", range(5))
def test_one_gradient_of_perceiver(wanted):
    args = test_perceiver_attention.make([20, 3], 4, dim=16, grad=False)
    args[wanted].requires_grad_()
    check_op(perceiver_attention, args, dict(num_latents=4), backend="cuda", dtype=BF16)


def test_latent_keys_of_other_strides():
    args = test_perceiver_attention.with_strided_latents([40, 3], 50, dim=16)
    check_op(perceiver_attention, args, dict(num_latents=50), backend="cuda", dtype=BF16)


@pytest.mark.parametrize("values", [[0, 9, 4], [5, 0, 900], [-7, 3, 8]])
def test_a_malformed_context_touches_nothing_else(values):
    q, k, v, kl, vl, _ = low(test_perceiver_attention.make([4, 4], 3, dim=16))
    args = [q, k, v, kl, vl, torch.tensor(values, dtype=torch.int32), 3, 0.3]
    clamped(lambda: perceiver.backward([q, None], [q, torch.zeros(2, 6)], args, [True] * 5))


def test_a_nan_stays_in_its_item():
    q, k, v, kl, vl, cu_context = low(test_perceiver_attention.make([40, 50], 4, dim=16))
    v[45], kl[5] = float("nan"), float("nan")
    leaves = [x.requires_grad_() for x in (q, k, v, kl, vl)]
    with vlmops.use_backend("cuda"):
        perceiver_attention(*leaves, cu_context, num_latents=4).sum().backward()
    for x, rows in zip(leaves, (4, 40, 40, 4, 4), strict=True):
        assert x.grad[:rows].isfinite().all()
    assert q.grad[4:].isnan().any() and kl.grad[4:].isnan().any()


@pytest.mark.parametrize("latents", [True, False])
def test_work_of_perceiver_is_the_least(latents):
    args = low(test_perceiver_attention.make([96, 64], 64, dim=16, latents=latents, kv_heads=1))
    q = args[0]
    with counted() as seen:
        perceiver.backward([q, None], [q, torch.zeros(2, q.shape[0])], [*args, 64, 0.25], [True] * 5)
    dense = perceiver_cost(*args, 64, 0.25).flops
    assert dense * 3.5 <= seen["mma_flops"] <= 1.1 * dense * 3.5
    assert seen["shared_wavefronts"] <= 1.05 * seen["shared_wavefronts_least"]


def test_warps_without_rows_do_nothing():
    """16 latents are one warp's of the four in a block."""
    args = low(test_perceiver_attention.make([96], 16, dim=16, heads=1, kv_heads=1, latents=False))
    q = args[0]
    with counted() as seen:
        perceiver.backward([q, None], [q, torch.zeros(1, 16)], [*args, 16, 0.25], [True] + [False] * 4)
    assert seen["mma_flops"] == 3 * 2 * 16 * 96 * 16  # scores, their gradient, dq
