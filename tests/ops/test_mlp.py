"""mlp: every backend and gradient against the oracle, its surroundings, transformers' own layers, bad input."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import vlmops
from tests.support.ops import check_op, opcheck
from vlmops.backends import native
from vlmops.ops import mlp
from vlmops.ops._shared.activations import ACTIVATIONS, activate

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def norm_of(x, norm):
    if norm is None:
        return x
    kind, weight, bias, eps = norm
    if kind == "layer_norm":
        return nn.functional.layer_norm(x, x.shape[-1:], weight, bias, eps)
    return nn.functional.rms_norm(x, x.shape[-1:], weight, eps)


def plain(x, w1, b1, w2, b2, *, activation, w_gate=None, b_gate=None, residual=None, norm=None, mid_norm=None,
          layer_scale=None):  # fmt: skip
    """What a model's own code computes, differentiated by autograd."""
    x, linear = norm_of(x, norm), nn.functional.linear
    h = (
        activate(linear(x, w1, b1), activation)
        if w_gate is None
        else activate(linear(x, w_gate, b_gate), activation) * linear(x, w1, b1)
    )
    y = linear(norm_of(h, mid_norm), w2, b2)
    y = y if layer_scale is None else y * layer_scale
    return y if residual is None else residual + y


def make(rows=(5,), c=32, h=64, n=48, biases=True, grad=False, wide=1):
    def leaf(*shape, scale=1.0):
        return (torch.randn(*shape) * scale).requires_grad_(grad)

    return (leaf(*rows, c), leaf(h, c * wide, scale=0.2), leaf(h) if biases else None, leaf(n, h, scale=0.2),
            leaf(n) if biases else None)  # fmt: skip


def extras(name, grad=False, rows=(8,), c=32, h=64, n=48, wide=1):
    def leaf(*shape, scale=1.0):
        return (torch.randn(*shape) * scale).requires_grad_(grad)

    return {
        "plain": {},
        "gated": dict(w_gate=leaf(h, c * wide, scale=0.2), b_gate=leaf(h)),
        "gated, no bias": dict(w_gate=leaf(h, c * wide, scale=0.2)),
        "residual": dict(residual=leaf(*rows, n)),
        "layer_norm": dict(norm=("layer_norm", leaf(c), leaf(c), 1e-5)),
        "rms_norm": dict(norm=("rms_norm", leaf(c), None, 1e-6)),
        "mid_norm": dict(mid_norm=("layer_norm", leaf(h), leaf(h), 1e-5)),
        "everything": dict(
            w_gate=leaf(h, c * wide, scale=0.2),
            b_gate=leaf(h),
            norm=("layer_norm", leaf(c), leaf(c), 1e-5),
            mid_norm=("rms_norm", leaf(h), None, 1e-6),
            layer_scale=leaf(n),
            residual=leaf(*rows, n),
        ),
        "layer_scale": dict(layer_scale=leaf(n), residual=leaf(*rows, n)),
    }[name]


EXTRAS = [
    "plain",
    "gated",
    "gated, no bias",
    "residual",
    "layer_norm",
    "rms_norm",
    "mid_norm",
    "layer_scale",
    "everything",
]


@pytest.mark.parametrize("backend", ["torch", "cpu"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(backend, dtype, activation):
    check_op(mlp, make((8,)), dict(activation=activation), backend=backend, dtype=dtype, lowprec=plain)


@pytest.mark.parametrize("backend", ["torch", "cpu"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", EXTRAS)
def test_surroundings(backend, dtype, name):
    args, kwargs = make((8,), biases=name != "gated, no bias"), dict(activation="silu", **extras(name))
    check_op(mlp, args, kwargs, backend=backend, dtype=dtype, lowprec=plain)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", EXTRAS)
def test_gradients(name, dtype):
    kwargs = dict(activation="gelu", **extras(name, True))
    check_op(mlp, make((8,), grad=True), kwargs, backend="torch", dtype=dtype, lowprec=plain)
    check_op(mlp, make((8,), grad=True), kwargs, backend="torch", dtype=torch.float64, lowprec="reference")


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("gated", [False, True])
def test_gradients_of_every_activation(activation, gated):
    kwargs = dict(activation=activation, **extras("gated" if gated else "plain", True))
    for dtype, lowprec in ((torch.float32, plain), (torch.float64, "reference")):
        check_op(mlp, make((2, 5), biases=not gated, grad=True), kwargs, backend="torch", dtype=dtype, lowprec=lowprec)


@pytest.mark.parametrize("name", ["plain", "gated", "layer_norm", "everything"])
def test_each_gradient_alone(name):
    """A gradient that is wanted alone equals the one that is wanted among all."""
    args, kwargs = make((8,), grad=True), dict(activation="silu", **extras(name, True))
    leaves = [t for t in (*args, *kwargs.values(), *(p for v in kwargs.values() if isinstance(v, tuple) for p in v))
              if isinstance(t, torch.Tensor)]  # fmt: skip
    together = torch.autograd.grad(mlp(*args, **kwargs).square().sum(), leaves)
    for leaf, want in zip(leaves, together, strict=True):
        for other in leaves:
            other.requires_grad_(other is leaf)
        (got,) = torch.autograd.grad(mlp(*args, **kwargs).square().sum(), [leaf])
        torch.testing.assert_close(got, want)


def test_gradients_of_gathers():
    check_op(mlp, make((8,), wide=4, grad=True), dict(activation="gelu", gather="merge2x2", **extras("layer_norm", True)),
             backend="torch", dtype=torch.float64, lowprec="reference")  # fmt: skip
    check_op(mlp, make((2, 24), wide=4, grad=True), dict(activation="gelu", gather=("pixel_shuffle", 4, 6)),
             backend="torch", dtype=torch.float64, lowprec="reference")  # fmt: skip


@pytest.mark.parametrize("backend", ["torch", "cpu"])
def test_gathers(backend):
    check_op(
        mlp,
        make((8,), wide=4),
        dict(activation="gelu", gather="merge2x2", **extras("layer_norm")),
        backend=backend,
        dtype=torch.float32,
    )
    check_op(
        mlp,
        make((2, 24), wide=4),
        dict(activation="gelu", gather=("pixel_shuffle", 4, 6)),
        backend=backend,
        dtype=torch.float32,
    )


def test_pixel_shuffle_is_transformers_own_order():
    from transformers.models.internvl.modeling_internvl import InternVLModel

    from vlmops.ops.mlp.layout import gather_rows

    x = torch.randn(2, 36, 5)
    want = InternVLModel.pixel_shuffle(None, x.view(2, 6, 6, 5), scale_factor=0.5)
    torch.testing.assert_close(gather_rows(x, "pixel_shuffle", 6, 6), want.reshape(2, 9, 20))


def test_pixel_shuffle_is_idefics3_order_too():
    from transformers.models.idefics3.modeling_idefics3 import Idefics3Connector

    from vlmops.ops.mlp.layout import gather_rows

    x = torch.randn(2, 36, 5)
    torch.testing.assert_close(gather_rows(x, "pixel_shuffle", 6, 6), Idefics3Connector.pixel_shuffle(None, x, 2))


def test_equals_qwens_merger():
    from transformers.models.qwen2_vl.modeling_qwen2_vl import PatchMerger

    merger = PatchMerger(dim=48, context_dim=32)
    x, (first, _, second) = torch.randn(24, 32), merger.mlp
    norm = ("layer_norm", merger.ln_q.weight, merger.ln_q.bias, merger.ln_q.eps)
    out = mlp(x, first.weight, first.bias, second.weight, second.bias, activation="gelu", norm=norm, gather="merge2x2")
    torch.testing.assert_close(out, merger(x))


def test_chunks_agree_with_the_whole(monkeypatch):
    from vlmops.ops.mlp import cpu

    monkeypatch.setattr(cpu, "CHUNK_BYTES", 1)
    monkeypatch.setattr(cpu, "LEAST_ROWS", 100)
    for dtype in DTYPES:
        for kwargs in ({}, extras("everything", rows=(250,))):
            check_op(
                mlp, make((250,)), dict(activation="quick_gelu", **kwargs), backend="cpu", dtype=dtype, lowprec=plain
            )


@pytest.mark.parametrize("dtype", DTYPES)
def test_without_a_compiler(monkeypatch, dtype):
    monkeypatch.setattr(native, "available", lambda: False)
    check_op(
        mlp,
        make((8,)),
        dict(activation="quick_gelu", **extras("everything")),
        backend="cpu",
        dtype=dtype,
        lowprec=plain,
    )


def test_autocast():
    args = make(grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = mlp(*args, activation="gelu")
        with torch.no_grad(), vlmops.use_backend("cpu"):
            torch.testing.assert_close(mlp(*args, activation="gelu"), out.detach(), atol=0.1, rtol=0.05)
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    assert all(a.grad.dtype == torch.float32 for a in args)


@given(
    rows=st.lists(st.integers(0, 4), max_size=3), c=st.integers(1, 33), h=st.integers(1, 33), n=st.integers(1, 33),
    biases=st.booleans(), gated=st.booleans(),
)  # fmt: skip
@settings(max_examples=40, deadline=None)
def test_random_shapes(rows, c, h, n, biases, gated):
    args = make(rows, c, h, n, biases)
    kwargs = dict(activation="silu", w_gate=torch.randn(h, c) if gated else None)
    for backend in ["torch", *(["cpu"] if args[0].numel() and min(c, h, n) >= 16 else [])]:
        check_op(mlp, args, kwargs, backend=backend, dtype=torch.float32, lowprec=plain)


def test_gradcheck_of_the_reference():
    args = [a.detach().double().requires_grad_() for a in make((3,), 3, 4, 2)]
    gate = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    norm = torch.randn(3, dtype=torch.float64, requires_grad=True)
    with vlmops.use_backend("reference"):
        assert torch.autograd.gradcheck(
            lambda *a: mlp(*a[:5], activation="silu", w_gate=a[5], norm=("rms_norm", a[6], None, 1e-6)),
            (*args, gate, norm),
        )


def test_opcheck():
    x, w1, b1, w2, b2 = make(grad=True)
    none = [None] * 2
    opcheck(
        torch.ops.vlmops.mlp.default,
        (x, w1, b1, w2, b2, *none, "gelu", None, "", *none, 0.0, "", *none, 0.0, None, "", 0, 0, False, "torch"),
    )


def test_compile_has_no_graph_break():
    args = make(grad=True)
    fn = torch.compile(lambda *a: mlp(*a, activation="gelu").square().sum(), fullgraph=True, backend="aot_eager")
    got = torch.autograd.grad(fn(*args), args)
    want = torch.autograd.grad(mlp(*args, activation="gelu").square().sum(), args)
    torch.testing.assert_close(got, want)


def test_equals_the_llava_projector():
    from transformers import LlavaConfig
    from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

    config = LlavaConfig(
        vision_config=dict(model_type="clip_vision_model", hidden_size=32, num_attention_heads=4),
        text_config=dict(model_type="llama", hidden_size=48, num_attention_heads=4),
    )
    projector = LlavaMultiModalProjector(config)
    x = torch.randn(3, 32)
    first, second = projector.linear_1, projector.linear_2
    assert isinstance(first, nn.Linear)
    out = mlp(x, first.weight, first.bias, second.weight, second.bias, activation="gelu")
    torch.testing.assert_close(out, projector(x))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_nan_flows_through(activation, dtype):
    x, w1, b1, w2, b2 = (t.to(dtype) for t in make((8,)))
    x[2, 3] = float("nan")
    for backend in ("reference", "torch", "cpu"):
        with vlmops.use_backend(backend), torch.no_grad():
            out = mlp(x, w1, b1, w2, b2, activation=activation)
        assert out[2].isnan().all()
        assert out[:2].isfinite().all() and out[3:].isfinite().all()


BAD = {
    "not a tensor": (dict(x=[1.0]), "x: expected a tensor"),
    "scalar": (dict(x=torch.tensor(1.0)), r"x: expected \[..., C\]"),
    "integer": (dict(x=torch.ones(5, 32, dtype=torch.int32)), "x: expected a floating-point"),
    "rank": (dict(w1=torch.randn(32)), "w1: expected 2 dimensions"),
    "device": (dict(b2=torch.randn(48, device="meta")), "b2: expected on cpu"),
    "layer_scale": (dict(layer_scale=torch.randn(3)), "layer_scale: expected shape"),
    "w1": (dict(w1=torch.randn(64, 31)), "w1: expected"),
    "w2": (dict(w2=torch.randn(48, 63)), "w2: expected shape"),
    "b1": (dict(b1=torch.randn(63)), "b1: expected shape"),
    "gate": (dict(w_gate=torch.randn(63, 32)), "w_gate: expected shape"),
    "b_gate alone": (dict(b_gate=torch.randn(64)), "b_gate: given without"),
    "activation": (dict(activation="tanh"), "activation: expected one of"),
    "norm": (dict(norm=("batch_norm", None, None, 1e-5)), "norm: expected"),
    "rms bias": (dict(norm=("rms_norm", None, torch.ones(32), 1e-5)), "has no bias"),
    "gather": (dict(gather="merge3x3"), "gather: expected"),
    "odd rows": (dict(gather="merge2x2"), "a multiple of 4"),
    "residual": (dict(residual=torch.randn(5, 47)), "residual: expected shape"),
    "dtype": (dict(w2=torch.randn(48, 64).bfloat16()), "w2: expected float32"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    x, w1, b1, w2, b2 = make()
    change, message = BAD[case]
    with pytest.raises((ValueError, TypeError), match=message):
        mlp(**{**dict(x=x, w1=w1, b1=b1, w2=w2, b2=b2, activation="gelu"), **change})
