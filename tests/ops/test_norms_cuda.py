"""The CUDA norms on the SIMT machine: parity, gradients, mixed dtypes, every shape of a row, traffic."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import vlmops
from tests.ops.test_norms import LAYER_CASES, RMS_CASES, make
from tests.support.cuda_machine import DTYPES, check_on_machine, counted, simt
from tests.support.ops import check_op, opcheck
from vlmops.backends import cuda_runtime
from vlmops.ops import layer_norm, rms_norm
from vlmops.ops.norms import cuda as backend
from vlmops.ops.norms.cost import backward_cost, cost

__all__ = ["simt"]

#: Rows of one warp, of blocks of every size, in accesses of every width.
WIDTHS = [17, 40, 200, 515, 1022, 1290, 4100]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", RMS_CASES)
def test_rms_norm(case, dtype):
    shapes, options = RMS_CASES[case]
    if case == "many rows":
        shapes = dict(shape=(150, 33))
    args, named = make(**{"bias": None, **shapes})
    check_on_machine(rms_norm, args, {**named, **options}, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", LAYER_CASES)
def test_layer_norm(case, dtype):
    shapes, options = LAYER_CASES[case]
    if case == "many rows":
        shapes = dict(shape=(150, 33), residual=True)
    args, named = make(**shapes)
    check_on_machine(layer_norm, args, {**named, **options}, dtype)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("center", [False, True])
def test_every_shape_of_a_row(width, center):
    args, named = make((3, width), bias=True if center else None, residual=center)
    check_on_machine(layer_norm if center else rms_norm, args, {**named, "eps": 1e-5}, torch.bfloat16)


def test_the_longest_rows():
    """Blocks of 512 and 1024 threads."""
    x, w = torch.randn(2, 9000, requires_grad=True), torch.randn(9000)
    check_op(layer_norm, (x, w), dict(eps=1e-5), backend="cuda", dtype=torch.bfloat16)


@given(rows=st.integers(0, 20), cols=st.sampled_from([1, 2, 3, 12, 36, 100, 258]), center=st.booleans(),
       residual=st.booleans())  # fmt: skip
@settings(max_examples=15, deadline=None)
def test_any_shape(rows, cols, center, residual):
    args, named = make((rows, cols), bias=True if center else None, residual=residual)
    check_op(layer_norm if center else rms_norm, args, {**named, "eps": 1e-5}, backend="cuda", dtype=torch.float32)


@pytest.mark.parametrize("width", [24, 600])
@pytest.mark.parametrize("wanted", ["x", "weight", "bias"])
@pytest.mark.parametrize("center", [False, True])
def test_one_gradient_alone(wanted, center, width):
    """Frozen weights, or a frozen input: the others' null pointers are left alone, and blocks that skip a sum do not race."""
    (x,), named = make((14 if width > 100 else 70, width), bias=True if center else None)
    for name, t in {"x": x, **named}.items():
        t.requires_grad_(name == wanted)
    if named.get(wanted, x).requires_grad:
        check_on_machine(layer_norm if center else rms_norm, (x,), {**named, "eps": 1e-5}, torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("parameters", [torch.float32, torch.float16])
def test_parameters_of_another_dtype(parameters, dtype):
    """A float32 weight makes RMSNorm's result float32 (Llama), and its gradient comes in as float32."""
    x = torch.randn(7, 40, dtype=dtype, requires_grad=True)
    w = torch.randn(40).to(parameters).requires_grad_()
    results = {}
    for name in ("cuda", "torch"):
        with vlmops.use_backend(name):
            out = rms_norm(x, w, eps=1e-6)
        torch.manual_seed(1)
        results[name] = (out, *torch.autograd.grad(out, [x, w], torch.randn(out.shape).to(out.dtype)))
    for mine, plain in zip(results["cuda"], results["torch"], strict=True):
        assert mine.dtype == plain.dtype
        torch.testing.assert_close(mine, plain, rtol=2e-2 if plain.dtype != torch.float32 else 1e-4, atol=1e-2)


def test_llamas_rounding_is_kept():
    """The row is rounded before it meets the weight: bit for bit transformers', up to the last bit of the root."""
    x, w = torch.randn(32, 96).bfloat16(), torch.randn(96).bfloat16()
    with vlmops.use_backend("cuda"):
        out = rms_norm(x, w, eps=1e-6)
    with vlmops.use_backend("torch"):
        assert (out != rms_norm(x, w, eps=1e-6)).sum() <= 3


def test_strided_rows():
    x = torch.randn(9, 80)[:, 3:43].requires_grad_()
    check_on_machine(layer_norm, (x, torch.randn(80)[::2], torch.randn(40)), dict(eps=1e-5), torch.float32)


def test_a_large_mean_loses_no_digits():
    args, named = make((4, 256))
    check_on_machine(layer_norm, ((args[0].detach() + 1000).requires_grad_(),), {**named, "eps": 1e-5}, torch.float32)


def test_a_nan_stays_in_its_row():
    x = torch.randn(9, 40)
    x[3, 5] = float("nan")
    with vlmops.use_backend("cuda"):
        out = layer_norm(x, eps=1e-5)
    assert out[3].isnan().all() and out[torch.arange(9) != 3].isfinite().all()


def test_rows_that_fit_no_block_are_refused():
    with vlmops.use_backend("cuda"), pytest.raises(vlmops.backends.BackendError, match="at most 16384"):
        rms_norm(torch.zeros(1, 16385), eps=1e-6)


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("width", [256, 1024, 2048])
def test_traffic_is_the_least(width, residual):
    """Each row once, by whole sectors; the weight once a row group, from the cache."""
    x, w = torch.randn(16, width).bfloat16(), torch.randn(width).bfloat16()
    r = x.clone() if residual else None
    with counted() as seen:
        rms_norm(x, w, eps=1e-6, residual=r)
    least = cost(x, r, w, None, 1e-6, 0.0, False, programs=16)
    assert seen["global_load_bytes"] + seen["global_store_bytes"] == least.bytes
    assert seen["global_load_unique_bytes"] == cost(x, r, w, None, 1e-6, 0.0, False).read
    assert seen["global_load_sectors"] * 32 == seen["global_load_bytes"]
    assert seen["global_store_sectors"] * 32 == seen["global_store_bytes"]


def test_traffic_of_the_backward_is_the_least():
    x, w = torch.randn(256, 512).bfloat16().requires_grad_(), torch.randn(512).bfloat16().requires_grad_()
    with vlmops.use_backend("cuda"):
        out = rms_norm(x, w, eps=1e-6)
    with counted() as seen:
        out.backward(torch.randn_like(out))
    blocks = cuda_runtime.SIMT.processors * 2  # 256 rows, 32 a block
    least = backward_cost(x, w, None, 1, programs=blocks)
    assert seen["global_load_unique_bytes"] + seen["global_store_unique_bytes"] <= 1.05 * least.bytes
    assert seen["global_load_sectors"] * 32 == seen["global_load_bytes"]
    assert seen["global_store_sectors"] * 32 == seen["global_store_bytes"]


def test_the_backward_is_deterministic():
    """Partial sums in a fixed order: bit for bit the same under any schedule."""
    from vlmops.backends import cuda_simt

    x, w = torch.randn(200, 24, requires_grad=True), torch.randn(24, requires_grad=True)
    found = []
    for name in cuda_simt.SCHEDULES:
        with vlmops.use_backend("cuda"), cuda_simt.schedule(name, seed=7):
            found.append(torch.autograd.grad(rms_norm(x, w, eps=1e-6).square().sum(), [x, w]))
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize(("width", "lanes", "items"), [(1024, 32, 4), (1152, 128, 2), (4096, 128, 4), (16384, 512, 4)])
def test_shape_of_a_row(width, lanes, items):
    assert backend._shape(width, 8, 32) == (lanes, items)


def test_opcheck():
    (x,), named = make((4, 20), residual=True)
    args = (x, named["residual"], named["weight"], named["bias"], 1e-5, 0.0, True, "cuda")
    opcheck(torch.ops.vlmops.norms.default, args)
