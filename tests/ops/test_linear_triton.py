"""linear's Triton kernels in the interpreter: parity, every gradient, every layout, work and traffic."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import vlmops
from tests.ops.test_linear import DTYPES, plain
from tests.support import triton_interpreter
from tests.support.ops import check_op, opcheck
from vlmops.ops import linear
from vlmops.ops._shared import triton_gemm_launch as launch_code
from vlmops.ops._shared.activations import ACTIVATIONS
from vlmops.ops.linear.cost import backward_cost, cost

pytest.importorskip("triton")
triton_interpreter.install()

BF16 = torch.bfloat16


def make(rows=(5,), k=24, n=20, bias=True, grad=True):
    x = torch.randn(*rows, k, requires_grad=grad)
    return x, (torch.randn(n, k) * 0.2).requires_grad_(grad), torch.randn(n, requires_grad=grad) if bias else None


def some(*rows):
    """A row mask with both kinds of rows wherever there are two."""
    return (torch.arange(torch.Size(rows).numel()) % 3 != 1).view(rows)


def check(args, kwargs, dtype=torch.float32):
    check_op(linear, args, kwargs, backend="triton", dtype=dtype, lowprec=plain)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", [None, *ACTIVATIONS])
def test_activations(activation, dtype):
    check(make(), dict(activation=activation), dtype)


@pytest.mark.parametrize("dtype", DTYPES[:2])
@pytest.mark.parametrize("activation", [None, "quick_gelu"])
@pytest.mark.parametrize("gate_shape", [None, (), (1,), (20,)])
@pytest.mark.parametrize("masked", [False, True])
def test_epilogues(masked, gate_shape, activation, dtype):
    kwargs = dict(activation=activation, residual=torch.randn(2, 3, 20, requires_grad=True))
    if masked:
        kwargs["row_mask"] = some(2, 3)
    if gate_shape is not None:
        kwargs["gate"] = torch.randn(gate_shape, requires_grad=True)
    check(make((2, 3), bias=masked), kwargs, dtype)


def test_a_closed_gate_has_a_gradient():
    """Flamingo's gates begin at 0: the weight's gradient is 0 there, the gate's is not."""
    for gate in (torch.zeros(()), torch.zeros(20)):
        check(make(), dict(gate=gate.requires_grad_()))


def everything(rows, n=20, grad=False):
    return dict(
        activation="gelu", gate=torch.randn(n, requires_grad=grad), row_mask=some(*rows),
        residual=torch.randn(*rows, n, requires_grad=grad),
    )  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 2, 3, 4])
@pytest.mark.parametrize("k", [1, 40, 600])
def test_few_rows(rows, k, dtype):
    check(make((rows,), k, 11, grad=False), everything((rows,), 11), dtype)


@pytest.mark.parametrize(
    ("rows", "k", "n"), [((), 5, 7), ((6,), 0, 3), ((6,), 4, 0), ((0,), 4, 3), ((2, 0), 4, 3), ((6,), 1, 1), ((6,), 17, 3),
                         ((5,), 3, 17), ((1, 1, 6), 8, 8), ((130,), 3, 2), ((6,), 70, 2)]
)  # fmt: skip
@pytest.mark.parametrize("activation", [None, "silu"])
def test_odd_and_empty_shapes(rows, k, n, activation):
    check(make(rows, k, n), {**everything(rows, n, grad=True), "activation": activation})


def test_many_rows():
    """More than one step for each program of the elementwise passes."""
    gate = torch.randn(3, requires_grad=True)
    check(make((600,), 2, 3), dict(gate=gate, row_mask=some(600)))


LAYOUTS = {
    "every second column": lambda m, k: torch.randn(m, 2 * k)[:, ::2],
    "a slice of wide rows": lambda m, k: torch.randn(m, k + 5)[:, 2 : 2 + k],
    "transposed": lambda m, k: torch.randn(k, m).t(),
    "one row for all": lambda m, k: torch.randn(1, k).expand(m, k),
    "one number for all": lambda m, k: torch.randn(1, 1).expand(m, k),
    "every second row": lambda m, k: torch.randn(2 * m, k)[::2],
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout):
    x, weight, residual = (LAYOUTS[layout](*shape).detach().requires_grad_() for shape in ((6, 9), (7, 9), (6, 7)))
    gate, mask = torch.randn(14)[::2].requires_grad_(), some(12)[::2]
    check((x, weight, torch.randn(14)[::2]), dict(residual=residual, gate=gate, row_mask=mask))
    check((x, weight, None), dict(activation="silu", gate=gate, row_mask=mask))


def test_a_batch_without_its_first_token():
    x = torch.randn(2, 4, 9)[:, 1:].requires_grad_()
    check((x, *make(k=9)[1:]), dict(residual=torch.randn(2, 4, 20)[:, 1:]))


@pytest.mark.parametrize("like", ["ones", "expanded", "transposed"])
def test_gradients_that_come_in_any_layout(like):
    args = make((6,), 9, 7)
    gate = torch.randn(7, requires_grad=True)
    grad = {"ones": torch.ones(6, 7), "expanded": torch.ones(()).expand(6, 7), "transposed": torch.randn(7, 6).t()}[
        like
    ]
    for activation in (None, "gelu"):
        found = []
        for backend in ("triton", "torch"):
            with vlmops.use_backend(backend):
                out = linear(*args, activation=activation, gate=gate)
            found.append(torch.autograd.grad(out, (*args, gate), grad))
        torch.testing.assert_close(*found)


@given(
    rows=st.lists(st.integers(0, 5), max_size=2), k=st.integers(1, 40), n=st.integers(1, 40), bias=st.booleans(),
    activation=st.sampled_from([None, *ACTIVATIONS]), gate=st.sampled_from([None, "scalar", "vector"]), mask=st.booleans(),
)  # fmt: skip
@settings(max_examples=10, deadline=None)
def test_any_shape(rows, k, n, bias, activation, gate, mask):
    kwargs = dict(activation=activation, row_mask=some(*rows) if mask else None)
    kwargs["gate"] = None if gate is None else torch.randn(() if gate == "scalar" else n, requires_grad=True)
    check(make(rows, k, n, bias), kwargs)


@pytest.mark.parametrize("activation", [None, "gelu"])
@pytest.mark.parametrize("gate_shape", [(), (20,)])
def test_each_gradient_alone(activation, gate_shape):
    leaves = [*make(), torch.randn(gate_shape, requires_grad=True), torch.randn(5, 20, requires_grad=True)]
    mask = some(5)

    def gradients(wanted):
        with vlmops.use_backend("triton"):
            out = linear(*leaves[:3], activation=activation, gate=leaves[3], residual=leaves[4], row_mask=mask)
        return torch.autograd.grad(out, wanted, torch.linspace(-1, 1, 100).view(5, 20))

    together = gradients(leaves)
    for leaf, want in zip(leaves, together, strict=True):
        for other in leaves:
            other.requires_grad_(other is leaf)
        torch.testing.assert_close(gradients([leaf])[0], want)


def test_a_masked_row_is_zero_even_where_its_product_is_nan():
    x, w, b = make(grad=False)
    x[1] = float("nan")
    mask = torch.tensor([True, False, True, True, True])
    with vlmops.use_backend("triton"):
        out = linear(x, w, b, row_mask=mask)
    assert out[1].eq(0).all() and out.isfinite().all()


@pytest.mark.parametrize("rows", [3, 9])
def test_a_nan_stays_in_its_row(rows):
    x, w, b = make((rows,), grad=False)
    x[2, 3] = float("nan")
    with vlmops.use_backend("triton"):
        out = linear(x, w, b, activation="relu")
    assert out[2].isnan().all() and out[[i for i in range(rows) if i != 2]].isfinite().all()


@pytest.mark.parametrize("activation", [None, "gelu"])
def test_two_runs_give_the_same_bits(activation):
    leaves = [*make((70,), 9, 40), torch.randn(40, requires_grad=True)]

    def run():
        with vlmops.use_backend("triton"):
            out = linear(*leaves[:3], activation=activation, gate=leaves[3])
        return [out, *torch.autograd.grad(out.square().sum(), leaves)]

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


def test_opcheck():
    x, w, b = make()
    opcheck(torch.ops.vlmops.linear.default, (x, w, b, "gelu", None, None, torch.randn(5, 20), False, "triton"))


def test_what_is_refused():
    x, w, b = make(grad=False)
    with vlmops.use_backend("triton"), pytest.raises(vlmops.backends.BackendError, match="float64"):
        linear(x.double(), w.double(), b.double())
    assert "beside" in launch_code.why_not_gemm(x, w.double())


# -- work and traffic ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 4])
def test_traffic_of_few_rows_is_the_least(rows):
    """Decoding: the weight once; x, which every program reads, comes from the L2 cache."""
    x, w, b = (t.to(BF16) for t in make((rows,), 512, 96, grad=False))
    with triton_interpreter.count() as seen, vlmops.use_backend("triton"):
        linear(x, w, b)
    least = cost(x, w, b, "", None, None, None, True, tile=(rows, 4))
    assert seen.flops == 0 and seen.programs == 24 and seen.bytes == least.bytes
    assert seen.bytes - 23 * 2 * x.numel() <= 1.15 * cost(x, w, b, "", None, None, None, True).bytes


@pytest.mark.parametrize("gate_shape", [(), (128,)])
def test_traffic_and_work_of_tiles(gate_shape):
    x, w, b = (t.to(BF16) for t in make((128,), 64, 128, grad=False))
    gate, mask, residual = torch.randn(gate_shape).to(BF16), some(128), torch.randn(128, 128).to(BF16)
    with triton_interpreter.count() as seen, vlmops.use_backend("triton"):
        linear(x, w, b, gate=gate, row_mask=mask, residual=residual)
    least = cost(x, w, b, "", gate, mask, residual, True, tile=(64, 64))
    assert seen.flops == least.flops and seen.bytes == least.bytes


@pytest.mark.parametrize("activation", ["", "gelu"])
def test_work_of_the_backward(activation):
    args = make((128,), 64, 128)
    with vlmops.use_backend("triton"):
        out = linear(*args, activation=activation or None)
    grad = torch.randn_like(out)
    with triton_interpreter.count() as seen:
        out.backward(grad)
    least = backward_cost(*args, activation)
    assert seen.flops == least.flops and seen.bytes > least.bytes


def test_a_gates_gradient_costs_no_second_product():
    x, w, b = make((128,), 64, 128)
    gate = torch.randn(128, requires_grad=True)
    with vlmops.use_backend("triton"):
        out = linear(x, w, b, gate=gate)
    grad = torch.randn_like(out)
    with triton_interpreter.count() as seen:
        out.backward(grad)
    assert seen.flops == backward_cost(x, w, b, "").flops
