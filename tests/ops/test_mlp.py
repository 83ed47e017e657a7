"""mlp: every backend and gradient against the oracle, its surroundings, transformers' own layers, bad input."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import vlmops
from tests.support.ops import check_op, opcheck
from vlmops.ops import mlp
from vlmops.ops._shared.activations import ACTIVATIONS

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


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
        "layer_scale": dict(layer_scale=leaf(n), residual=leaf(*rows, n)),
    }[name]


EXTRAS = ["plain", "gated", "gated, no bias", "residual", "layer_norm", "rms_norm", "mid_norm", "layer_scale"]


@pytest.mark.parametrize("backend", ["torch", "cpu"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(backend, dtype, activation):
    check_op(mlp, make((8,)), dict(activation=activation), backend=backend, dtype=dtype)


@pytest.mark.parametrize("backend", ["torch", "cpu"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", EXTRAS)
def test_surroundings(backend, dtype, name):
    check_op(mlp, make((8,), biases=name != "gated, no bias"), dict(activation="silu", **extras(name)), backend=backend, dtype=dtype)


@pytest.mark.parametrize("name", EXTRAS)
def test_gradients(name):
    check_op(mlp, make((8,), grad=True), dict(activation="gelu", **extras(name, True)), backend="torch", dtype=torch.float32)


@pytest.mark.parametrize("backend", ["torch", "cpu"])
def test_gathers(backend):
    check_op(mlp, make((8,), wide=4), dict(activation="gelu", gather="merge2x2", **extras("layer_norm")), backend=backend, dtype=torch.float32)
    check_op(mlp, make((2, 24), wide=4), dict(activation="gelu", gather=("pixel_shuffle", 4, 6)), backend=backend, dtype=torch.float32)


def test_pixel_shuffle_is_transformers_own_order():
    from transformers.models.internvl.modeling_internvl import InternVLModel

    from vlmops.ops.mlp.layout import gather_rows

    x = torch.randn(2, 36, 5)
    want = InternVLModel.pixel_shuffle(None, x.view(2, 6, 6, 5), scale_factor=0.5)
    torch.testing.assert_close(gather_rows(x, "pixel_shuffle", 6, 6), want.reshape(2, 9, 20))


def test_chunks_agree_with_the_whole(monkeypatch):
    from vlmops.ops.mlp import cpu

    monkeypatch.setattr(cpu, "CHUNK_BYTES", 1)
    check_op(mlp, make((1300,)), dict(activation="quick_gelu", residual=torch.randn(1300, 48)), backend="cpu", dtype=torch.float32)


@given(
    rows=st.lists(st.integers(0, 4), max_size=3), c=st.integers(1, 33), h=st.integers(1, 33), n=st.integers(1, 33),
    biases=st.booleans(), gated=st.booleans(),
)  # fmt: skip
@settings(max_examples=40, deadline=None)
def test_random_shapes(rows, c, h, n, biases, gated):
    args = make(rows, c, h, n, biases)
    kwargs = dict(activation="silu", w_gate=torch.randn(h, c) if gated else None)
    for backend in ["torch", *(["cpu"] if args[0].numel() and min(c, h, n) >= 16 else [])]:
        check_op(mlp, args, kwargs, backend=backend, dtype=torch.float32)


def test_gradcheck_of_the_reference():
    args = [a.detach().double().requires_grad_() for a in make((3,), 3, 4, 2)]
    gate = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    norm = torch.randn(3, dtype=torch.float64, requires_grad=True)
    with vlmops.use_backend("reference"):
        assert torch.autograd.gradcheck(
            lambda *a: mlp(*a[:5], activation="silu", w_gate=a[5], norm=("rms_norm", a[6], None, 1e-6)), (*args, gate, norm)
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

    config = LlavaConfig(vision_config=dict(model_type="clip_vision_model", hidden_size=32, num_attention_heads=4),
        text_config=dict(model_type="llama", hidden_size=48, num_attention_heads=4))
    projector = LlavaMultiModalProjector(config)
    x = torch.randn(3, 32)
    first, second = projector.linear_1, projector.linear_2
    assert isinstance(first, nn.Linear)
    out = mlp(x, first.weight, first.bias, second.weight, second.bias, activation="gelu")
    torch.testing.assert_close(out, projector(x))


BAD = {
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
