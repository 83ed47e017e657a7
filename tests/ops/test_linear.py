"""linear: every backend and gradient against the oracle, epilogues, packed weights, bad input, registration."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import vlmops
from tests.support.ops import check_op, opcheck
from vlmops.backends import native
from vlmops.ops import linear
from vlmops.ops._shared import gemm_cpu
from vlmops.ops._shared.activations import ACTIVATIONS, activate

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


ISAS = ["generic", "neon", "avx2", "avx512", "avx512_bf16"]


def plain(x, weight, bias=None, *, activation=None, gate=None, row_mask=None, residual=None):
    """What a model's own code computes, differentiated by autograd."""
    y = activate(torch.nn.functional.linear(x, weight, bias), activation or "")
    y = y if gate is None else torch.tanh(gate) * y
    y = y if row_mask is None else y * row_mask[..., None]
    return y if residual is None else residual + y


def make(rows=(5,), k=32, n=48, bias=True, grad=False):
    x = torch.randn(*rows, k, requires_grad=grad)
    return x, (torch.randn(n, k) * 0.2).requires_grad_(grad), torch.randn(n, requires_grad=grad) if bias else None


@pytest.mark.parametrize("backend", ["torch", "cpu"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", [None, *ACTIVATIONS])
def test_activations(backend, dtype, activation):
    check_op(linear, make((3, 7)), dict(activation=activation), backend=backend, dtype=dtype, lowprec=plain)


@pytest.mark.parametrize("backend", ["torch", "cpu"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("epilogue", ["residual", "gate", "vector gate", "mask", "all"])
def test_epilogues(backend, dtype, epilogue):
    parts = {
        "residual": dict(residual=torch.randn(2, 9, 48)),
        "gate": dict(gate=torch.tensor(0.7)),
        "vector gate": dict(gate=torch.randn(48)),
        "mask": dict(row_mask=torch.rand(2, 9) > 0.5),
    }
    kwargs = {
        k: v
        for name, part in parts.items()
        if epilogue in (name, "all") and not (epilogue == "all" and name == "gate")
        for k, v in part.items()
    }
    for activation in (None, "quick_gelu", "gelu"):
        check_op(
            linear, make((2, 9)), {**kwargs, "activation": activation}, backend=backend, dtype=dtype, lowprec=plain
        )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", [None, *ACTIVATIONS])
@pytest.mark.parametrize("gate_shape", [None, (), (1,), (48,)])
def test_gradients(dtype, activation, gate_shape):
    kwargs = dict(activation=activation, residual=torch.randn(5, 48, requires_grad=True), row_mask=torch.rand(5) > 0.3)
    if gate_shape is not None:
        kwargs["gate"] = torch.randn(gate_shape, requires_grad=True)
    check_op(linear, make(grad=True), kwargs, backend="torch", dtype=dtype, lowprec=plain)
    check_op(linear, make(grad=True), kwargs, backend="torch", dtype=torch.float64, lowprec="reference")


@given(
    rows=st.lists(st.integers(0, 5), max_size=3), k=st.integers(1, 40), n=st.integers(1, 40), bias=st.booleans(),
    activation=st.sampled_from([None, *ACTIVATIONS]), strided=st.booleans(),
)  # fmt: skip
@settings(max_examples=40, deadline=None)
def test_random_shapes(rows, k, n, bias, activation, strided):
    x, weight, b = make(rows, k, n, bias)
    if strided:
        x = torch.randn(*rows, 2 * k)[..., ::2]
    for backend in ["torch", *(["cpu"] if x.numel() and min(k, n) >= 16 else [])]:
        check_op(
            linear, (x, weight, b), dict(activation=activation), backend=backend, dtype=torch.float32, lowprec=plain
        )


@pytest.mark.parametrize("rows", [1, 2, 15, 16, 17, 300])
@pytest.mark.parametrize("dtype", DTYPES)
def test_one_packed_weight_serves_every_row_count(rows, dtype):
    check_op(linear, make((rows,), 96, 160), dict(activation="quick_gelu"), backend="cpu", dtype=dtype)


def test_gradcheck_of_the_reference():
    x, w, b = (t.detach().double().requires_grad_() for t in make((3,), 4, 5))
    gate, residual = (
        torch.randn(5, dtype=torch.float64, requires_grad=True),
        torch.randn(3, 5, dtype=torch.float64, requires_grad=True),
    )
    with vlmops.use_backend("reference"):
        assert torch.autograd.gradcheck(
            lambda *a: linear(*a[:3], activation="gelu", gate=a[3], residual=a[4]), (x, w, b, gate, residual)
        )


def test_opcheck():
    x, w, b = make(grad=True)
    residual = torch.randn(5, 48, requires_grad=True)
    opcheck(torch.ops.vlmops.linear.default, (x, w, b, "gelu", None, None, residual, False, "torch"))
    opcheck(
        torch.ops.vlmops.linear.default,
        (x, w, None, "", torch.tensor(0.3), torch.ones(5, dtype=torch.bool), None, False, "torch"),
    )


def test_compile_has_no_graph_break():
    x, w, b = make(grad=True)
    fn = torch.compile(lambda x: linear(x, w, b, activation="gelu").square().sum(), fullgraph=True, backend="aot_eager")
    got = torch.autograd.grad(fn(x), (x, w, b))
    want = torch.autograd.grad(linear(x, w, b, activation="gelu").square().sum(), (x, w, b))
    torch.testing.assert_close(got, want)
    with torch.no_grad():
        torch.testing.assert_close(fn(x), linear(x, w, b, activation="gelu").square().sum())


def test_autocast():
    x, w, b = make(grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = linear(x, w, b)
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    assert w.grad.dtype == torch.float32


def test_packed_weights_are_not_used_where_a_gradient_is_wanted():
    x, w, b = make(grad=True)
    with vlmops.use_backend("cpu"), pytest.raises(vlmops.backends.BackendError, match="gradient"):
        linear(x, w, b)
    with vlmops.use_backend("cpu"), torch.no_grad():
        linear(x, w, b)


def everything(n=48, rows=9):
    return dict(
        activation="quick_gelu", gate=torch.randn(n), row_mask=torch.rand(rows) > 0.5, residual=torch.randn(rows, n)
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [16, 17, 48, 63, 100])
def test_the_epilogue_at_odd_widths(dtype, n):
    check_op(linear, make((9,), 40, n), everything(n), backend="cpu", dtype=dtype, lowprec=plain)


@pytest.mark.parametrize("dtype", DTYPES)
def test_without_a_compiler(monkeypatch, dtype):
    monkeypatch.setattr(native, "available", lambda: False)
    check_op(linear, make((9,)), everything(), backend="cpu", dtype=dtype, lowprec=plain)


@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_widened_products_in_chunks(monkeypatch, dtype):
    monkeypatch.setattr(gemm_cpu, "_has_bf16", lambda: False)
    monkeypatch.setattr(gemm_cpu, "HALF_ROWS", 4)
    check_op(linear, make((9,)), everything(), backend="cpu", dtype=dtype, lowprec=plain)


def test_bfloat16_runs_in_float32_where_onednn_has_none(monkeypatch):
    """As on a processor with AVX2 only: more exact than torch's own product, and packed once."""
    monkeypatch.setattr(gemm_cpu, "_has_bf16", lambda: False)
    assert gemm_cpu.widened(torch.bfloat16) and not gemm_cpu.widened(torch.float32)
    x, w = torch.randn(33, 700).bfloat16(), torch.nn.Parameter(torch.randn(64, 700).bfloat16() / 26)
    with torch.no_grad(), vlmops.use_backend("cpu"):
        out = linear(x, w)
    exact = x.double() @ w.detach().double().t()
    torch.testing.assert_close(out.double(), exact, atol=1e-5, rtol=2**-8)  # one rounding of each element
    assert vlmops.packed_bytes(torch.nn.ParameterList([w])) == 4 * w.numel()


@pytest.mark.skipif(not native.available(), reason="no native library")
@pytest.mark.parametrize("isa", ISAS)
def test_the_epilogue_on_every_instruction_set(isa):
    if ISAS.index(isa) > ISAS.index(native.isa()) or ((isa == "neon") != (native.isa() == "neon") and isa != "generic"):
        pytest.skip("not on this CPU")
    code = """
import torch
from tests.ops.test_linear import DTYPES, everything, make, plain
from tests.support.ops import check_op
from vlmops.backends import native
from vlmops.ops import linear
for dtype in DTYPES:
    for n in (16, 37, 64):
        check_op(linear, make((9,), 40, n), everything(n), backend="cpu", dtype=dtype, lowprec=plain)
print(native.isa())
"""
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "VLMOPS_CPU_ISA": isa}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == isa


@pytest.mark.skipif(not native.available(), reason="no native library")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(out=torch.empty(5, 7)), "out: expected contiguous"),
        (dict(product=torch.empty(8, 5).t()), "product: expected contiguous"),
        (dict(product=torch.empty(5, 8).bfloat16()), "product: expected float32"),
        (dict(scale=torch.empty(7)), "scale: expected"),
        (dict(row_mask=torch.ones(4, dtype=torch.bool)), "row_mask: expected"),
        (dict(residual=torch.empty(5, 8).half()), "residual: expected"),
        (dict(out=torch.empty(5, 8).double()), "out: expected float32"),
    ],
)
def test_the_native_epilogue_checks_its_arguments(change, message):
    args = dict(
        product=torch.zeros(5, 8), out=torch.zeros(5, 8), quick_gelu=True, scale=None, row_mask=None, residual=None
    )
    with pytest.raises((ValueError, TypeError), match=message):
        torch.ops.vlmops_cpu.epilogue(**{**args, **change})


def test_a_masked_row_is_zero_even_where_its_product_is_nan():
    x, w, b = make()
    x[1] = float("nan")
    mask = torch.tensor([True, False, True, True, True])
    for backend in ("torch", "cpu"):
        with vlmops.use_backend(backend), torch.no_grad():
            out = linear(x, w, b, row_mask=mask)
        assert out[1].eq(0).all()
        assert out[0].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", [None, *ACTIVATIONS])
def test_nan_flows_through(activation, dtype):
    x, w, b = (t.to(dtype) for t in make())
    x[2, 3] = float("nan")
    for backend in ("reference", "torch", "cpu"):
        with vlmops.use_backend(backend), torch.no_grad():
            out = linear(x, w, b, activation=activation)
        assert out[2].isnan().all()
        assert out[:2].isfinite().all()
        assert out[3:].isfinite().all()


BAD = {
    "not a tensor": (dict(x=[1.0]), "x: expected a tensor"),
    "integer": (dict(x=torch.ones(5, 32, dtype=torch.int32)), "x: expected a floating-point"),
    "width": (dict(x=torch.randn(5, 31)), r"x: expected \[..., 32\]"),
    "scalar": (dict(x=torch.tensor(1.0)), r"x: expected \[..., 32\]"),
    "weight rank": (dict(weight=torch.randn(3)), "weight: expected 2 dimensions"),
    "weight dtype": (dict(weight=torch.randn(48, 32).half()), "weight: expected float32"),
    "bias": (dict(bias=torch.randn(47)), "bias: expected shape"),
    "residual": (dict(residual=torch.randn(4, 48)), "residual: expected shape"),
    "gate type": (dict(gate=0.5), "gate: expected a tensor"),
    "mask type": (dict(row_mask=[True]), "row_mask: expected a tensor"),
    "gate": (dict(gate=torch.randn(3)), "gate: expected a scalar"),
    "mask shape": (dict(row_mask=torch.ones(4, dtype=torch.bool)), "row_mask: expected shape"),
    "mask dtype": (dict(row_mask=torch.ones(5)), "row_mask: expected bool"),
    "device": (dict(weight=torch.randn(48, 32, device="meta")), "weight: expected on cpu"),
    "activation": (dict(activation="swish"), "activation: expected one of"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    x, w, b = make()
    change, message = BAD[case]
    with pytest.raises((ValueError, TypeError), match=message):
        linear(**{**dict(x=x, weight=w, bias=b), **change})
