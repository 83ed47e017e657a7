"""perceiver_attention: the torch backend against the oracle, concatenated keys and transformers' resampler."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import vlmops
from tests.support.ops import check_op, opcheck
from tests.support.packed_attention import cu
from tests.support.tolerance import assert_close_to_oracle
from vlmops.ops import perceiver_attention
from vlmops.ops._shared import dense_attention as dense
from vlmops.ops.perceiver_attention import composition

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def make(lengths, num_latents, heads=2, kv_heads=2, dim=8, latents=True, grad=True):
    n, total = len(lengths) * num_latents, sum(lengths)
    q = torch.randn(n, heads, dim, requires_grad=grad)
    k, v = (torch.randn(total, kv_heads, dim, requires_grad=grad) for _ in range(2))
    own = [torch.randn(n, kv_heads, dim, requires_grad=grad) if latents else None for _ in range(2)]
    return q, k, v, *own, cu(lengths)


def with_strided_latents(lengths, num_latents, heads=2, kv_heads=2, dim=8, grad=True):
    """``make``, with the latents' keys and values out of one wider tensor: other strides than the context's."""
    q, k, v, _, _, cu_context = make(lengths, num_latents, heads, kv_heads, dim, grad=grad)
    wide = torch.randn(len(q), 3, kv_heads, dim)
    own = [wide[:, i].detach().requires_grad_(grad) for i in (0, 2)]
    return q, k, v, *own, cu_context


CASES = {
    "equal": dict(lengths=[20, 20, 20], num_latents=4),
    "ragged": dict(lengths=[5, 33, 0, 17], num_latents=3),
    "many latents": dict(lengths=[7, 20], num_latents=18),
    "no latent keys": dict(lengths=[20, 3, 0], num_latents=4, latents=False),
    "grouped": dict(lengths=[20, 3], num_latents=4, heads=6, kv_heads=2),
    "one key head": dict(lengths=[40], num_latents=17, heads=4, kv_heads=1),
    "one query": dict(lengths=[9, 17], num_latents=1),
    "odd head": dict(lengths=[20, 5], num_latents=3, dim=5),
    "no items": dict(lengths=[], num_latents=4),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_torch_backend(case, dtype):
    shapes = CASES[case]
    check_op(perceiver_attention, make(**shapes), dict(num_latents=shapes["num_latents"]), backend="torch", dtype=dtype)


@given(
    lengths=st.lists(st.integers(0, 20), max_size=4),
    num_latents=st.integers(1, 18),
    groups=st.sampled_from([1, 2]),
    dim=st.integers(1, 9),
    latents=st.booleans(),
    scale=st.none() | st.floats(0.1, 1.0),
)
@settings(max_examples=40, deadline=None)
def test_random_shapes(lengths, num_latents, groups, dim, latents, scale):
    args = make(lengths, num_latents, heads=2 * groups, dim=dim, latents=latents)
    check_op(
        perceiver_attention, args, dict(num_latents=num_latents, scale=scale), backend="torch", dtype=torch.float32
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_merging_is_as_exact_as_concatenating(dtype):
    """Merged in two roundings instead of one: still within twice the error of one SDPA call over [context; latents]."""
    q, k, v, kl, vl, starts = (
        x.to(dtype) if x.is_floating_point() else x for x in make([200] * 3, 16, dim=32, grad=False)
    )

    def items(context, latent):
        return torch.cat((context.unflatten(0, (3, -1)), latent.unflatten(0, (3, -1))), dim=1).transpose(1, 2)

    def concatenated(q, k, v, kl, vl):
        out = F.scaled_dot_product_attention(q.unflatten(0, (3, -1)).transpose(1, 2), items(k, kl), items(v, vl))
        return out.transpose(1, 2).flatten(0, 1)

    oracle = concatenated(*(x.double() for x in (q, k, v, kl, vl)))
    with vlmops.use_backend("torch"):
        out = perceiver_attention(q, k, v, kl, vl, starts, num_latents=16)
    assert_close_to_oracle(out, concatenated(q, k, v, kl, vl), oracle)


@pytest.mark.parametrize("case", CASES)
def test_sync_free_path_agrees(case):
    """What a GPU would run, run here on CPU tensors, with its backward by chunks of queries against all keys."""
    shapes = CASES[case]
    q, k, v, *_, starts = make(**shapes, grad=False)
    n, scale = shapes["num_latents"], q.shape[2] ** -0.5
    out, lse = composition.masked(q, k, v, starts, n, scale)
    want, want_lse = composition._context_cpu(q, k, v, starts, n, scale)
    torch.testing.assert_close(out, want)
    torch.testing.assert_close(lse, want_lse)
    visible = partial(composition.visible_chunk, cu=starts, num_latents=n, tk=k.shape[0])
    grad = torch.randn_like(out)
    rest = (q, k, v, grad, lse, dense.row_delta(grad, None, out))
    segments = composition._context_segments(starts, k.shape[0], n)
    found = dense.attention_backward(*rest, dense.chunked_tiles(q, k, visible), scale)
    expected = dense.attention_backward(*rest, dense.segment_tiles(segments, q.shape[1]), scale)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("norms", [False, True])
def test_against_the_resampler_of_idefics(norms):
    """IdeficsPerceiverAttention with its attention replaced: same weights, same output."""
    from transformers.models.idefics.perceiver import IdeficsPerceiverAttention

    n, context_len, latents, heads, dim = 3, 21, 5, 4, 8
    module = IdeficsPerceiverAttention(embed_dim=16, n_heads=heads, head_dim=dim, qk_layer_norms=norms)
    context, latent = torch.randn(n, context_len, 16), torch.randn(n, latents, 16)
    want = module(context, latent)
    c, x = module.context_layer_norm(context).flatten(0, 1), module.latents_layer_norm(latent).flatten(0, 1)
    q, kc, kl, vc, vl = (
        proj(y).unflatten(1, (heads, dim))
        for proj, y in (
            (module.q_proj, x),
            (module.k_proj, c),
            (module.k_proj, x),
            (module.v_proj, c),
            (module.v_proj, x),
        )
    )
    if norms:
        q, kc, kl = module.q_layer_norm(q), module.k_layer_norm(kc), module.k_layer_norm(kl)
    out = perceiver_attention(q, kc, vc, kl, vl, cu([context_len] * n), num_latents=latents)
    torch.testing.assert_close(module.output_proj(out.flatten(1)).unflatten(0, (n, latents)), want)


def test_gradcheck_of_the_reference():
    *leaves, starts = make([3, 0], 2, heads=2, kv_heads=1, dim=4)
    leaves = [x.detach().double().requires_grad_() for x in leaves]
    with vlmops.use_backend("reference"):
        assert torch.autograd.gradcheck(lambda *a: perceiver_attention(*a, starts, num_latents=2), leaves)


@pytest.mark.parametrize("latents", [True, False])
def test_opcheck(latents):
    opcheck(torch.ops.vlmops.perceiver_attention.default, (*make([5, 20], 3, latents=latents), 3, 0.5, "torch"))


def test_compile_has_no_graph_break():
    q, *rest = make([5, 20], 3)
    call = lambda q: perceiver_attention(q, *rest, num_latents=3).square().sum()  # noqa: E731
    (got,) = torch.autograd.grad(torch.compile(call, fullgraph=True, backend="aot_eager")(q), q)
    (want,) = torch.autograd.grad(call(q), q)
    torch.testing.assert_close(got, want)


def test_autocast_runs_in_low_precision():
    args = make([5, 20], 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = perceiver_attention(*args, num_latents=3)
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    assert all(x.grad.dtype == torch.float32 for x in args[:5])


@pytest.mark.parametrize("place", ["q", "k_context", "v_latent"])
def test_nan_flows_through(place):
    args = dict(
        zip(
            ["q", "k_context", "v_context", "k_latent", "v_latent", "cu_seqlens_context"],
            make([20, 20], 4, grad=False),
            strict=True,
        )
    )
    args[place][1, 0, 2] = float("nan")
    out = perceiver_attention(**args, num_latents=4)
    assert out[1, 0, 2].isnan() and out[4:].isfinite().all() and out[:4, 1].isfinite().all()


BAD = {
    "rank": (lambda a: dict(q=a["q"][0]), "q: expected 3 dimensions"),
    "integer q": (lambda a: dict(q=a["q"].int()), "q: expected a floating-point"),
    "rows of q": (lambda a: dict(q=a["q"][:-1]), r"q: expected shape \[2 items \* 3 latents"),
    "dtype": (lambda a: dict(k_context=a["k_context"].half()), "k_context: expected float32"),
    "heads": (
        lambda a: dict(k_context=a["k_context"][:, :1].expand(-1, 3, -1)),
        "k_context: expected a number of heads",
    ),
    "head_dim 0": (lambda a: dict(q=a["q"][..., :0]), "head_dim >= 1"),
    "v shape": (lambda a: dict(v_context=a["v_context"][:-1]), "v_context: expected shape"),
    "latent shape": (lambda a: dict(k_latent=a["k_latent"][:-1]), "k_latent: expected shape"),
    "latent heads": (lambda a: dict(v_latent=a["v_latent"][:, :1]), "v_latent: expected shape"),
    "one latent only": (lambda a: dict(v_latent=None), "v_latent: expected a tensor exactly where"),
    "device": (lambda a: dict(v_latent=a["v_latent"].to("meta")), "v_latent: expected on cpu"),
    "cu dtype": (
        lambda a: dict(cu_seqlens_context=a["cu_seqlens_context"].float()),
        "cu_seqlens_context: expected int32",
    ),
    "cu falls": (lambda a: dict(cu_seqlens_context=torch.tensor([0, 30, 25])), "monotone"),
    "cu end": (lambda a: dict(cu_seqlens_context=torch.tensor([0, 5, 99])), "end at the number of tokens 25"),
    "num_latents": (lambda a: dict(num_latents=0), "num_latents: expected at least 1"),
    "not a tensor": (lambda a: dict(k_latent=[1.0]), "k_latent: expected a tensor"),
}


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("case", BAD)
def test_bad_input(case, backend):
    names = ["q", "k_context", "v_context", "k_latent", "v_latent", "cu_seqlens_context"]
    args = {**dict(zip(names, make([5, 20], 3, grad=False), strict=True)), "num_latents": 3}
    change, message = BAD[case]
    args.update(change(args))
    with vlmops.use_backend(backend), pytest.raises((ValueError, TypeError), match=message):
        perceiver_attention(**args)
