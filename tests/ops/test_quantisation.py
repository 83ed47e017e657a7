"""Quantised weights: error bounds of each kind, packing, odd widths, what is refused; e4m3 scales."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vlmops.ops import QuantizedWeight, quantize_weight
from vlmops.ops._shared.quantisation import finite_max, power_of_two_scale, round_e4m3

FORMATS = {
    "int8": dict(kind="int8"),
    "int8 g32": dict(kind="int8", group_size=32),
    "int8 g256": dict(kind="int8", group_size=256),
    "int4": dict(kind="int4"),
    "int4 g32": dict(kind="int4", group_size=32),
    "int4 g64": dict(kind="int4", group_size=64),
    "int4 g384": dict(kind="int4", group_size=384),
    "int4 symmetric": dict(kind="int4", symmetric=True),
    "fp8": dict(kind="fp8"),
}  # fmt: skip
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def weights(name: str, n: int = 6, k: int = 300) -> torch.Tensor:
    w = torch.randn(n, k)
    if name == "outliers":
        w[1, 7], w[2, k - 1], w[3, 0] = 300.0, -300.0, 80.0
    elif name == "positive":
        w = w.abs() + 4.0
    elif name == "tiny":
        w = w * 1e-5
    w[0] = 0.0
    return w


def half_step(w: torch.Tensor, options: dict) -> torch.Tensor:
    """[N, K] the largest error that the docstring allows, worked out group by group."""
    kind, k = options["kind"], w.shape[1]
    size = options.get("group_size") or (128 if kind == "int4" else k)
    parts = []
    for part in w.double().split(size, 1):
        most = part.abs().amax(1, keepdim=True)
        if kind == "int8":
            bound = (most / 254).expand_as(part)
        elif kind == "fp8":
            bound = torch.maximum(part.abs() / 16, most / 2**18)
        elif options.get("symmetric"):
            bound = (most / 14).expand_as(part)
        else:
            bound = ((part.amax(1).clamp(min=0) - part.amin(1).clamp(max=0)) / 30)[:, None].expand_as(part)
        parts.append(bound)
    return torch.cat(parts, 1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["random", "outliers", "positive", "tiny"])
@pytest.mark.parametrize("form", FORMATS)
def test_the_error_is_half_a_step_at_most(form, name, dtype):
    w = weights(name).to(dtype)
    q = quantize_weight(w, **FORMATS[form])
    error = (q.dequantize(torch.float64) - w.double()).abs()
    bound = half_step(w, FORMATS[form])
    assert (error <= bound * (1 + 1e-4)).all()
    assert float((error[1:] / bound[1:]).max()) > 0.8  # the bound is reached
    assert q.dequantize().dtype == dtype and q.dequantize().shape == w.shape
    assert (q.dequantize()[0] == 0).all()  # a row of zeros stays one


@given(n=st.integers(0, 5), k=st.integers(0, 400), form=st.sampled_from(sorted(FORMATS)))
@settings(max_examples=40, deadline=None)
def test_any_width(n, k, form):
    w = torch.randn(n, k)
    q = quantize_weight(w, **FORMATS[form])
    assert q.dequantize().shape == (n, k)
    assert q.data.shape[1] % 64 == 0
    if w.numel():
        assert ((q.dequantize(torch.float64) - w.double()).abs() <= half_step(w, FORMATS[form]) * (1 + 1e-4)).all()


def test_codes_that_are_exact_come_back():
    """Weights that are a scale times whole numbers: nothing is lost, whatever the padding does."""
    codes = torch.randint(-7, 8, (5, 200)).float()
    codes[:, ::32] = 7.0
    for options in (dict(kind="int4", symmetric=True), dict(kind="int4", symmetric=True, group_size=32)):
        assert torch.equal(quantize_weight(codes * 0.25, **options).dequantize(), codes * 0.25)
    codes = torch.randint(0, 16, (5, 200)).float()
    codes[:, ::32], codes[:, 1::32] = 0.0, 15.0
    assert torch.equal(quantize_weight((codes - 6) * 0.5, "int4", group_size=32).dequantize(), (codes - 6) * 0.5)
    codes = torch.randint(-127, 128, (5, 200)).float()
    codes[:, 0] = -127.0
    assert torch.equal(quantize_weight(codes / 8, "int8").dequantize(), codes / 8)
    numbers = torch.tensor([448.0, -448.0, 0.0, 2.0**-9, 1.75, -0.8125]).repeat(5, 30)
    assert torch.equal(quantize_weight(numbers, "fp8").dequantize(), numbers)


def test_the_halves_of_a_byte_are_where_they_are_said_to_be():
    w = torch.zeros(1, 130)
    w[0, 3], w[0, 70], w[0, 129], w[0, 0], w[0, 128] = 3.0, 5.0, 2.0, 7.0, 7.0
    q = quantize_weight(w, "int4", symmetric=True)
    data = q.data[0]
    assert data.shape == (128,)
    assert int(data[3] & 15) == 8 + 3 and int(data[6] >> 4) == 8 + 5 and int(data[64 + 1] & 15) == 8 + 2
    assert torch.equal(q.dequantize(), w)


def test_size_and_device():
    q = quantize_weight(torch.randn(64, 1024, dtype=torch.bfloat16), "int4")
    assert q.nbytes == 64 * 512 + 8 * 64 * 4 + 8 * 64
    assert q.group_size == 128 and q.shape == (64, 1024) and q.dtype == torch.bfloat16 and q.device.type == "cpu"
    moved = q.to("meta")
    assert moved.device.type == "meta" and moved.zero.device.type == "meta" and moved.shape == q.shape
    assert quantize_weight(torch.randn(64, 1024), "int8").nbytes == 64 * 1024 + 64 * 4


def test_a_weight_that_requires_a_gradient_is_taken_as_it_is():
    w = torch.nn.Parameter(torch.randn(4, 128))
    assert not quantize_weight(w, "int8").scale.requires_grad


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(kind="int2"), ValueError, "kind: expected one of int8, int4, fp8"),
        (dict(weight=torch.randn(3)), ValueError, "weight: expected 2 dimensions"),
        (dict(weight=[1.0]), TypeError, "weight: expected a tensor"),
        (dict(weight=torch.ones(2, 2, dtype=torch.int32)), TypeError, "weight: expected a floating-point"),
        (dict(weight=torch.tensor([[1.0, float("nan")]])), ValueError, "weight: NaN or infinity"),
        (dict(weight=torch.tensor([[1.0, float("-inf")]])), ValueError, "weight: NaN or infinity"),
        (dict(group_size=100), ValueError, "group_size: expected 32, 64, a multiple of 128"),
        (dict(group_size=0), ValueError, "group_size"),
        (dict(group_size=-128), ValueError, "group_size"),
        (dict(kind="fp8", group_size=128), ValueError, "group_size: expected None with fp8"),
        (dict(symmetric=True), ValueError, "symmetric: int4 only"),
    ],
)
def test_bad_input(change, error, message):
    args = {"weight": torch.randn(4, 8), "kind": "int8", **change}
    with pytest.raises(error, match=message):
        quantize_weight(args.pop("weight"), args.pop("kind"), **args)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(kind="fp4"), ValueError, "kind"),
        (dict(data=torch.zeros(4, 64, dtype=torch.int8)), TypeError, "data: expected uint8 for int4"),
        (dict(data=torch.zeros(4, 65, dtype=torch.uint8)), ValueError, "data: expected shape"),
        (dict(scale=torch.ones(1, 4, dtype=torch.bfloat16)), TypeError, "scale: expected float32"),
        (dict(scale=torch.ones(4, 1)), ValueError, "scale: expected shape"),
        (dict(zero=torch.zeros(1, 4)), TypeError, "zero: expected uint8"),
        (dict(zero=torch.zeros(2, 4, dtype=torch.uint8)), ValueError, "zero: expected shape"),
        (dict(scale=torch.ones(1, 4, device="meta")), ValueError, "scale: expected on cpu"),
    ],
)
def test_parts_that_do_not_fit(change, error, message):
    parts = dict(
        kind="int4", data=torch.zeros(4, 64, dtype=torch.uint8), scale=torch.ones(1, 4), zero=None, group_size=128,
        shape=(4, 100), dtype=torch.float32,
    )  # fmt: skip
    QuantizedWeight(**parts)
    with pytest.raises(error, match=message):
        QuantizedWeight(**{**parts, **change})


def test_power_of_two_scales():
    sizes = torch.tensor([448.0, 448.0001, 447.9, 1.75, 1.7500001, 0.0, 1e-45, 3.4e38])
    scale = power_of_two_scale(sizes)
    assert torch.equal(scale.log2(), scale.log2().round())
    assert ((sizes / scale) <= 448).all()
    assert ((sizes / scale)[[0, 1, 2, 3, 4, 7]] > 223).all()
    assert scale.tolist()[:5] == [1.0, 2.0, 1.0, 2.0**-8, 2.0**-7]
    for e in range(-100, 100, 7):
        assert math.log2(float(power_of_two_scale(torch.tensor(448.0 * 2.0**e)))) == e


def test_rounding_to_e4m3():
    x = torch.tensor([0.0, 1.0625, 1.1875, -448.0, 2.0**-10, 3 * 2.0**-10, 447.0, float("inf"), float("nan")])
    want = torch.tensor([0.0, 1.0, 1.25, -448.0, 0.0, 2 * 2.0**-9, 448.0, float("nan"), float("nan")])
    torch.testing.assert_close(round_e4m3(x), want, rtol=0, atol=0, equal_nan=True)
    assert finite_max(x, 0) == 448.0 and finite_max(x[7:], 0) == 0.0 and finite_max(x[:0], 0) == 0.0
