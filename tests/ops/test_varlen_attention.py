"""varlen_attention: the torch backend and its gradients against the oracle, masks, bad input, registration."""

from __future__ import annotations

import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import vlmops
from tests.support import packed_attention
from tests.support.ops import check_op, opcheck
from vlmops.ops import varlen_attention
from vlmops.ops.varlen_attention.composition import packed_dense

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


make = functools.partial(packed_attention.make, dim=8)


CASES = {
    "ragged": (dict(lengths_q=[5, 1, 0, 9]), {}),
    "causal": (dict(lengths_q=[5, 7]), dict(causal=True)),
    "causal, more keys": (dict(lengths_q=[3, 1], lengths_k=[8, 4]), dict(causal=True)),
    "causal, more queries": (dict(lengths_q=[6, 2], lengths_k=[3, 2]), dict(causal=True)),
    "no keys": (dict(lengths_q=[3, 2], lengths_k=[0, 4]), {}),
    "window": (dict(lengths_q=[9, 4]), dict(window=(2, 1))),
    "left window": (dict(lengths_q=[9]), dict(window=(3, -1))),
    "prefix": (dict(lengths_q=[9, 4]), dict(causal=True, prefix_lens=torch.tensor([4, 0], dtype=torch.int32))),
    "softcap": (dict(lengths_q=[9, 4]), dict(softcap=2.0)),
    "grouped": (dict(lengths_q=[9, 4], heads=4, kv_heads=2), {}),
    "grouped causal": (dict(lengths_q=[9, 4], heads=6, kv_heads=1), dict(causal=True)),
    "equal windows": (dict(lengths_q=[4] * 5, dim=16), {}),
    "scale": (dict(lengths_q=[7]), dict(scale=0.3)),
    "odd head": (dict(lengths_q=[7, 3], dim=5), {}),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_torch_backend(case, dtype):
    shapes, options = CASES[case]
    check_op(varlen_attention, make(**shapes), {**options, "return_lse": True}, backend="torch", dtype=dtype)


@pytest.mark.parametrize("interleaved", [False, True])
def test_rope(interleaved):
    tables = tuple(torch.randn(13, 8) for _ in range(2))
    check_op(
        varlen_attention,
        make([9, 4]),
        dict(rope=tables, rope_interleaved=interleaved),
        backend="torch",
        dtype=torch.float32,
    )


def test_rope_with_own_tables_for_k():
    rope, rope_k = tuple(torch.randn(4, 8) for _ in range(2)), tuple(torch.randn(9, 8) for _ in range(2))
    check_op(
        varlen_attention, make([3, 1], [5, 4]), dict(rope=rope, rope_k=rope_k), backend="torch", dtype=torch.float32
    )


@given(
    lengths=st.lists(st.tuples(st.integers(0, 12), st.integers(0, 12)), max_size=4),
    causal=st.booleans(),
    window=st.none() | st.tuples(st.integers(-1, 5), st.integers(-1, 5)),
    groups=st.sampled_from([1, 2]),
    dim=st.integers(1, 9),
)
@settings(max_examples=40, deadline=None)
def test_random_shapes(lengths, causal, window, groups, dim):
    args = make([a for a, _ in lengths], [b for _, b in lengths], heads=2 * groups, dim=dim)
    check_op(
        varlen_attention,
        args,
        dict(causal=causal, window=window, return_lse=True),
        backend="torch",
        dtype=torch.float32,
    )


@pytest.mark.parametrize("case", CASES)
def test_sync_free_path_agrees(case):
    """What a GPU without a flash kernel would run, run here on CPU tensors."""
    shapes, options = CASES[case]
    q, k, v, cu_q, cu_k = make(**shapes, grad=False)
    left, right = options.get("window", (-1, -1))
    with vlmops.use_backend("reference"):
        want, lse = varlen_attention(q, k, v, cu_q, cu_k, **options, return_lse=True)
    out, got = packed_dense(
        q, k, v, cu_q, cu_k, options.get("scale", q.shape[2] ** -0.5), options.get("causal", False), left, right,
        options.get("prefix_lens"), options.get("softcap", 0.0),
    )  # fmt: skip
    torch.testing.assert_close(out, want)
    torch.testing.assert_close(got, lse)


def test_gradcheck_of_the_reference():
    args = [x.double() if x.is_floating_point() else x for x in make([3, 2, 0], [4, 2, 1], heads=2, kv_heads=1, dim=4)]
    args = [x.detach().requires_grad_() if x.is_floating_point() else x for x in args]
    tables = tuple(torch.randn(5, 4, dtype=torch.float64) for _ in range(2))
    tables_k = tuple(torch.randn(7, 4, dtype=torch.float64) for _ in range(2))
    with vlmops.use_backend("reference"):
        assert torch.autograd.gradcheck(
            lambda q, k, v: varlen_attention(
                q, k, v, args[3], args[4], causal=True, softcap=3.0, rope=tables, rope_k=tables_k
            ),
            args[:3],
        )


@pytest.mark.parametrize("options", [{}, dict(causal=True), dict(softcap=2.0)])
def test_opcheck(options):
    q, k, v, cu_q, cu_k = make([5, 3])
    opcheck(
        torch.ops.vlmops.varlen_attention.default,
        (q, k, v, cu_q, cu_k, -1, -1, 0.5, options.get("causal", False), -1, -1, None, options.get("softcap", 0.0),
         None, None, None, None, False, "torch"),
    )  # fmt: skip


def test_compile_has_no_graph_break():
    q, k, v, cu_q, _ = make([5, 3])
    fn = torch.compile(lambda q: varlen_attention(q, k, v, cu_q).square().sum(), fullgraph=True, backend="aot_eager")
    (got,) = torch.autograd.grad(fn(q), q)
    (want,) = torch.autograd.grad(varlen_attention(q, k, v, cu_q).square().sum(), q)
    torch.testing.assert_close(got, want)


def test_autocast_runs_in_low_precision():
    q, k, v, cu_q, _ = make([5, 3])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = varlen_attention(q, k, v, cu_q)
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    assert q.grad.dtype == torch.float32


def test_nan_flows_through():
    q, k, v, cu_q, _ = make([4, 3], grad=False)
    q[1, 0, 0] = float("nan")
    out = varlen_attention(q, k, v, cu_q)
    assert out[1, 0].isnan().all() and out[4:].isfinite().all()


BAD = {
    "rank": (lambda a: dict(q=a["q"][0]), "q: expected 3 dimensions"),
    "integer q": (lambda a: dict(q=a["q"].int()), "q: expected a floating-point"),
    "dtype": (lambda a: dict(k=a["k"].half()), "k: expected float32"),
    "heads": (lambda a: dict(k=a["k"][:, :1].expand(-1, 3, -1)), "k: expected a number of heads"),
    "no heads": (lambda a: dict(k=a["k"][:, :0], v=a["v"][:, :0]), "k: expected a number of heads"),
    "head_dim 0": (lambda a: dict(q=a["q"][..., :0], k=a["k"][..., :0], v=a["v"][..., :0]), "head_dim >= 1"),
    "v shape": (lambda a: dict(v=a["v"][:-1]), "v: expected shape"),
    "device": (lambda a: dict(k=a["k"].to("meta")), "k: expected on cpu"),
    "cu dtype": (lambda a: dict(cu_seqlens_q=a["cu_seqlens_q"].float()), "cu_seqlens_q: expected int32"),
    "cu empty": (lambda a: dict(cu_seqlens_q=a["cu_seqlens_q"][:0]), "leading 0"),
    "cu start": (lambda a: dict(cu_seqlens_q=torch.tensor([1, 8])), "start at 0"),
    "cu falls": (lambda a: dict(cu_seqlens_q=torch.tensor([0, 9, 8])), "monotone"),
    "cu end": (lambda a: dict(cu_seqlens_q=torch.tensor([0, 7])), "end at the number of tokens 8"),
    "cu past": (lambda a: dict(cu_seqlens_q=torch.tensor([0, 99])), "end at the number of tokens 8"),
    "window": (lambda a: dict(window=(-2, 0)), "window: expected"),
    "rope": (lambda a: dict(rope=(torch.ones(8, 4), torch.ones(8, 8))), "rope cos: expected shape"),
    "prefix": (lambda a: dict(prefix_lens=torch.ones(5, dtype=torch.int32)), "prefix_lens: expected shape"),
    "not a tensor": (lambda a: dict(q=[1.0]), "q: expected a tensor"),
}


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("case", BAD)
def test_bad_input(case, backend):
    q, k, v, cu_q, _ = make([5, 3], grad=False)
    args = dict(q=q, k=k, v=v, cu_seqlens_q=cu_q)
    change, message = BAD[case]
    args.update(change(args))
    with vlmops.use_backend(backend), pytest.raises((ValueError, TypeError), match=message):
        varlen_attention(**args)


def test_forcing_a_backend_that_cannot_run_says_why():
    q, k, v, cu_q, _ = make([2], grad=False)
    with vlmops.use_backend("cuda"), pytest.raises(vlmops.backends.BackendError, match=r"'cuda' cannot run .*float32"):
        varlen_attention(q, k, v, cu_q)
    with vlmops.use_backend("cuda"), pytest.raises(vlmops.backends.BackendError, match="a tensor on the CPU needs"):
        varlen_attention(*(torch.zeros(2, 1, 64, dtype=torch.bfloat16) for _ in range(3)), cu_q)
    with pytest.raises(ValueError, match="unknown backend"), vlmops.use_backend("fast"):
        pass


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_heads_whose_elements_lie_apart(dtype):
    """torch's fused CPU kernel reads every row as if it were dense."""
    q, k, v = (torch.randn(24, 2, 50).to(dtype).permute(2, 1, 0) for _ in range(3))
    cu_seqlens = torch.tensor([0, 20, 50], dtype=torch.int32)
    with vlmops.use_backend("torch"):
        out = varlen_attention(q, k, v, cu_seqlens)
        dense = varlen_attention(q.contiguous(), k.contiguous(), v.contiguous(), cu_seqlens)
    torch.testing.assert_close(out, dense)
