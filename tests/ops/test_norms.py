"""rms_norm and layer_norm: every backend and its gradients against the oracle, and against transformers' modules."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import vlmops
from tests.support.ops import check_op, opcheck
from vlmops.backends import native
from vlmops.ops import layer_norm, rms_norm

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
needs_native = pytest.mark.skipif(not native.available(), reason=f"no native build: {native.reason()}")
ISAS = ["generic", "neon", "avx2", "avx512", "avx512_bf16"]
BACKENDS = ["torch", pytest.param("cpu", marks=needs_native)]


def make(shape=(6, 40), weight=True, bias=True, residual=False, spread=1.0):
    x = (torch.randn(shape) * spread + 0.5).requires_grad_()
    found = dict(weight=torch.randn(shape[-1], requires_grad=True) if weight else None)
    if bias is not None:
        found["bias"] = torch.randn(shape[-1], requires_grad=True) if bias else None
    if residual:
        found["residual"] = torch.randn(shape, requires_grad=True)
    return (x,), found


RMS_CASES = {
    "plain": (dict(), dict(eps=1e-6)),
    "no weight": (dict(weight=False), dict(eps=1e-6)),
    "gemma": (dict(), dict(eps=1e-6, offset=1.0)),
    "residual": (dict(residual=True), dict(eps=1e-6)),
    "gemma residual": (dict(residual=True), dict(eps=1e-6, offset=1.0)),
    "large eps": (dict(), dict(eps=0.5)),
    "batch": (dict(shape=(2, 3, 17), residual=True), dict(eps=1e-6)),
    "vector": (dict(shape=(33,)), dict(eps=1e-6)),
    "one channel": (dict(shape=(5, 1)), dict(eps=1e-6)),
    "no rows": (dict(shape=(0, 8), residual=True), dict(eps=1e-6)),
    "many rows": (dict(shape=(700, 33)), dict(eps=1e-6)),
}
LAYER_CASES = {
    "plain": (dict(), dict(eps=1e-5)),
    "no bias": (dict(bias=False), dict(eps=1e-5)),
    "no weight": (dict(weight=False, bias=False), dict(eps=1e-5)),
    "bias only": (dict(weight=False), dict(eps=1e-5)),
    "residual": (dict(residual=True), dict(eps=1e-5)),
    "batch": (dict(shape=(2, 3, 17), residual=True), dict(eps=1e-5)),
    "one channel": (dict(shape=(5, 1)), dict(eps=1e-5)),
    "no rows": (dict(shape=(0, 8)), dict(eps=1e-5)),
    "many rows": (dict(shape=(700, 33), residual=True), dict(eps=1e-5)),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", RMS_CASES)
def test_rms_norm(case, backend, dtype):
    shapes, options = RMS_CASES[case]
    args, named = make(**{"bias": None, **shapes})
    check_op(rms_norm, args, {**named, **options}, backend=backend, dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", LAYER_CASES)
def test_layer_norm(case, backend, dtype):
    shapes, options = LAYER_CASES[case]
    args, named = make(**shapes)
    if case == "one channel" and backend == "cpu":
        with pytest.raises(vlmops.backends.BackendError, match="one channel"), vlmops.use_backend("cpu"):
            layer_norm(*args, **named, **options)
        return
    check_op(layer_norm, args, {**named, **options}, backend=backend, dtype=dtype)


@pytest.mark.parametrize("backend", BACKENDS)
@given(rows=st.integers(0, 5), cols=st.integers(5, 150), center=st.booleans(), residual=st.booleans())
@settings(max_examples=40, deadline=None)
def test_random_shapes(backend, rows, cols, center, residual):
    args, named = make((rows, cols), bias=True if center else None, residual=residual)
    check_op(layer_norm if center else rms_norm, args, {**named, "eps": 1e-5}, backend=backend, dtype=torch.float32)


def sweep():
    """Both norms and their gradients around every vector length; run in a process of its own for each instruction set."""
    torch.manual_seed(0)
    for dtype in DTYPES:
        for cols in (7, 16, 33, 130):
            args, kwargs = make((9, cols), residual=True)
            check_op(layer_norm, args, {**kwargs, "eps": 1e-5}, backend="cpu", dtype=dtype)
            args, kwargs = make((9, cols), bias=None, residual=True)
            check_op(rms_norm, args, {**kwargs, "eps": 1e-6, "offset": 1.0}, backend="cpu", dtype=dtype)


@needs_native
@pytest.mark.parametrize("isa", ISAS)
def test_every_instruction_set(isa):
    if ISAS.index(isa) > ISAS.index(native.isa()) or ((isa == "neon") != (native.isa() == "neon") and isa != "generic"):
        pytest.skip(f"not on this machine ({native.isa()})")
    code = "from tests.ops.test_norms import native, sweep; sweep(); print(native.isa())"
    env = {**os.environ, "VLMOPS_CPU_ISA": isa}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == isa


def test_a_large_mean_loses_no_digits():
    """Mean 1000, deviation 1: sum(x^2) - mean^2 in float32 would have three digits left."""
    args, named = make((4, 256))
    args = ((args[0].detach() + 1000).requires_grad_(),)
    check_op(layer_norm, args, {**named, "eps": 1e-5}, backend="cpu", dtype=torch.float32)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", ["qwen2", "gemma2"])
def test_against_transformers(family, dtype, backend):
    from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
    from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm

    module = (Qwen2RMSNorm if family == "qwen2" else Gemma2RMSNorm)(96, eps=1e-6).to(dtype)
    torch.nn.init.normal_(module.weight)
    x = torch.randn(2, 7, 96).to(dtype)
    with vlmops.use_backend(backend):
        out = rms_norm(x, module.weight, eps=1e-6, offset=1.0 if family == "gemma2" else 0.0)
    # One rounding step apart at most: the statistics are summed in another order.
    torch.testing.assert_close(out, module(x), rtol=2 * torch.finfo(dtype).eps, atol=1e-6)


def test_rounding_order_is_the_familys():
    """bfloat16 rows chosen so that rounding before the weight (Llama) and after it (Gemma) differ."""
    x, w = torch.randn(64, 32).bfloat16(), torch.randn(32).bfloat16()
    llama = w * F.rms_norm(x.float(), (32,), None, 1e-6).bfloat16()
    gemma = (F.rms_norm(x.float(), (32,), None, 1e-6) * (1 + (w - 1).float())).bfloat16()
    assert not torch.equal(llama, gemma)
    for backend in ("torch", "cpu") if native.available() else ("torch",):
        with vlmops.use_backend(backend):
            assert (rms_norm(x, w, eps=1e-6) != llama).float().mean() < 0.01
            assert (rms_norm(x, w - 1, eps=1e-6, offset=1.0) != gemma).float().mean() < 0.01


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", BACKENDS)
def test_float32_parameters_beside_low_precision_rows(backend, dtype):
    x, w, b = torch.randn(5, 40).to(dtype), torch.randn(40, requires_grad=True), torch.randn(40, requires_grad=True)
    want = F.layer_norm(x.float(), (40,), w, b, 1e-5)
    with vlmops.use_backend(backend):
        out = layer_norm(x, w, b, eps=1e-5)
    assert out.dtype == dtype
    torch.testing.assert_close(out.float(), want, rtol=torch.finfo(dtype).eps, atol=1e-3)
    grad = torch.randn(5, 40).to(dtype)
    found = torch.autograd.grad(out, [w, b], grad)
    for a, expected in zip(found, torch.autograd.grad(want, [w, b], grad.float()), strict=True):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a, expected, rtol=1e-3, atol=1e-3)


def test_float32_weight_promotes_as_in_llama():
    x, w = torch.randn(5, 40).bfloat16(), torch.randn(40)
    out = rms_norm(x, w, eps=1e-6)
    assert out.dtype == torch.float32
    if native.available():
        with (
            vlmops.use_backend("cpu"),
            pytest.raises(vlmops.backends.BackendError, match="float32 weight on low-precision"),
        ):
            rms_norm(x, w, eps=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_residual_is_the_two_steps(backend):
    x, r, w = torch.randn(5, 40).bfloat16(), torch.randn(5, 40).bfloat16(), torch.randn(40).bfloat16()
    with vlmops.use_backend(backend):
        out, total = rms_norm(x, w, eps=1e-6, residual=r)
        assert torch.equal(total, x + r)
        assert torch.equal(out, rms_norm(x + r, w, eps=1e-6))


def test_residual_gradients_do_not_share_memory():
    x, r = (torch.randn(5, 8, requires_grad=True) for _ in range(2))
    out, total = layer_norm(x, eps=1e-5, residual=r)
    (out * total).sum().backward()
    assert torch.equal(x.grad, r.grad) and x.grad.data_ptr() != r.grad.data_ptr()


def test_only_the_residual_wants_a_gradient():
    x, r = torch.randn(5, 8), torch.randn(5, 8, requires_grad=True)
    out, total = layer_norm(x, eps=1e-5, residual=r)
    (got,) = torch.autograd.grad((out * out).sum() + total.sum(), r)
    h = (x + r.detach()).requires_grad_()
    (want,) = torch.autograd.grad(F.layer_norm(h, (8,)).square().sum() + h.sum(), h)
    torch.testing.assert_close(got, want)


def test_another_dtype_of_the_residual_is_promoted():
    x, r = torch.randn(5, 8).bfloat16().requires_grad_(), torch.randn(5, 8, requires_grad=True)
    out, total = layer_norm(x, eps=1e-5, residual=r)
    assert out.dtype == total.dtype == torch.float32 and torch.equal(total, x + r)
    out.sum().backward()
    assert x.grad.dtype == torch.bfloat16


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_rows(backend):
    x, w = torch.randn(6, 80)[:, 3:43], torch.randn(80)[::2]
    with vlmops.use_backend(backend):
        torch.testing.assert_close(layer_norm(x, w, w, eps=1e-5), F.layer_norm(x, (40,), w, w, 1e-5))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_and_infinity_stay_in_their_row(backend, bad):
    x, w = torch.randn(3, 40), torch.randn(40)
    x[1, 5] = bad
    with vlmops.use_backend(backend):
        layer, rms = layer_norm(x, w, eps=1e-5), rms_norm(x, w, eps=1e-6)
    assert layer[1].isnan().all() and layer[::2].isfinite().all()
    assert rms[1, 5].isnan() and rms[::2].isfinite().all()


@pytest.mark.parametrize("center", [False, True])
def test_gradcheck_of_the_reference(center):
    x, r, w, b = (torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in ((3, 5), (3, 5), (5,), (5,)))
    with vlmops.use_backend("reference"):
        if center:
            assert torch.autograd.gradcheck(lambda x, r, w, b: layer_norm(x, w, b, eps=1e-5, residual=r), [x, r, w, b])
        else:
            assert torch.autograd.gradcheck(lambda x, r, w: rms_norm(x, w, eps=1e-5, residual=r, offset=1.0), [x, r, w])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("center", [False, True])
def test_opcheck(backend, residual, center):
    (x,), named = make((4, 19), residual=True)
    args = (
        x,
        named["residual"] if residual else None,
        named["weight"],
        named["bias"] if center else None,
        1e-5,
        0.0,
        center,
    )
    opcheck(torch.ops.vlmops.norms.default, (*args, backend))


def test_compile_has_no_graph_break():
    (x,), named = make((4, 3, 19), residual=True)
    call = lambda x: sum(o.square().sum() for o in layer_norm(x, eps=1e-5, **named))  # noqa: E731
    (got,) = torch.autograd.grad(torch.compile(call, fullgraph=True, backend="aot_eager")(x), x)
    (want,) = torch.autograd.grad(call(x), x)
    torch.testing.assert_close(got, want)


def test_autocast_keeps_the_rows_precision():
    """Norms run in the precision of their rows under autocast, as torch's own on a CPU."""
    (x,), named = make((4, 19))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer_norm(x, **named, eps=1e-5).dtype == torch.float32
        assert layer_norm(x.bfloat16(), **named, eps=1e-5).dtype == torch.bfloat16


BAD = {
    "scalar": (lambda a: dict(x=torch.tensor(1.0)), r"x: expected \[..., C\]"),
    "no channels": (lambda a: dict(x=a["x"][:, :0]), "C >= 1"),
    "integers": (lambda a: dict(x=a["x"].int()), "x: expected a floating-point"),
    "weight rank": (lambda a: dict(weight=a["weight"][None]), "weight: expected 1 dimensions"),
    "weight length": (lambda a: dict(weight=a["weight"][:-1]), r"weight: expected shape \[8\]"),
    "weight dtype": (lambda a: dict(weight=a["weight"].int()), "weight: expected a floating-point"),
    "bias length": (lambda a: dict(bias=a["bias"][:-1]), r"bias: expected shape \[8\]"),
    "residual shape": (lambda a: dict(residual=a["x"][:-1]), "residual: expected shape"),
    "residual integers": (lambda a: dict(residual=a["x"].int()), "residual: expected a floating-point"),
    "device": (lambda a: dict(weight=a["weight"].to("meta")), "weight: expected on cpu"),
    "not a tensor": (lambda a: dict(residual=1.0), "residual: expected a tensor"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    args = dict(x=torch.randn(5, 8), weight=torch.randn(8), bias=torch.randn(8), residual=None)
    change, message = BAD[case]
    args.update(change(args))
    with pytest.raises((ValueError, TypeError), match=message):
        layer_norm(**args, eps=1e-5)
    if "bias" not in case:
        del args["bias"]
        with pytest.raises((ValueError, TypeError), match=message):
            rms_norm(**args, eps=1e-5)
