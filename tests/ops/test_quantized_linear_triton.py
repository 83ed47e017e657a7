"""quantized_linear's Triton kernels in the interpreter: unpacking, parity of each kind, epilogues, gradients, traffic."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import vlmops
from tests.support import triton_interpreter
from tests.support.ops import check_op
from vlmops.backends import triton_runtime
from vlmops.backends.triton_runtime import TARGETS
from vlmops.ops import quantize_weight, quantized_linear
from vlmops.ops._shared.quantisation import QuantizedWeight, power_of_two_scale, round_e4m3
from vlmops.ops.quantized_linear import triton as backend
from vlmops.ops.quantized_linear.cost import cost

pytest.importorskip("triton")
triton_interpreter.install()

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
#: name -> quantize_weight's options
WEIGHTS = {
    "int8": dict(kind="int8"),
    "int8 g32": dict(kind="int8", group_size=32),
    "int8 g128": dict(kind="int8", group_size=128),
    "int4 g32": dict(kind="int4", group_size=32),
    "int4 g64": dict(kind="int4", group_size=64),
    "int4": dict(kind="int4"),
    "int4 g256": dict(kind="int4", group_size=256),
    "int4 symmetric": dict(kind="int4", symmetric=True),
    "fp8": dict(kind="fp8"),
}


def make(rows=(3,), k=200, n=21, bias=True, grad=False, **options):
    x = torch.randn(*rows, k, requires_grad=grad)
    weight = quantize_weight(torch.randn(n, k) * torch.rand(n, 1), **options)
    return x, weight, torch.randn(n, requires_grad=grad) if bias else None


@pytest.mark.parametrize("rows", [1, 3, 18])
@pytest.mark.parametrize("name", WEIGHTS)
def test_parity(name, rows):
    for dtype in DTYPES:
        check_op(quantized_linear, make((rows,), **WEIGHTS[name]), {}, backend="triton", dtype=dtype)


@pytest.mark.parametrize("gpu", ["sm_80", "sm_90", "gfx942"])
@pytest.mark.parametrize("rows", [2, 18])
@pytest.mark.parametrize("quantize", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_fp8_with_and_without_the_hardware(gpu, rows, quantize, dtype):
    args = make((rows,), kind="fp8")
    with triton_runtime.assume(TARGETS[gpu]):
        check_op(quantized_linear, args, dict(quantize_activations=quantize), backend="triton", dtype=dtype)


@pytest.mark.parametrize("rows", [2, 18])
@pytest.mark.parametrize("name", ["int8", "int4", "fp8"])
@pytest.mark.parametrize("activation", [None, "gelu", "silu"])
def test_epilogue_and_gradients(activation, name, rows):
    gate = torch.randn(21) if activation == "gelu" else torch.tensor(0.4)
    kwargs = dict(
        activation=activation, residual=torch.randn(rows, 21, requires_grad=True), row_mask=torch.rand(rows) > 0.3,
        gate=gate.requires_grad_(),
    )  # fmt: skip
    args = make((rows,), 130, grad=True, **WEIGHTS[name])
    check_op(quantized_linear, args, kwargs, backend="triton", dtype=torch.bfloat16)


@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize("rows", [1, 17])
def test_the_codes_are_unpacked_as_torch_does(name, rows):
    """Each row of x picks one column: the product is the weight itself, element by element."""
    weight = make((), **WEIGHTS[name])[1]
    k = weight.shape[1]
    want = weight.dequantize(torch.float32)
    picked = torch.eye(k)[torch.randperm(k)[: 4 * rows]].split(rows)
    for x in picked:
        with vlmops.use_backend("triton"):
            torch.testing.assert_close(quantized_linear(x, weight), x @ want.t(), rtol=1e-6, atol=0)


def test_every_e4m3_byte_is_decoded():
    bits = torch.tensor([b for b in range(256) if b & 0x7F != 0x7F], dtype=torch.uint8)
    data = torch.zeros(254, 128, dtype=torch.uint8)
    data[:, 5] = bits
    weight = QuantizedWeight(
        "fp8", data.view(torch.float8_e4m3fn), torch.ones(1, 254), None, None, (254, 128), torch.float32
    )
    x = torch.zeros(1, 128)
    x[0, 5] = 1.0
    for gpu, rows in (("sm_80", 1), ("sm_80", 16), ("sm_90", 16)):
        with vlmops.use_backend("triton"), triton_runtime.assume(TARGETS[gpu]):
            got = quantized_linear(x.expand(rows, -1), weight)[0]
            assert torch.equal(got, bits.view(torch.float8_e4m3fn).float())


@pytest.mark.parametrize("native", [False, True])
@pytest.mark.parametrize("k", [1, 100, 300])
def test_rows_are_rounded_as_torch_does(native, k, monkeypatch):
    monkeypatch.setattr(backend, "WHOLE", 256)
    x = torch.randn(6, k) * torch.tensor([1.0, 1e-3, 3e4, 0.0, 1e-30, 448.0])[:, None]
    x[0, 0], x[1, k // 2] = float("nan"), float("inf")
    codes, scale = backend.quantize_rows(x, native)
    want = power_of_two_scale(torch.where(x.isfinite(), x, 0.0).abs().amax(1))
    torch.testing.assert_close((codes.float() * scale[:, None]), round_e4m3(x / want[:, None]) * want[:, None],
                               rtol=0, atol=0, equal_nan=True)  # fmt: skip


def test_rounding_to_e4m3_at_every_boundary():
    """All e4m3 numbers, the midpoints between them and the floats next to those."""
    numbers = torch.arange(0, 0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    middle = (numbers[1:] + numbers[:-1]) / 2
    x = torch.cat([numbers, middle, middle.nextafter(torch.tensor(0.0)), middle.nextafter(torch.tensor(500.0))])
    x = torch.cat([x, -x, torch.tensor([448.0])])[None]
    for native in (False, True):
        codes, scale = backend.quantize_rows(x, native)
        assert float(scale) == 1.0
        assert torch.equal(codes.float(), x.to(torch.float8_e4m3fn).float())


@given(
    rows=st.lists(st.integers(0, 5), max_size=2), k=st.integers(1, 300), n=st.integers(1, 70),
    name=st.sampled_from(sorted(WEIGHTS)), bias=st.booleans(), strided=st.booleans(), quantize=st.booleans(),
)  # fmt: skip
@settings(max_examples=25, deadline=None)
def test_random_shapes(rows, k, n, name, bias, strided, quantize):
    x, weight, b = make(rows, k, n, bias, **WEIGHTS[name])
    if strided:
        x = torch.randn(*rows, 2 * k)[..., ::2]
    options = dict(quantize_activations=quantize and name == "fp8")
    check_op(quantized_linear, (x, weight, b), options, backend="triton", dtype=torch.float32)


def test_wide_rows_and_a_strided_residual():
    args = make((3,), 1300, 9, kind="int4")
    residual = torch.randn(3, 18)[:, ::2]
    check_op(quantized_linear, args, dict(residual=residual), backend="triton", dtype=torch.float16)


def test_a_nan_stays_in_its_row():
    x, weight, _ = make((18,), kind="fp8")
    x[4, 7], x[5, 3] = float("nan"), float("inf")
    for quantize in (False, True):
        with vlmops.use_backend("triton"):
            out = quantized_linear(x, weight, quantize_activations=quantize)
        assert out[4].isnan().all() and not out[5].isfinite().any()
        assert out[torch.arange(18) // 2 != 2].isfinite().all()


@pytest.mark.parametrize("name", ["int8", "int8 g128", "int4", "int4 g64", "fp8"])
def test_few_rows_read_each_byte_of_the_weight_once(name):
    x, weight, bias = make((2,), 1024, 32, **WEIGHTS[name])
    x, bias = x.bfloat16(), bias.bfloat16()
    with triton_interpreter.count() as seen, vlmops.use_backend("triton"):
        quantized_linear(x, weight, bias)
    args = arguments(x, weight, bias)
    block = backend.gemv_configs(2, weight.data.shape[1])[0]
    assert seen.bytes <= 1.15 * cost(*args, block_n=block["BN"]).bytes
    # Less what x, in every program, is read again: a cache serves that.
    again = x.numel() * 2 * (32 // block["BN"] - 1)
    assert seen.bytes - again <= 1.15 * cost(*args).bytes


def arguments(x, weight, bias=None, quantize=False):
    parts = (weight.data, weight.scale, weight.zero, weight.kind, weight.group_size or 0, weight.shape[1])
    return (x, *parts, bias, "", None, None, None, quantize)


@pytest.mark.parametrize("name", ["int8", "int4", "fp8"])
@pytest.mark.parametrize("quantize", [False, True])
def test_many_rows_move_and_compute_the_least(name, quantize):
    quantize = quantize and name == "fp8"
    x, weight, _ = make((128,), 256, 128, bias=False, **WEIGHTS[name])
    x = x.bfloat16()
    with triton_runtime.assume(TARGETS["sm_90"]):
        with triton_interpreter.count() as seen, vlmops.use_backend("triton"):
            quantized_linear(x, weight, quantize_activations=quantize)
        block = backend.gemm_configs(x.to(torch.float8_e4m3fn) if quantize else x, 128, 128, weight.kind)[0]
    least = cost(*arguments(x, weight, None, quantize), block_m=block["BM"], block_n=block["BN"])
    assert seen.flops == least.flops
    assert seen.bytes <= 1.15 * least.bytes
