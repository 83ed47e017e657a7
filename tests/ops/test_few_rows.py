"""Products of few rows on the CPU: every shape against the oracle, nothing packed, every instruction set, bad input."""

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
from tests.support.ops import check_op
from vlmops.backends import native
from vlmops.ops import linear, mlp
from vlmops.ops._shared import gemm_cpu
from vlmops.ops._shared.activations import ACTIVATIONS, activate
from vlmops.ops._shared.packing import STORE
from vlmops.profiling.tolerance import EPS

pytestmark = [
    pytest.mark.native,
    pytest.mark.skipif(not native.available(), reason="no native library"),
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ISAS = ["generic", "neon", "avx2", "avx512", "avx512_bf16"]


def few_rows(x, weight, bias=None, activation="", wide=False):
    """The kernel itself, into a result full of NaN."""
    out = torch.full((x.shape[0], weight.shape[0]), float("nan"), dtype=torch.float32 if wide else weight.dtype)
    torch.ops.vlmops_cpu.few_rows(x, weight, bias, gemm_cpu.STREAMED[activation], out)
    return out


def check_kernel(rows, k, n, dtype, activation, bias, wide):
    """The kernel against float64, by twice the error of torch's own product and activation."""
    x, weight = torch.randn(rows, k).to(dtype), (torch.randn(n, k) * k**-0.5).to(dtype)
    b = torch.randn(n).to(dtype) if bias else None
    mine = few_rows(x.float() if wide else x, weight, b, activation, wide)
    truth = activate(F.linear(x.double(), weight.double(), None if b is None else b.double()), activation)
    if wide:  # as exact as a product of float32
        theirs = activate(F.linear(x.float(), weight.float(), None if b is None else b.float()), activation)
    else:
        theirs = activate(F.linear(x, weight, b), activation)
    bound = 2 * (theirs - truth).abs().max() + EPS[mine.dtype] * truth.abs().max().clamp_min(1)
    assert mine.isfinite().all()
    assert (mine - truth).abs().max() <= bound


@given(
    rows=st.integers(1, 17), k=st.integers(1, 70), n=st.integers(1, 41), dtype=st.sampled_from(DTYPES),
    activation=st.sampled_from(list(gemm_cpu.STREAMED)), bias=st.booleans(), wide=st.booleans(),
)  # fmt: skip
@settings(max_examples=150, deadline=None)
def test_any_shape(rows, k, n, dtype, activation, bias, wide):
    check_kernel(rows, k, n, dtype, activation, bias, wide)


@pytest.mark.parametrize("dtype", DTYPES)
def test_columns_are_split_among_threads(dtype):
    assert torch.get_num_threads() > 1
    check_kernel(3, 4096, 515, dtype, "silu", True, False)


def test_no_depth_gives_the_bias():
    bias = torch.randn(20)
    assert torch.equal(few_rows(torch.empty(2, 0), torch.empty(20, 0), bias), bias.expand(2, 20))


@pytest.mark.parametrize("rows", [0, 1])
def test_no_columns_or_no_rows(rows):
    assert few_rows(torch.randn(rows, 8), torch.randn(0, 8)).shape == (rows, 0)
    assert few_rows(torch.randn(0, 8), torch.randn(5, 8)).shape == (0, 5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_nan_stays_in_its_row_and_column(dtype):
    x, weight = torch.randn(5, 33).to(dtype), torch.randn(23, 33).to(dtype)
    x[2, 32] = float("nan")
    weight[22, 0] = float("inf")
    out = few_rows(x, weight)
    assert out[2].isnan().all()
    assert out[[0, 1, 3, 4], :22].isfinite().all()
    assert out[[0, 1, 3, 4], 22].isinf().all()


@pytest.mark.parametrize("rows", [1, 2, 3, gemm_cpu.FEW_ROWS, gemm_cpu.FEW_ROWS + 1])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", [None, *ACTIVATIONS])
def test_linear(rows, dtype, activation):
    """Around the number of rows at which the kernel changes, with everything that may follow a product."""
    arguments = torch.randn(rows, 70), torch.randn(50, 70) * 0.2, torch.randn(50)
    rest = dict(gate=torch.randn(50), residual=torch.randn(rows, 50), row_mask=torch.arange(rows) % 3 != 1)
    check_op(linear, arguments, {**rest, "activation": activation}, backend="cpu", dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gated", [False, True])
def test_mlp(dtype, gated):
    x, w1, b1, w2, b2 = torch.randn(2, 40), torch.randn(64, 40) * 0.2, torch.randn(64), torch.randn(24, 64) * 0.2, None
    options = dict(w_gate=torch.randn(64, 40) * 0.2, activation="silu") if gated else dict(activation="gelu")
    check_op(mlp, (x, w1, b1, w2, b2), options, backend="cpu", dtype=dtype)


@pytest.mark.skipif(native.isa() == "generic", reason="the generic set packs: it widens element by element")
@pytest.mark.parametrize("dtype", DTYPES)
def test_nothing_is_packed(dtype):
    """Decoding alone takes no second copy of the weights; and the values are those of the moment."""
    layer = torch.nn.Linear(64, 96).to(dtype)
    x = torch.randn(gemm_cpu.FEW_ROWS, 64).to(dtype)
    before = STORE.bytes
    with vlmops.use_backend("cpu"), torch.no_grad():
        linear(x, layer.weight, layer.bias)
        layer.weight.view(-1).data.zero_()
        assert torch.equal(linear(x, layer.weight, layer.bias), layer.bias.expand(len(x), -1))
    assert STORE.bytes == before


@pytest.mark.parametrize("isa", ISAS)
def test_every_instruction_set(isa):
    if ISAS.index(isa) > ISAS.index(native.isa()) or ((isa == "neon") != (native.isa() == "neon") and isa != "generic"):
        pytest.skip("not on this CPU")
    code = """
from tests.ops.test_few_rows import DTYPES, check_kernel, gemm_cpu
from vlmops.backends import native
for dtype in DTYPES:
    for rows, k, n in ((1, 33, 5), (4, 64, 16), (7, 19, 9)):
        for activation in gemm_cpu.STREAMED:
            for wide in (False, True):
                check_kernel(rows, k, n, dtype, activation, True, wide)
print(native.isa())
"""
    environment = {**os.environ, "VLMOPS_CPU_ISA": isa}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == isa


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(weight=torch.empty(16, 6).t()), "weight: expected contiguous"),
        (dict(x=torch.empty(3, 15)), "x: expected"),
        (dict(x=torch.empty(3, 16).double()), "x: expected float32"),
        (dict(out=torch.empty(3, 7)), "out: expected contiguous"),
        (dict(out=torch.empty(3, 6).half()), "out: expected float32"),
        (dict(bias=torch.empty(7)), "bias: expected"),
        (dict(bias=torch.empty(6).half()), "bias: expected"),
        (dict(activation=4), "activation: expected"),
    ],
)
def test_bad_arguments(change, message):
    given = dict(x=torch.empty(3, 16), weight=torch.empty(6, 16), bias=None, activation=0, out=torch.empty(3, 6))
    with pytest.raises((TypeError, ValueError), match=message):
        torch.ops.vlmops_cpu.few_rows(**{**given, **change})
