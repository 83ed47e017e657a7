"""mlp's Triton kernels in the interpreter: parity, every gradient, gathers read where they lie, descriptors, traffic."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import vlmops
from tests.ops.test_gemm_triton import addresses, every_config
from tests.ops.test_mlp import DTYPES, EXTRAS, extras, make, plain
from tests.support import triton_interpreter
from tests.support.ops import check_op, opcheck
from vlmops.backends import triton_runtime
from vlmops.backends.triton_runtime import TARGETS
from vlmops.ops import mlp
from vlmops.ops._shared.activations import ACTIVATIONS
from vlmops.ops._shared.triton_gemm_launch import Gathered, gather_rows, gemm
from vlmops.ops.mlp.cost import backward_cost, cost
from vlmops.ops.mlp.layout import gather_rows as gather_plain

pytest.importorskip("triton")
triton_interpreter.install()

SIZES = dict(c=17, h=24, n=20)


def check(args, kwargs, dtype=torch.float32, lowprec=plain):
    check_op(mlp, args, kwargs, backend="triton", dtype=dtype, lowprec=lowprec)


def gathered(x, *args, gather, norm=None, **kwargs):
    """mlp with a gather as a model's own code computes it."""
    from tests.ops.test_mlp import norm_of

    kind, height, width = (gather, 0, 0) if isinstance(gather, str) else gather
    return plain(gather_plain(norm_of(x, norm), kind, height, width), *args, **kwargs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", EXTRAS)
def test_surroundings_and_their_gradients(name, dtype):
    kwargs = dict(activation="gelu", **extras(name, True, rows=(6,), **SIZES))
    check(make((6,), biases=name != "gated, no bias", grad=True, **SIZES), kwargs, dtype)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("name", ["plain", "gated", "everything"])
def test_activations_and_their_gradients(name, activation):
    kwargs = dict(activation=activation, **extras(name, True, rows=(6,), **SIZES))
    check(make((6,), grad=True, **SIZES), kwargs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["plain", "gated", "everything"])
def test_few_rows(name, dtype):
    for rows in (1, 3):
        check(make((rows,), **SIZES), dict(activation="silu", **extras(name, rows=(rows,), **SIZES)), dtype)


GATHERS = {
    "merge2x2": ((24,), "merge2x2"),
    "pixel_shuffle": ((2, 24), ("pixel_shuffle", 4, 6)),
    "one picture": ((1, 4), ("pixel_shuffle", 2, 2)),
    "wide pictures": ((3, 16), ("pixel_shuffle", 2, 8)),
    "no pictures": ((0, 24), ("pixel_shuffle", 4, 6)),
    "no rows": ((0,), "merge2x2"),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", GATHERS)
def test_gathers(case, dtype):
    rows, gather = GATHERS[case]
    args = make(rows, c=5, h=24, n=7, wide=4, grad=True)
    out_rows = (rows[0], rows[1] // 4) if len(rows) == 2 else (rows[0] // 4,)
    residual = torch.randn(*out_rows, 7, requires_grad=True)
    check(args, dict(activation="gelu", gather=gather, residual=residual), dtype, gathered)


@pytest.mark.parametrize("case", ["merge2x2", "pixel_shuffle"])
@pytest.mark.parametrize("name", ["gated", "layer_norm", "rms_norm"])
def test_gathers_with_gates_and_norms(case, name):
    rows, gather = GATHERS[case]
    sizes = dict(c=8, h=20, n=7, wide=4)
    args = make(rows, grad=True, **sizes)
    check(args, dict(activation="silu", gather=gather, **extras(name, True, **sizes)), lowprec=gathered)


def test_pictures_without_their_class_token():
    """A slice of wider pictures is read in place: rows, pictures and channels keep their strides."""
    x = torch.randn(2, 25, 5)[:, 1:]
    rows = gather_rows(x, "pixel_shuffle", 4, 6)
    assert isinstance(rows, Gathered) and rows.source.data_ptr() == x.data_ptr() and rows.strides == (5, 125)
    args = make((2, 24), c=5, h=24, n=7, wide=4, grad=True)
    check((x.requires_grad_(), *args[1:]), dict(activation="gelu", gather=("pixel_shuffle", 4, 6)), lowprec=gathered)
    wide = torch.randn(24, 9)[:, 2:7]
    assert gather_rows(wide, "merge2x2", 0, 0).source.data_ptr() == wide.data_ptr()
    check((wide.requires_grad_(), *args[1:]), dict(activation="gelu", gather="merge2x2"), lowprec=gathered)
    whole = torch.randn(24, 5)
    assert gather_rows(whole, "merge2x2", 0, 0).data_ptr() == whole.data_ptr()


def test_a_gather_is_never_written_out(monkeypatch):
    """Every address of x that the product reads belongs to x itself, in its own layout."""
    x = torch.empty_strided((2, 16, 8), (1024, 16, 1), device="meta", dtype=torch.bfloat16)
    weight = torch.empty(3, 32, device="meta", dtype=torch.bfloat16)
    at = addresses(monkeypatch, lambda: gemm(gather_rows(x, "pixel_shuffle", 4, 4), weight))
    for picture in range(2):
        for token in range(16):
            assert at(x, picture * 1024 + token * 16) and at(x, picture * 1024 + token * 16 + 7)
            assert not at(x, picture * 1024 + token * 16 + 8)


@pytest.mark.parametrize("name", ["plain", "gated", "layer_norm", "everything"])
def test_each_gradient_alone(name):
    args, kwargs = make((6,), grad=True, **SIZES), dict(activation="silu", **extras(name, True, rows=(6,), **SIZES))
    leaves = [t for t in (*args, *kwargs.values(), *(p for v in kwargs.values() if isinstance(v, tuple) for p in v))
              if isinstance(t, torch.Tensor)]  # fmt: skip

    def gradients(wanted):
        with vlmops.use_backend("triton"):
            return torch.autograd.grad(mlp(*args, **kwargs).square().sum(), wanted)

    together = gradients(leaves)
    for leaf, want in zip(leaves, together, strict=True):
        for other in leaves:
            other.requires_grad_(other is leaf)
        torch.testing.assert_close(gradients([leaf])[0], want)


@given(
    rows=st.lists(st.integers(0, 4), max_size=2), c=st.integers(1, 20), h=st.integers(1, 20), n=st.integers(1, 20),
    biases=st.booleans(), gated=st.booleans(), scaled=st.booleans(),
)  # fmt: skip
@settings(max_examples=8, deadline=None)
def test_any_shape(rows, c, h, n, biases, gated, scaled):
    args = make(rows, c, h, n, biases, grad=True)
    kwargs = dict(activation="silu", w_gate=torch.randn(h, c, requires_grad=True) if gated else None)
    kwargs["layer_scale"] = torch.randn(n, requires_grad=True) if scaled else None
    check(args, kwargs)


def test_many_rows():
    """More than one step for each program of the elementwise passes."""
    kwargs = dict(activation="silu", **extras("everything", True, rows=(300,), c=2, h=5, n=3))
    check(make((300,), c=2, h=5, n=3, grad=True), kwargs)


def test_empty_inner_sizes():
    for c, h, n in ((0, 5, 3), (5, 0, 3), (5, 3, 0)):
        check(make((6,), c, h, n, grad=True), dict(activation="relu", w_gate=torch.randn(h, c, requires_grad=True)))


def test_weights_in_any_layout():
    x, w1, b1, w2, b2 = make((6,), grad=True, **SIZES)
    w_gate = torch.randn(17, 24).t().requires_grad_()
    x = torch.randn(6, 34)[:, ::2].requires_grad_()
    w2 = torch.randn(24, 20).t().requires_grad_()
    check((x, w1, b1, w2, b2), dict(activation="silu", w_gate=w_gate, layer_scale=torch.randn(40)[::2]))


@pytest.mark.parametrize("name", ["gated", "everything"])
def test_tensor_descriptors(name):
    """Forward and every gradient by TMA, the sum of two products included."""
    sizes = dict(c=24, h=40, n=16)
    with triton_runtime.assume(TARGETS["sm_90"]):
        check(make((40,), grad=True, **sizes), dict(activation="silu", **extras(name, True, rows=(40,), **sizes)),
              torch.bfloat16)  # fmt: skip


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_every_configuration(monkeypatch, target):
    sizes = dict(c=24, h=40, n=16)
    args = make((70,), grad=True, **sizes)

    def run():
        with triton_runtime.assume(TARGETS[target]):
            check(args, dict(activation="silu", **extras("gated", True, **sizes)), torch.bfloat16)

    assert every_config(monkeypatch, run) >= 3


@pytest.mark.parametrize("name", ["gated", "everything"])
def test_two_runs_give_the_same_bits(name):
    args, kwargs = make((20,), grad=True, **SIZES), dict(activation="silu", **extras(name, True, rows=(20,), **SIZES))

    def run():
        with vlmops.use_backend("triton"):
            out = mlp(*args, **kwargs)
        return [out, *torch.autograd.grad(out.square().sum(), args)]

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


def test_a_nan_stays_in_its_row():
    args = make((6,), **SIZES)
    args[0][2, 3] = float("nan")
    with vlmops.use_backend("triton"):
        out = mlp(
            *args, activation="gelu", norm=("rms_norm", None, None, 1e-6), mid_norm=("layer_norm", None, None, 1e-6)
        )
    assert out[2].isnan().all() and out[[0, 1, 3, 4, 5]].isfinite().all()


def test_opcheck():
    x, w1, b1, w2, b2 = make((5,), grad=True, **SIZES)
    none = [None] * 2
    opcheck(
        torch.ops.vlmops.mlp.default,
        (x, w1, b1, w2, b2, *none, "gelu", None, "", *none, 0.0, "", *none, 0.0, None, "", 0, 0, False, "triton"),
    )


def test_what_is_refused():
    args = make((5,), c=16385, h=2, n=2)
    with vlmops.use_backend("triton"), pytest.raises(vlmops.backends.BackendError, match="at most 16384"):
        mlp(*args, activation="gelu", norm=("rms_norm", None, None, 1e-6))


def schema(args, w_gate):
    return (*args, w_gate, None, "gelu", None, "", None, None, 0.0, "", None, None, 0.0, None, "", 0, 0, False)


@pytest.mark.parametrize("gated", [False, True])
def test_work_of_forward_and_backward(gated):
    """No padding and no product twice: the least of cost.py exactly."""
    args = make((64,), c=64, h=128, n=64, grad=True)
    w_gate = torch.randn(128, 64, requires_grad=True) if gated else None
    with triton_interpreter.count() as seen, vlmops.use_backend("triton"):
        out = mlp(*args, activation="gelu", w_gate=w_gate)
    least = cost(*schema(args, w_gate))
    assert seen.flops == least.flops and seen.bytes >= least.bytes
    grad = torch.randn_like(out)
    with triton_interpreter.count() as seen:
        out.backward(grad)
    least = backward_cost(args[0], args[1], args[3], w_gate, "")
    assert seen.flops == least.flops and seen.bytes >= least.bytes


@pytest.mark.parametrize("gated", [False, True])
def test_traffic_of_few_rows_is_the_least(gated):
    args = tuple(None if t is None else t.bfloat16() for t in make((2,), c=256, h=64, n=64, biases=False))
    w_gate = torch.randn(64, 256).bfloat16() if gated else None
    with triton_interpreter.count() as seen, vlmops.use_backend("triton"):
        mlp(*args, activation="silu", w_gate=w_gate)
    again = 2 * 2 * (15 * 256 + 15 * 64)  # the rows of x and h, which every program of four columns reads: L2 has them
    assert seen.bytes - again <= 1.15 * cost(*schema(args, w_gate)).bytes
