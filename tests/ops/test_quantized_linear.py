"""quantized_linear: plain PyTorch and gradients against the oracle, linear's forwarding, bad input, registration."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import vlmops
from tests.support.ops import check_op, opcheck
from vlmops.ops import linear, quantize_weight, quantized_linear
from vlmops.ops._shared.activations import ACTIVATIONS, activate

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
FORMATS = {
    "int8": dict(kind="int8"),
    "int8 g32": dict(kind="int8", group_size=32),
    "int4": dict(kind="int4"),
    "int4 symmetric": dict(kind="int4", symmetric=True, group_size=64),
    "fp8": dict(kind="fp8"),
}


def plain(
    x, weight, bias=None, *, activation=None, gate=None, row_mask=None, residual=None, quantize_activations=False
):
    """What a model's own code computes with the dequantised weight."""
    if quantize_activations:
        size = x.detach().float().abs().amax(-1, keepdim=True)
        size = 2.0 ** torch.ceil(torch.log2(size / 448).clamp(min=-126))
        x = x + ((x.detach().float() / size).to(torch.float8_e4m3fn).float() * size - x.detach().float()).to(x.dtype)
    y = activate(torch.nn.functional.linear(x, weight.dequantize(x.dtype), bias), activation or "")
    y = y if gate is None else torch.tanh(gate) * y
    y = y if row_mask is None else y * row_mask[..., None]
    return y if residual is None else residual + y


def make(rows=(5,), k=100, n=21, grad=False, **options):
    weight = quantize_weight(torch.randn(n, k) * 0.2, **options)
    return torch.randn(*rows, k, requires_grad=grad), weight, torch.randn(n, requires_grad=grad)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", [None, *ACTIVATIONS])
@pytest.mark.parametrize("form", FORMATS)
def test_outputs_and_gradients(form, activation, dtype):
    args = make((2, 3), grad=True, **FORMATS[form])
    kwargs = dict(
        activation=activation, gate=torch.randn(21, requires_grad=True), row_mask=torch.rand(2, 3) > 0.3,
        residual=torch.randn(2, 3, 21, requires_grad=True),
    )  # fmt: skip
    check_op(quantized_linear, args, kwargs, backend="torch", dtype=dtype, lowprec=plain)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rounded_activations(dtype):
    x, weight, bias = make((7,), grad=True, kind="fp8")
    x = (x.detach() * torch.tensor([1.0, 1e-3, 300.0, 1.0, 1.0, 1.0, 20.0])[:, None]).requires_grad_()
    options = dict(quantize_activations=True)
    check_op(quantized_linear, (x, weight, bias), options, backend="torch", dtype=dtype, lowprec=plain)
    with torch.no_grad():
        exact, rounded = (quantized_linear(x, weight, quantize_activations=on) for on in (False, True))
    error = (exact - rounded).norm(dim=1) / exact.norm(dim=1)
    assert (error > 0.005).all() and (error < 0.06).all()  # uniform errors of up to 1/16 of each element


@pytest.mark.parametrize(("form", "most"), [("int8", 0.015), ("int8 g32", 0.01), ("int4", 0.14), ("fp8", 0.04)])
def test_what_quantisation_costs(form, most):
    """Relative error of a product with a random weight, against the weight itself: measured 0.009, 0.006, 0.1 and 0.027."""
    x, w = torch.randn(64, 1024), torch.randn(256, 1024)
    exact = (x.double() @ w.double().t()).float()
    error = (quantized_linear(x, quantize_weight(w, **FORMATS[form])) - exact).norm() / exact.norm()
    assert 0.2 * most < error < most


def test_groups_keep_an_outlier_to_itself():
    w = torch.randn(16, 1024)
    w[:, 5] = 200.0
    rest = [
        float((quantize_weight(w, "int8", group_size=size).dequantize() - w)[:, 128:].abs().max())
        for size in (None, 128)
    ]
    assert rest[1] < 0.05 * rest[0]


@pytest.mark.parametrize("form", FORMATS)
def test_linear_forwards(form):
    x, weight, bias = make(**FORMATS[form])
    options = dict(activation="gelu", gate=torch.tensor(0.3), residual=torch.randn(5, 21), row_mask=torch.rand(5) > 0.5)
    assert torch.equal(linear(x, weight, bias, **options), quantized_linear(x, weight, bias, **options))


@given(
    rows=st.lists(st.integers(0, 5), max_size=3), k=st.integers(0, 300), n=st.integers(0, 40),
    form=st.sampled_from(sorted(FORMATS)), strided=st.booleans(),
)  # fmt: skip
@settings(max_examples=40, deadline=None)
def test_random_shapes(rows, k, n, form, strided):
    x, weight, bias = make(rows, k, n, **FORMATS[form])
    if strided:
        x = torch.randn(*rows, 2 * k)[..., ::2]
    check_op(quantized_linear, (x, weight, bias), {}, backend="torch", dtype=torch.float32, lowprec=plain)


def test_the_weight_gets_no_gradient_and_x_gets_the_dequantised_weights():
    x, weight, bias = make(grad=True, kind="int4")
    quantized_linear(x, weight, bias).sum().backward()
    torch.testing.assert_close(x.grad, weight.dequantize().sum(0).expand_as(x))
    assert weight.scale.grad is None and weight.data.grad is None


def test_autocast():
    x, weight, bias = make(grad=True, kind="int8")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = quantized_linear(x, weight, bias)
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    assert x.grad.dtype == torch.float32


@pytest.mark.parametrize("form", FORMATS)
def test_compile_has_no_graph_break(form):
    torch._dynamo.reset()  # the formats share one code object, and there is a limit on recompiling it
    x, weight, bias = make(grad=True, **FORMATS[form])
    for op in (linear, quantized_linear):
        fn = torch.compile(lambda x, op=op: op(x, weight, bias, activation="gelu"), fullgraph=True, backend="aot_eager")
        want = quantized_linear(x, weight, bias, activation="gelu")
        torch.testing.assert_close(fn(x), want)
        torch.testing.assert_close(torch.autograd.grad(fn(x).sum(), x), torch.autograd.grad(want.sum(), x))


@pytest.mark.parametrize("form", FORMATS)
def test_opcheck(form):
    x, w, bias = make(grad=True, **FORMATS[form])
    residual = torch.randn(5, 21, requires_grad=True)
    data = w.data.view(torch.uint8) if form == "fp8" else w.data
    args = (x, data, w.scale, w.zero, w.kind, w.group_size or 0, 100, bias, "gelu", torch.tensor(0.3), None, residual)
    opcheck(torch.ops.vlmops.quantized_linear.default, (*args, form == "fp8", "torch"))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(weight=torch.randn(21, 100)), TypeError, "weight: expected a QuantizedWeight"),
        (dict(x=torch.randn(5, 99)), ValueError, r"x: expected \[\.\.\., 100\]"),
        (dict(x=torch.tensor(1.0)), ValueError, "x: expected"),
        (dict(x=torch.ones(5, 100, dtype=torch.int32)), TypeError, "x: expected a floating-point"),
        (dict(x=[1.0]), TypeError, "x: expected a tensor"),
        (dict(x=torch.randn(5, 100, device="meta")), ValueError, "weight: expected on meta"),
        (dict(bias=torch.randn(20)), ValueError, "bias: expected shape"),
        (dict(bias=torch.randn(21, dtype=torch.float16)), TypeError, "bias: expected float32"),
        (dict(gate=torch.randn(2)), ValueError, r"gate: expected a scalar or \[21\]"),
        (dict(gate=1.0), TypeError, "gate: expected a tensor"),
        (dict(residual=torch.randn(4, 21)), ValueError, "residual: expected shape"),
        (dict(row_mask=torch.ones(5)), TypeError, "row_mask: expected bool"),
        (dict(row_mask=torch.ones(4, dtype=torch.bool)), ValueError, "row_mask: expected shape"),
        (dict(activation="elu"), ValueError, "activation: expected one of"),
        (dict(quantize_activations=True), ValueError, "quantize_activations: expected an fp8 weight, got int8"),
    ],
)
def test_bad_input(change, error, message):
    x, weight, bias = make(kind="int8")
    args = {"x": x, "weight": weight, "bias": bias, **change}
    with pytest.raises(error, match=message):
        quantized_linear(args.pop("x"), args.pop("weight"), args.pop("bias"), **args)


def test_a_nan_stays_in_its_row():
    x, weight, bias = make(kind="fp8")
    x[1, 4], x[3, 9] = float("nan"), float("inf")
    for backend in ("reference", "torch"):
        with vlmops.use_backend(backend):
            out = quantized_linear(x, weight, bias, quantize_activations=True)
        assert out[[1, 3]].isnan().all() and out[[0, 2, 4]].isfinite().all()
