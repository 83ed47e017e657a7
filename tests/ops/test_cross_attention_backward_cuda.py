"""cross_attention's CUDA backward on the SIMT machine: gradients, any media index, every block, work."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.ops import test_cross_attention
from tests.ops.test_cross_attention import index, problems
from tests.support.attention_gradients import NARROW, force, gradients, low, narrow
from tests.support.cuda_machine import check_on_machine, counted, simt
from tests.support.ops import check_op
from vlmops.ops import cross_attention
from vlmops.ops._shared.cuda_attention_backward import GradShape
from vlmops.ops.cross_attention import cuda_backward as cross

__all__ = ["narrow", "simt"]

BF16 = torch.bfloat16

STORY = index(*[-1] * 10, *[0] * 60, *[1] * 50, *[2] * 30)
SHUFFLED = index(*[(5 * i) % 4 - 1 for i in range(140)])
CROSS = {
    **{name: case for name, case in test_cross_attention.CASES.items() if name != "odd head"},
    "several tiles": (dict(lengths_q=[150], lengths_k=[100, 70, 40], heads=1, kv_heads=1), dict(media_index=STORY)),
    "shuffled": (dict(lengths_q=[140], lengths_k=[100, 70, 40], heads=1, kv_heads=1), dict(media_index=SHUFFLED)),
    "far apart": (dict(lengths_q=[40], lengths_k=[9, 300, 5, 200, 1]), dict(media_index=index(*[0, 2, 4, -1] * 10))),
    "wide ranges": (
        dict(lengths_q=[70], lengths_k=[90, 0, 70, 40], heads=2, kv_heads=1),
        dict(media_index=index(*[[i % 5, max(i % 5, i % 3 + 2)] for i in range(70)])),
    ),
    "int64": (dict(lengths_q=[4], lengths_k=[70, 8]), dict(media_index=torch.tensor([1, -1, 0, 1]))),
    "negative scale": (dict(lengths_q=[5], lengths_k=[18]), dict(scale=-0.3, media_index=index(0, 0, 0, -1, 0))),
    "head 80": (dict(lengths_q=[40], lengths_k=[70], dim=80), dict(media_index=index(*[0, 0, -1, 0] * 10))),
}
CROSS_SCHEDULES = ["ranges", "shuffled", "far apart"]


@pytest.mark.parametrize("case", CROSS)
def test_cross(case):
    shapes, options = CROSS[case]
    options = {**options, "return_lse": True}
    shapes = {"dim": 16, **shapes}
    if case in CROSS_SCHEDULES:
        check_on_machine(cross_attention, test_cross_attention.make(**shapes), options, BF16)
    else:
        check_op(cross_attention, test_cross_attention.make(**shapes), options, backend="cuda", dtype=BF16)


@pytest.mark.parametrize("case", ["shuffled", "wide ranges"])
def test_every_block_of_cross(case, monkeypatch):
    force(monkeypatch, GradShape(2, 32, 16))
    shapes, options = CROSS[case]
    args = test_cross_attention.make(**{"dim": 16, **shapes})
    check_op(cross_attention, args, options, backend="cuda", dtype=BF16)


@given(problem=problems(rows=70, keys=60), groups=st.sampled_from([1, 2]))
@settings(max_examples=15, deadline=None)
def test_any_media_index(problem, groups):
    tq, lengths_k, media_index = problem
    args = test_cross_attention.make([tq], lengths_k, heads=2, kv_heads=2 // groups, dim=16)
    with pytest.MonkeyPatch.context() as patch:
        force(patch, NARROW)
        check_op(cross_attention, args, dict(media_index=media_index, return_lse=True), backend="cuda", dtype=BF16)


def test_what_sees_nothing_and_is_not_seen_gets_exactly_zero():
    media = index(*[0, -1, 2, 2] * 5)
    args = test_cross_attention.make([20], [50, 40, 9], dim=16)
    _, (dq, dk, dv) = gradients(cross_attention, args, dict(media_index=media))
    assert torch.equal((dq == 0).all(-1).all(-1), media < 0)
    for grad in (dk, dv):
        assert (grad[50:90] == 0).all() and grad[:50].any(-1).all() and grad[90:].any(-1).all()


def test_many_tiles_of_rows():
    """More than a warp looks at in one step, most of which see nothing; each is found, in order."""
    media = torch.full((1300,), -1, dtype=torch.int32)
    media[[3, 500, 1024, 1299]] = torch.tensor([1, 0, 1, 0], dtype=torch.int32)
    args = test_cross_attention.make([1300], [5, 3], heads=1, kv_heads=1, dim=16)
    check_op(cross_attention, args, dict(media_index=media), backend="cuda", dtype=BF16)


@pytest.mark.parametrize("media", [index(0, 9, -7, 1), index([-3, 9], [2, 1], [1, 1], [7, 9])])
@pytest.mark.parametrize("values", [[0, 9, 4], [5, 0, 900], [-7, 3, 8]])
def test_malformed_device_data_touches_nothing_else(media, values):
    q, k, v, cu_q, _ = low(test_cross_attention.make([4], [5, 3], dim=16))
    bad, lse = torch.tensor(values, dtype=torch.int32), torch.zeros(2, 4)
    found = cross.backward([q, lse], [q, lse], [q, k, v, cu_q, bad, media, 0.3], [True] * 3)
    assert all(x.isfinite().all() for x in found)


def test_a_segment_that_runs_backwards_has_no_keys():
    q, k, v, cu_q, _ = low(test_cross_attention.make([6], [100], dim=16))
    backwards, lse = torch.tensor([0, 60, 20, 100], dtype=torch.int32), torch.zeros(2, 6)
    media = index(0, 1, 1, 1, 1, 0)
    dq, dk, dv = cross.backward([q, lse], [q, lse], [q, k, v, cu_q, backwards, media, 0.3], [True] * 3)
    assert torch.equal((dq == 0).all(-1).all(-1), media == 1)
    for grad in (dk, dv):
        assert (grad[60:] == 0).all() and grad[:60].any(-1).all()


def test_keys_meet_only_the_tiles_of_rows_that_see_them():
    """Text of two images whose tiles of rows take turns: a tile of keys passes by the other image's."""
    q, k, v, cu_q, cu_k = low(test_cross_attention.make([128], [64, 64], dim=16, heads=2, kv_heads=1))
    media = index(*([0] * 32 + [1] * 32) * 2)
    out, lse = torch.zeros_like(q), torch.zeros(2, 128)
    with counted() as seen:
        cross.backward([q, None], [out, lse], [q, k, v, cu_q, cu_k, media, 0.25], [False, True, True])
    assert seen["mma_flops"] == 2 * 2 * 8 * 64 * 64 * 16  # images, heads, products of 64 keys with 64 rows


def test_keys_between_those_of_a_tile_are_not_visited():
    """Rows of the first and the third image in one tile: the keys of the second pass it by, without a barrier."""
    q, k, v, cu_q, cu_k = low(test_cross_attention.make([32], [64, 64, 64], dim=16, heads=2, kv_heads=1))
    media, lse = index(*[0, 2] * 16), torch.zeros(2, 32)
    with counted() as seen:
        cross.backward([q, None], [q, lse], [q, k, v, cu_q, cu_k, media, 0.25], [False, True, True])
    assert seen["barriers"] == 2 * 2  # images, heads


def test_a_tile_of_rows_passes_by_the_keys_between_its_own():
    """The same of dq: with keys between the two images, and an image without any, a block waits no more often."""
    found = []
    for lengths, media in (([64, 64], [0, 1]), ([64, 64, 64], [0, 2]), ([64, 64, 0, 64, 64], [0, 2, 4, 2])):
        q, k, v, cu_q, cu_k = low(test_cross_attention.make([32], lengths, dim=16, heads=2, kv_heads=1))
        with counted() as seen:
            cross.backward(
                [q, None],
                [q, torch.zeros(2, 32)],
                [q, k, v, cu_q, cu_k, index(*media * 16), 0.25],
                [True, False, False],
            )
        found.append((seen["barriers"], seen["mma_flops"]))
    assert found[0] == found[1] == found[2]
