"""The Triton norms in the interpreter: parity, gradients, mixed dtypes, traffic."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import vlmops
from tests.ops.test_norms import DTYPES, LAYER_CASES, RMS_CASES, make
from tests.support import triton_interpreter
from tests.support.ops import check_op
from vlmops.backends import triton_runtime
from vlmops.ops import layer_norm, rms_norm
from vlmops.ops.norms.cost import backward_cost, cost

pytest.importorskip("triton")
triton_interpreter.install()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", RMS_CASES)
def test_rms_norm(case, dtype):
    shapes, options = RMS_CASES[case]
    args, named = make(**{"bias": None, **shapes})
    check_op(rms_norm, args, {**named, **options}, backend="triton", dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", LAYER_CASES)
def test_layer_norm(case, dtype):
    shapes, options = LAYER_CASES[case]
    args, named = make(**shapes)
    check_op(layer_norm, args, {**named, **options}, backend="triton", dtype=dtype)


@given(rows=st.integers(0, 40), cols=st.integers(2, 300), center=st.booleans(), residual=st.booleans())
@settings(max_examples=25, deadline=None)
def test_any_shape(rows, cols, center, residual):
    args, named = make((rows, cols), bias=True if center else None, residual=residual)
    check_op(layer_norm if center else rms_norm, args, {**named, "eps": 1e-5}, backend="triton", dtype=torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_float32_weight_makes_a_float32_result(dtype):
    x, w = torch.randn(7, 40, dtype=dtype), torch.randn(40)
    with vlmops.use_backend("triton"):
        out = rms_norm(x, w, eps=1e-6)
    with vlmops.use_backend("torch"):
        plain = rms_norm(x, w, eps=1e-6)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, plain)


def test_llamas_rounding_is_kept():
    """The row is rounded before it meets the weight: one rounding more than Gemma's order, and bit for bit transformers'."""
    x, w = torch.randn(64, 96).bfloat16(), torch.randn(96).bfloat16()
    with vlmops.use_backend("triton"):
        out = rms_norm(x, w, eps=1e-6)
    with vlmops.use_backend("torch"):
        assert (out != rms_norm(x, w, eps=1e-6)).sum() <= 3  # rsqrt may differ in the last bit


def test_strided_rows():
    wide = torch.randn(9, 80)
    x = wide[:, :40].requires_grad_()
    check_op(layer_norm, (x, torch.randn(40), torch.randn(40)), dict(eps=1e-5), backend="triton", dtype=torch.float32)


def test_a_nan_stays_in_its_row():
    x = torch.randn(20, 40)
    x[3, 5] = float("nan")
    with vlmops.use_backend("triton"):
        out = layer_norm(x, eps=1e-5)
    assert out[3].isnan().all() and out[torch.arange(20) != 3].isfinite().all()


def test_rows_that_fit_no_block_are_refused():
    with vlmops.use_backend("triton"), pytest.raises(vlmops.backends.BackendError, match="at most 16384"):
        rms_norm(torch.zeros(1, 16385), eps=1e-6)


@pytest.mark.parametrize("residual", [False, True])
def test_traffic_is_the_least(residual):
    x, w = torch.randn(200, 300).bfloat16(), torch.randn(300).bfloat16()
    args = (x, x.clone() if residual else None, w, None, 1e-6, 0.0, False)
    with triton_interpreter.count() as seen, vlmops.use_backend("triton"):
        rms_norm(x, w, eps=1e-6, residual=args[1])
    least = cost(*args, programs=seen.programs)
    assert cost(*args).bytes <= seen.bytes and least.bytes == seen.bytes
    assert seen.bytes <= 1.15 * cost(*args).bytes + 600 * seen.programs


def test_traffic_of_the_backward_is_the_least():
    x, w = torch.randn(400, 300, requires_grad=True), torch.randn(300, requires_grad=True)
    with vlmops.use_backend("triton"):
        out = rms_norm(x, w, eps=1e-6)
    with triton_interpreter.count() as seen:
        out.backward(torch.randn_like(out))
    programs = triton_runtime.INTERPRETER.processors * 4
    assert seen.bytes <= 1.15 * backward_cost(x, w, None, 1, programs=programs).bytes
