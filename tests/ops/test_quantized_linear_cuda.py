"""The CUDA quantized_linear on the SIMT machine: parity of each kind of weight, epilogues, layouts."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import vlmops
from tests.ops.test_quantized_linear import plain
from tests.support.cuda_machine import DTYPES, check_on_machine, simt
from tests.support.ops import check_op, opcheck
from vlmops.backends import cuda_runtime
from vlmops.backends.cuda_runtime import TARGETS
from vlmops.ops import quantize_weight, quantized_linear
from vlmops.ops._shared.activations import ACTIVATIONS
from vlmops.ops._shared.quantisation import QuantizedWeight
from vlmops.ops.quantized_linear import cuda as backend

__all__ = ["simt"]

BF16 = torch.bfloat16
#: name -> quantize_weight's options
WEIGHTS = {
    "int8": dict(kind="int8"),
    "int8 g32": dict(kind="int8", group_size=32),
    "int8 g64": dict(kind="int8", group_size=64),
    "int8 g128": dict(kind="int8", group_size=128),
    "int8 g384": dict(kind="int8", group_size=384),
    "int4": dict(kind="int4"),
    "int4 g32": dict(kind="int4", group_size=32),
    "int4 g64": dict(kind="int4", group_size=64),
    "int4 g256": dict(kind="int4", group_size=256),
    "int4 symmetric": dict(kind="int4", symmetric=True),
    "int4 g32 symmetric": dict(kind="int4", group_size=32, symmetric=True),
    "fp8": dict(kind="fp8"),
}


def check(args, kwargs, dtype=BF16):
    check_op(quantized_linear, args, kwargs, backend="cuda", dtype=dtype, lowprec=plain)


def make(rows=(3,), k=200, n=21, bias=True, grad=False, **options):
    """Rows of different size, some columns of one sign: no two groups have the same scale and zero-point."""
    weight = quantize_weight(torch.randn(n, k) * torch.rand(n, 1) * torch.rand(k) + torch.rand(n, 1) / 4, **options)
    return torch.randn(*rows, k, requires_grad=grad), weight, torch.randn(n, requires_grad=grad) if bias else None


def some(*rows):
    """A row mask with both kinds of rows wherever there are two."""
    return (torch.arange(torch.Size(rows).numel()) % 3 != 1).view(rows)


def everything(*rows, n=21):
    return dict(activation="silu", gate=torch.randn(n), row_mask=some(*rows), residual=torch.randn(*rows, n))


@pytest.mark.parametrize("name", WEIGHTS)
def test_every_kind_of_weight(name):
    """1100 columns: more than a step of the warps that share them, a rest, groups past the end."""
    check(make((2,), 1100, **WEIGHTS[name]), {}, DTYPES[list(WEIGHTS).index(name) % 3])


@pytest.mark.parametrize("rows", range(1, backend.FEW + 1))
def test_every_number_of_rows(rows):
    check(make((rows,), **WEIGHTS[["int8", "int4 g64", "fp8"][rows % 3]]), everything(rows))


@pytest.mark.parametrize("name", WEIGHTS)
def test_every_kind_of_weight_on_tensor_cores(name):
    """Flat tiles; more steps along k than stages, a rest."""
    dtype = torch.float16 if "g32" in name or name == "fp8" else BF16
    check(make((9,), 410, **WEIGHTS[name]), everything(9), dtype)


#: rows, k, n: whole tiles and ragged ones, groups of tiles.
TILES = {
    "flat, whole": (16, 256, 128),
    "flat, ragged": (11, 200, 136),
    "square, whole": (64, 192, 64),
    "square, ragged": (70, 104, 72),
    "groups of tiles": (590, 16, 72),
    "large, ragged": (300, 72, 264),
    "large, odd": (257, 37, 261),
    "one column": (9, 1, 1),
}


@pytest.mark.parametrize("case", TILES)
def test_every_tile(case):
    rows, k, n = TILES[case]
    check(make((rows,), k, n, **WEIGHTS["int4 g32" if "ragged" in case else "int8"]), everything(rows, n=n))


@pytest.mark.parametrize("n", [1, 63, 130, 258])
@pytest.mark.parametrize("name", ["int4 g32", "fp8"])
def test_every_share_of_a_warp(name, n):
    """One, two and four columns a warp, one to four warps for them; n that leaves a rest, scales read one by one."""
    check(make((2,), 2060, n, **WEIGHTS[name]), everything(2, n=n))


def test_the_shares():
    assert backend.share(21, 4096, 4) == (1, 4) and backend.share(21, 1024, 4) == (1, 2)
    assert backend.share(63, 4096, 4) == (1, 2) and backend.share(64, 4096, 4) == (1, 1)
    assert backend.share(130, 4096, 4) == (2, 1) and backend.share(258, 4096, 4) == (4, 1)


@pytest.mark.parametrize("n", [20, 128, 256])
@pytest.mark.parametrize("name", ["int8 g64", "int4 g32", "fp8"])
def test_scales_read_together(name, n):
    check(make((1,), 256, n, **WEIGHTS[name]), {})


@pytest.mark.parametrize("rows", [3, 9])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation, rows):
    check(make((rows,), kind="int8"), dict(activation=activation))


@pytest.mark.parametrize("part", ["residual", "gate", "gate of one element", "vector gate", "mask", "no bias"])
def test_epilogues(part):
    kwargs = {
        "residual": dict(residual=torch.randn(3, 21)), "gate": dict(gate=torch.tensor(0.7)),
        "gate of one element": dict(gate=torch.tensor([-0.4])), "vector gate": dict(gate=torch.randn(21)),
        "mask": dict(row_mask=some(3)), "no bias": {},
    }[part]  # fmt: skip
    check(make(bias=part != "no bias", kind="int4"), kwargs)


@pytest.mark.parametrize(("name", "dtype"), [("int8 g32", torch.float16), ("int4", torch.float32), ("fp8", BF16)])
def test_every_schedule(name, dtype):
    """A block's warps share columns: their sums meet in shared memory."""
    check_on_machine(quantized_linear, make((2,), 2060, 21, **WEIGHTS[name]), everything(2), dtype)


@pytest.mark.parametrize("name", ["int4 g64", "fp8"])
@pytest.mark.parametrize("shape", [(11, 200, 40), (70, 136, 72)])
def test_every_schedule_of_tiles(shape, name):
    rows, k, n = shape
    check_on_machine(quantized_linear, make((rows,), k, n, **WEIGHTS[name]), everything(rows, n=n), torch.float16)


@pytest.mark.parametrize("k", [12, 130, 65, 1])
@pytest.mark.parametrize(("rows", "kind"), [(2, "int8"), (5, "int4"), (10, "int4")])
def test_every_width_of_an_access(kind, k, rows):
    check(make((rows,), k, kind=kind), {})
    if rows <= backend.FEW:
        check(make((rows,), k, kind=kind), {}, torch.float32)


@pytest.mark.parametrize("name", ["int8", "int4"])
@pytest.mark.parametrize(
    ("rows", "k", "n"), [((), 5, 7), ((6,), 0, 3), ((6,), 4, 0), ((0,), 4, 3), ((2, 0), 4, 3), ((2, 3), 17, 3)]
)  # fmt: skip
def test_odd_and_empty_shapes(rows, k, n, name):
    check(make(rows, k, n, **WEIGHTS[name]), everything(*rows, n=n))


LAYOUTS = {
    "every second column": lambda m, k: torch.randn(m, 2 * k, dtype=BF16)[:, ::2],
    "a slice of wide rows": lambda m, k: torch.randn(m, k + 5, dtype=BF16)[:, 2 : 2 + k],
    "aligned slices": lambda m, k: torch.randn(m, k + 16, dtype=BF16)[:, 8 : 8 + k],
    "transposed": lambda m, k: torch.randn(k, m, dtype=BF16).t(),
    "one row for all": lambda m, k: torch.randn(1, k, dtype=BF16).expand(m, k),
    "every second row": lambda m, k: torch.randn(2 * m, k, dtype=BF16)[::2],
}


@pytest.mark.parametrize("rows", [4, 10])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, rows):
    x, residual = (LAYOUTS[layout](rows, columns) for columns in (136, 16))
    gate, mask, bias = torch.randn(32, dtype=BF16)[::2], some(2 * rows)[::2], torch.randn(32, dtype=BF16)[::2]
    check((x, make(k=136, n=16, kind="int4")[1], bias), dict(residual=residual, gate=gate, row_mask=mask))


def _in(values, layout):
    """The same values, laid out otherwise."""
    m, n = values.shape
    if layout == "rows of a wider table":
        return values.new_zeros(m, n + 64)[:, :n].copy_(values)
    if layout == "one byte past an aligned address":
        return values.new_zeros(m * n + 1)[1:].view(m, n).copy_(values)
    if layout == "every third row":
        return values.new_zeros(3 * m, n)[::3].copy_(values)
    return values.new_zeros(n, m).t().copy_(values)


@pytest.mark.parametrize("rows", [3, 9])
@pytest.mark.parametrize("part", ["data", "scale", "zero"])
@pytest.mark.parametrize(
    "layout", ["rows of a wider table", "one byte past an aligned address", "every third row", "transposed"]
)
def test_layouts_of_the_weight(layout, part, rows):
    x, weight, bias = (
        t.to(BF16) if isinstance(t, torch.Tensor) else t for t in make((rows,), 256, 20, kind="int4", group_size=64)
    )
    parts = {part: _in(getattr(weight, part), layout)}
    odd = replace(weight, **parts)
    with vlmops.use_backend("cuda"):
        want, got = quantized_linear(x, weight, bias), quantized_linear(x, odd, bias)
    assert torch.equal(want, got)


@given(
    rows=st.lists(st.integers(0, 5), max_size=2), k=st.integers(0, 300),
    n=st.integers(1, 70), name=st.sampled_from(sorted(WEIGHTS)), bias=st.booleans(),
    gate=st.sampled_from([None, "scalar", "vector"]), mask=st.booleans(), dtype=st.sampled_from(DTYPES),
)  # fmt: skip
@settings(max_examples=8, deadline=None)
def test_any_shape(rows, k, n, name, bias, gate, mask, dtype):
    if torch.Size(rows).numel() > backend.FEW and dtype == torch.float32:
        dtype = BF16
    kwargs = dict(row_mask=some(*rows) if mask else None)
    kwargs["gate"] = None if gate is None else torch.randn(() if gate == "scalar" else n)
    check(make(rows, k, n, bias, **WEIGHTS[name]), kwargs, dtype)


# -- numbers -------------------------------------------------------------------------------------------------------------


def picked(weight):
    """A unit row picks out a code of each column: the product is that number, exactly."""
    unit = torch.eye(weight.shape[1])
    with vlmops.use_backend("cuda"):
        streamed = torch.cat([quantized_linear(rows, weight) for rows in unit.split(backend.FEW)])
        tiled = quantized_linear(unit.half(), weight)
    assert torch.equal(streamed, weight.dequantize().t()) and torch.equal(tiled, weight.dequantize().t().half())


def test_every_code_of_int8_and_e4m3():
    for kind, dtype in (("int8", torch.int8), ("fp8", torch.float8_e4m3fn)):
        data = torch.arange(256, dtype=torch.uint8).repeat(2, 1)
        data[1] = data[1].flip(0)
        weight = QuantizedWeight(
            kind, data.view(dtype), torch.tensor([[1.0, 0.5]]), None, None, (2, 256), torch.float32
        )
        if kind == "fp8":  # NaN is looked at below
            data[data & 0x7F == 0x7F] = 0
        picked(weight)


def test_every_code_and_zero_point_of_int4():
    data = (torch.arange(64, dtype=torch.uint8) % 16 * 17).repeat(16, 1)
    data[:, ::3] ^= 0x0F
    zero = torch.arange(16, dtype=torch.uint8).repeat(2, 1)
    weight = QuantizedWeight("int4", data, torch.ones(2, 16), zero, 64, (16, 128), torch.float32)
    picked(weight)


@pytest.mark.parametrize("code", [0x7F, 0xFF])
@pytest.mark.parametrize("column", [0, 5, 199])
@pytest.mark.parametrize("rows", [3, 9])
def test_a_nan_in_an_e4m3_weight_stays_in_its_column(rows, column, code):
    x, weight, _ = make((rows,), bias=False, kind="fp8")
    x = x.to(BF16)
    weight.data.view(torch.uint8)[4, column] = code
    with vlmops.use_backend("cuda"):
        out = quantized_linear(x, weight)
    assert out[:, 4].isnan().all() and out[:, torch.arange(21) != 4].isfinite().all()


@pytest.mark.parametrize(("dtype", "rows"), [(torch.float32, 8), (BF16, 8), (torch.float16, 70)])
@pytest.mark.parametrize("name", ["int4 g32", "fp8"])
def test_masked_and_nan_rows(name, dtype, rows):
    """A masked row is zero even where its product is NaN; another NaN or infinity stays in its row."""
    x, weight, bias = make((rows,), **WEIGHTS[name])
    x, bias = x.to(dtype), bias.to(dtype)
    x[1:3, 3], x[5, 190] = float("nan"), float("inf")
    with vlmops.use_backend("cuda"):
        out = quantized_linear(x, weight, bias, activation="relu", row_mask=torch.arange(rows) != 1)
    assert out[1].eq(0).all() and out[2].isnan().all() and out[[0, 3, 4, *range(6, rows)]].isfinite().all()
    with vlmops.use_backend("reference"):
        want = quantized_linear(x, weight, bias, activation="relu", row_mask=torch.arange(rows) != 1)
    assert torch.equal(want.isnan(), out.isnan()) and torch.equal(want.isinf(), out.isinf())


@pytest.mark.parametrize("kind", ["int8", "fp8"])
@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_weights_of_any_size(size, kind):
    x, weight, _ = make((2,), bias=False, kind=kind)
    weight = replace(weight, scale=weight.scale * size)
    check((x / size, weight), {}, torch.float32)


def test_gradients_are_those_of_torch():
    x, weight, bias = make(grad=True, kind="int4")
    check((x, weight, bias), dict(activation="gelu", gate=torch.randn(21, requires_grad=True), row_mask=some(3)))


@pytest.mark.parametrize("name", ["int4", "fp8"])
def test_opcheck(name):
    x, w, bias = make(grad=True, **WEIGHTS[name])
    data = w.data.view(torch.uint8) if name == "fp8" else w.data
    args = (x, data, w.scale, w.zero, w.kind, w.group_size or 0, 200, bias, "gelu", torch.tensor(0.3), None, None)
    opcheck(torch.ops.vlmops.quantized_linear.default, (*args, False, "cuda"))


# -- plans, traffic ------------------------------------------------------------------------------------------------------


def arguments(x, weight, bias=None, quantize=False, residual=None):
    data = weight.data.view(torch.uint8) if weight.kind == "fp8" else weight.data
    parts = (data, weight.scale, weight.zero, weight.kind, weight.group_size or 0, weight.shape[1])
    return (x, *parts, bias, "", None, None, residual, quantize)


def test_what_is_refused():
    x, weight, bias = make(kind="fp8")
    assert backend.supports(*arguments(torch.randn(3, 3, 200), weight)) == "9 rows of float32 (at most 8)"
    assert backend.supports(*arguments(x, weight, bias, quantize=True)) == "quantize_activations"
    assert "beside" in backend.supports(*arguments(x, weight, bias.double()))
    assert "float64" in backend.supports(*arguments(x.double(), weight))
    huge = torch.zeros(1, 1, dtype=torch.int8).expand(2**31, 1)
    assert "at most" in backend.supports(x, huge, *arguments(x, weight)[2:])
    with vlmops.use_backend("cuda"), pytest.raises(vlmops.backends.BackendError, match="9 rows of float32"):
        quantized_linear(torch.randn(9, 200), weight)


@pytest.mark.parametrize(
    ("arch", "n", "shared"), [
        ("sm_80", 1024, (1, 2)), ("sm_80", 4096, (2, 1)), ("sm_80", 8192, (4, 1)), ("sm_89", 8192, (2, 1)),
        ("sm_90a", 8448, (4, 1)), ("sm_90a", 512, (1, 4)),
    ],
)  # fmt: skip
def test_plans(arch, n, shared):
    weight = QuantizedWeight(
        "int4", torch.empty(n, 2048, dtype=torch.uint8, device="meta"), torch.empty(32, n, device="meta"), None, 128,
        (n, 4096), BF16,
    )  # fmt: skip
    x = torch.empty(2, 4096, dtype=BF16, device="meta")
    with cuda_runtime.record(TARGETS[arch]) as (plans):
        backend.forward(*arguments(x, weight))
    (plan,) = plans
    found = dict(plan.defines)
    assert (found["COLS"], found["SPLIT"]) == shared and found["EACH"] == found["COLS"] and found["BYTES"] == 16
    assert plan.grid[0] * 4 // found["SPLIT"] * found["COLS"] >= n


def test_offsets_past_two_billion_bytes():
    """A row far from the first is found by 64-bit offsets: planned on meta tensors."""
    data, scale = torch.empty(2**20, 4096, dtype=torch.int8, device="meta"), torch.empty(1, 2**20, device="meta")
    with cuda_runtime.record(TARGETS["sm_80"]) as plans:
        x = torch.empty(1, 4096, dtype=BF16, device="meta")
        backend.forward(x, data, scale, None, "int8", 0, 4096, None, "", None, None, None, False)
    assert len(plans) == 1
