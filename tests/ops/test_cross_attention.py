"""cross_attention: the torch backend and its gradients against the oracle and the dense masks of transformers."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import vlmops
from tests.support.ops import check_op, opcheck
from tests.support.packed_attention import cu
from vlmops.ops import cross_attention
from vlmops.ops.cross_attention import composition

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def index(*values):
    return torch.tensor(values, dtype=torch.int32)


def make(lengths_q, lengths_k, heads=2, kv_heads=2, dim=8, grad=True):
    q = torch.randn(sum(lengths_q), heads, dim, requires_grad=grad)
    k, v = (torch.randn(sum(lengths_k), kv_heads, dim, requires_grad=grad) for _ in range(2))
    return q, k, v, cu(lengths_q), cu(lengths_k)


CASES = {
    "sequence i, segment i": (dict(lengths_q=[5, 1, 0, 3], lengths_k=[20, 4, 2, 0]), {}),
    "runs": (dict(lengths_q=[7], lengths_k=[20, 3]), dict(media_index=index(-1, -1, 0, 0, 0, 1, 1))),
    "out of order": (dict(lengths_q=[4, 3], lengths_k=[20, 3, 18]), dict(media_index=index(2, 0, 2, -1, 1, 0, 2))),
    "nothing seen": (dict(lengths_q=[3], lengths_k=[4]), dict(media_index=index(-1, -1, -1))),
    "no segments": (dict(lengths_q=[3], lengths_k=[]), dict(media_index=index(-1, -1, -1))),
    "empty segment": (dict(lengths_q=[3], lengths_k=[4, 0]), dict(media_index=index(1, 0, 1))),
    "ranges": (
        dict(lengths_q=[5], lengths_k=[17, 3, 6]),
        dict(media_index=index([0, 1], [0, 3], [1, 3], [2, 2], [0, 3])),
    ),
    "grouped": (dict(lengths_q=[5, 2], lengths_k=[20, 4], heads=4), dict(media_index=index(0, 0, -1, 1, 1, 1, 0))),
    "one key head": (dict(lengths_q=[6], lengths_k=[33], heads=6, kv_heads=1), {}),
    "scale": (dict(lengths_q=[5], lengths_k=[18]), dict(scale=0.3)),
    "odd head": (dict(lengths_q=[5, 4], lengths_k=[18, 3], dim=5), {}),
    "no queries": (dict(lengths_q=[0], lengths_k=[18]), {}),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_torch_backend(case, dtype):
    shapes, options = CASES[case]
    check_op(cross_attention, make(**shapes), {**options, "return_lse": True}, backend="torch", dtype=dtype)


@st.composite
def problems(draw, rows=9, keys=20):
    lengths_k = draw(st.lists(st.integers(0, keys), max_size=4))
    tq = draw(st.integers(0, rows))
    if draw(st.booleans()):
        seen = [draw(st.integers(-1, len(lengths_k) - 1)) for _ in range(tq)]
        return tq, lengths_k, torch.tensor(seen, dtype=torch.int32)
    seen = [sorted((draw(st.integers(0, len(lengths_k))), draw(st.integers(0, len(lengths_k))))) for _ in range(tq)]
    return tq, lengths_k, torch.tensor(seen, dtype=torch.int32).reshape(tq, 2)


@given(problem=problems(), groups=st.sampled_from([1, 2]), dim=st.integers(1, 9))
@settings(max_examples=40, deadline=None)
def test_random_media(problem, groups, dim):
    tq, lengths_k, media_index = problem
    args = make([tq], lengths_k, heads=2 * groups, dim=dim)
    check_op(
        cross_attention, args, dict(media_index=media_index, return_lse=True), backend="torch", dtype=torch.float32
    )


@pytest.mark.parametrize("case", CASES)
def test_sync_free_path_agrees(case):
    """What a GPU would run, run here on CPU tensors."""
    shapes, options = CASES[case]
    q, k, v, cu_q, cu_k = make(**shapes, grad=False)
    with vlmops.use_backend("reference"):
        want, lse = cross_attention(q, k, v, cu_q, cu_k, **options, return_lse=True)
    out, got = composition.masked(
        q, k, v, cu_q, cu_k, options.get("media_index"), options.get("scale", q.shape[2] ** -0.5)
    )
    torch.testing.assert_close(out, want)
    torch.testing.assert_close(got, lse)


def test_sync_free_visibility_matches_the_grouping():
    media_index = index(2, 0, 2, -1, 1, 0, 2)
    cu_k = cu([20, 3, 18])
    begin, end = composition.key_ranges(media_index, cu_k)
    visible = composition.visible_chunk(0, 7, begin=begin, end=end, tk=41)
    order, segments = composition.query_runs(media_index, cu_k, 41)
    seen = torch.zeros(7, 41, dtype=torch.bool)
    for s in segments:
        seen[order[s.q0 : s.q1, None], torch.arange(s.k0, s.k1)] = True
    assert torch.equal(seen, visible)


def test_a_number_past_the_segments_is_clamped_without_a_host():
    begin, end = composition.key_ranges(index(7, -3), cu([4, 2]))
    assert begin.tolist() == [4, 0] and end.tolist() == [6, 0]
    begin, end = composition.key_ranges(index([1, 9], [2, 1]), cu([4, 2]))
    assert begin.tolist() == [4, 0] and end.tolist() == [6, 0]


def test_text_before_the_first_image_is_exactly_zero():
    q, k, v, cu_q, cu_k = make([4], [18, 20])
    out = cross_attention(q, k, v, cu_q, cu_k, media_index=index(-1, -1, 0, 1))
    assert torch.equal(out[:2], torch.zeros_like(out[:2])) and bool((out[2:] != 0).any())
    (dq,) = torch.autograd.grad(out.sum(), q)
    assert torch.equal(dq[:2], torch.zeros_like(dq[:2]))


def test_against_the_dense_mask_of_idefics():
    """IdeficsModel's own image_attention_mask -> additive mask, and its gate that zeroes rows without an image."""
    from transformers.models.idefics.modeling_idefics import eager_attention_forward

    heads, dim, image_len = 4, 16, 17
    q, k, v, cu_q, cu_k = make([6, 6], [image_len] * 4, heads=heads, kv_heads=heads, dim=dim, grad=False)
    seen = index(-1, 0, 0, 1, 1, 1, -1, -1, 2, 2, 3, 3)  # numbers over the batch: two images a text
    mask = torch.zeros(2, 6, 2)
    for row, image in enumerate(seen.tolist()):
        if image >= 0:
            mask[row // 6, row % 6, image % 2] = 1.0
    dense = mask[..., None].expand(2, 6, 2, image_len).reshape(2, 6, -1)
    additive = torch.where(dense[:, None].bool(), 0.0, torch.finfo(torch.float32).min)
    gate = (additive == 0.0).any(dim=-1).float().squeeze(1)

    class Owner(torch.nn.Module):
        num_key_value_groups = 1

    batch = (x.unflatten(0, (2, -1)).transpose(1, 2) for x in (q, k, v))
    want, _ = eager_attention_forward(Owner().eval(), *batch, additive, scaling=dim**-0.5, dropout=0.0)
    want = want.masked_fill((gate == 0)[:, :, None, None], 0.0).flatten(0, 1)
    torch.testing.assert_close(cross_attention(q, k, v, cu_q, cu_k, media_index=seen), want)


def test_gradcheck_of_the_reference():
    q, k, v, cu_q, cu_k = make([4], [3, 2], heads=2, kv_heads=1, dim=4)
    leaves = [x.detach().double().requires_grad_() for x in (q, k, v)]
    with vlmops.use_backend("reference"):
        assert torch.autograd.gradcheck(
            lambda q, k, v: cross_attention(q, k, v, cu_q, cu_k, media_index=index(1, -1, 0, 1), return_lse=False),
            leaves,
        )


@pytest.mark.parametrize("media_index", [None, index(1, 0, 1, 1, 0), index([0, 1], [0, 2], [1, 1], [1, 2], [0, 2])])
def test_opcheck(media_index):
    q, k, v, cu_q, cu_k = make([3, 2], [4, 5])
    opcheck(torch.ops.vlmops.cross_attention.default, (q, k, v, cu_q, cu_k, media_index, 0.5, "torch"))


def test_compile_has_no_graph_break():
    q, k, v, cu_q, cu_k = make([3, 2], [4, 5])
    call = lambda q: cross_attention(q, k, v, cu_q, cu_k, media_index=index(1, 0, 1, 1, 0)).square().sum()  # noqa: E731
    (got,) = torch.autograd.grad(torch.compile(call, fullgraph=True, backend="aot_eager")(q), q)
    (want,) = torch.autograd.grad(call(q), q)
    torch.testing.assert_close(got, want)


def test_autocast_runs_in_low_precision():
    q, k, v, cu_q, cu_k = make([3, 2], [4, 5])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = cross_attention(q, k, v, cu_q, cu_k)
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    assert q.grad.dtype == k.grad.dtype == torch.float32


def test_nan_reaches_only_those_who_see_it():
    q, k, v, cu_q, cu_k = make([4], [18, 20], grad=False)
    q[0, 0, 0] = v[20, 1, 2] = float("nan")  # key 20 is in segment 1
    for backend in ("torch", "reference"):
        with vlmops.use_backend(backend):
            out = cross_attention(q, k, v, cu_q, cu_k, media_index=index(0, 0, 1, -1))
        assert (
            out[0, 0].isnan().all() and out[1].isfinite().all() and out[2, 1, 2].isnan() and bool((out[3] == 0).all())
        )


def test_strided_inputs():
    qkv = torch.randn(9, 3, 2, 8)
    q, k, v = qkv.unbind(1)
    out = cross_attention(q, k, v, cu([5, 4]), cu([6, 3]))
    torch.testing.assert_close(out, cross_attention(*(x.contiguous() for x in (q, k, v)), cu([5, 4]), cu([6, 3])))


BAD = {
    "rank": (lambda a: dict(q=a["q"][0]), "q: expected 3 dimensions"),
    "integer q": (lambda a: dict(q=a["q"].int()), "q: expected a floating-point"),
    "dtype": (lambda a: dict(k=a["k"].half()), "k: expected float32"),
    "heads": (lambda a: dict(k=a["k"][:, :1].expand(-1, 3, -1)), "k: expected a number of heads"),
    "head_dim 0": (lambda a: dict(q=a["q"][..., :0], k=a["k"][..., :0], v=a["v"][..., :0]), "head_dim >= 1"),
    "v shape": (lambda a: dict(v=a["v"][:-1]), "v: expected shape"),
    "device": (lambda a: dict(k=a["k"].to("meta")), "k: expected on cpu"),
    "cu dtype": (lambda a: dict(cu_seqlens_k=a["cu_seqlens_k"].float()), "cu_seqlens_k: expected int32"),
    "cu_k end": (lambda a: dict(cu_seqlens_k=torch.tensor([0, 4, 8])), "cu_seqlens_k: expected to end at"),
    "cu_q end": (lambda a: dict(cu_seqlens_q=torch.tensor([0, 99])), "cu_seqlens_q: expected to end at"),
    "numbers needed": (lambda a: dict(media_index=None), "media_index: needed where"),
    "media shape": (lambda a: dict(media_index=a["media_index"][:-1]), r"media_index: expected \[5\]"),
    "media dtype": (lambda a: dict(media_index=a["media_index"].float()), "media_index: expected int32"),
    "media past the end": (lambda a: dict(media_index=index(0, 1, 2, 0, 0)), "segment number below 2"),
    "media below -1": (lambda a: dict(media_index=index(0, 1, -2, 0, 0)), "segment number below 2"),
    "range past the end": (lambda a: dict(media_index=index([0, 3]).expand(5, 2)), "half-open ranges of the 2"),
    "range falls": (lambda a: dict(media_index=index([2, 1]).expand(5, 2)), "half-open ranges of the 2"),
    "not a tensor": (lambda a: dict(media_index=[0, 1]), "media_index: expected a tensor"),
}


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("case", BAD)
def test_bad_input(case, backend):
    q, k, v, cu_q, cu_k = make([5], [4, 5], grad=False)
    args = dict(q=q, k=k, v=v, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, media_index=index(0, 0, 1, 1, -1))
    change, message = BAD[case]
    args.update(change(args))
    with vlmops.use_backend(backend), pytest.raises((ValueError, TypeError), match=message):
        cross_attention(**args)


def test_forcing_a_backend_it_does_not_have_says_which_it_has():
    with (
        vlmops.use_backend("cpu"),
        pytest.raises(vlmops.backends.BackendError, match=r"no backend 'cpu'; it has .*triton"),
    ):
        cross_attention(*make([2], [3], grad=False))
