"""The CUDA linear on the SIMT machine: parity of every epilogue, tile and width of access; work and traffic."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import vlmops
from tests.ops.test_linear import make, plain
from tests.support.cuda_machine import DTYPES, check_on_machine, counted, simt
from tests.support.ops import check_op, opcheck
from vlmops.backends import cuda_runtime
from vlmops.ops import linear
from vlmops.ops._shared.activations import ACTIVATIONS
from vlmops.ops.linear import cuda as backend
from vlmops.ops.linear.cost import cost

__all__ = ["simt"]

BF16 = torch.bfloat16


def check(args, kwargs, dtype=BF16):
    check_op(linear, args, kwargs, backend="cuda", dtype=dtype, lowprec=plain)


def some(*rows):
    """A row mask with both kinds of rows wherever there are two."""
    return (torch.arange(torch.Size(rows).numel()) % 3 != 1).view(rows)


def everything(*rows, n=48):
    return dict(activation="silu", gate=torch.randn(n), row_mask=some(*rows), residual=torch.randn(*rows, n))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", [None, *ACTIVATIONS])
def test_activations(activation, dtype):
    check(make((7,)), dict(activation=activation), dtype)


EPILOGUES = {
    "residual": lambda n: dict(residual=torch.randn(n, 48)),
    "gate": lambda n: dict(gate=torch.tensor(0.7)),
    "gate of one element": lambda n: dict(gate=torch.tensor([-0.4])),
    "vector gate": lambda n: dict(gate=torch.randn(48)),
    "mask": lambda n: dict(row_mask=some(n)),
    "all": lambda n: everything(n),
    "all with one gate": lambda n: {**everything(n), "gate": torch.tensor(0.7)},
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [2, 9, 20])
@pytest.mark.parametrize("epilogue", EPILOGUES)
def test_epilogues(epilogue, rows, dtype):
    """Streamed, flat tiles, square tiles; float tiles."""
    check(make((rows,), bias="all" in epilogue), EPILOGUES[epilogue](rows), dtype)


#: rows, k, n: whole tiles and ragged ones of every kind, a ring of stages that turns round, groups of tiles and their rest.
TILES = {
    "flat, ragged": (11, 200, 136),
    "flat, whole": (16, 256, 128),
    "square, whole": (64, 160, 64),
    "square, ragged": (70, 104, 72),
    "groups of tiles": (590, 16, 72),
    "large, ragged": (300, 72, 264),
    "large, odd": (257, 37, 261),
    "one row, one column": (5, 1, 1),
}


@pytest.mark.parametrize("case", TILES)
def test_every_tile(case):
    rows, k, n = TILES[case]
    check(make((rows,), k, n), everything(rows, n=n))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("shape", [(9, 200, 40), (70, 136, 72), (130, 21, 67), (2, 300, 44)])
def test_every_schedule(shape, dtype):
    rows, k, n = shape
    check_on_machine(linear, make((rows,), k, n), everything(rows, n=n), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [3, 6, 17])
@pytest.mark.parametrize("k", [40, 44, 42, 41])
def test_every_width_of_an_access(k, rows, dtype):
    check(make((rows,), k, k), everything(rows, n=k), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 2, 3, 4])
@pytest.mark.parametrize(("k", "n"), [(1, 11), (600, 18), (64, 131), (24, 258)])
def test_few_rows(k, n, rows, dtype):
    """One, two and four columns a warp; n that leaves a rest."""
    check(make((rows,), k, n), everything(rows, n=n), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
@pytest.mark.parametrize(
    ("rows", "k", "n"), [((), 5, 7), ((6,), 0, 3), ((2,), 0, 3), ((6,), 4, 0), ((0,), 4, 3), ((2, 0), 4, 3), ((2, 3), 17, 3)]
)  # fmt: skip
def test_odd_and_empty_shapes(rows, k, n, dtype):
    check(make(rows, k, n), everything(*rows, n=n), dtype)


LAYOUTS = {
    "every second column": lambda m, k, dtype: torch.randn(m, 2 * k, dtype=dtype)[:, ::2],
    "a slice of wide rows": lambda m, k, dtype: torch.randn(m, k + 5, dtype=dtype)[:, 2 : 2 + k],
    "aligned slices": lambda m, k, dtype: torch.randn(m, k + 16, dtype=dtype)[:, 8 : 8 + k],
    "transposed": lambda m, k, dtype: torch.randn(k, m, dtype=dtype).t(),
    "one row for all": lambda m, k, dtype: torch.randn(1, k, dtype=dtype).expand(m, k),
    "one number for all": lambda m, k, dtype: torch.randn(1, 1, dtype=dtype).expand(m, k),
    "every second row": lambda m, k, dtype: torch.randn(2 * m, k, dtype=dtype)[::2],
}


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
@pytest.mark.parametrize("rows", [4, 18])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, rows, dtype):
    """Made in the dtype they run in: a conversion would pack them."""
    x, weight, residual = (LAYOUTS[layout](*shape, dtype) for shape in ((rows, 24), (16, 24), (rows, 16)))
    gate, mask, bias = torch.randn(32, dtype=dtype)[::2], some(2 * rows)[::2], torch.randn(32, dtype=dtype)[::2]
    check((x, weight, bias), dict(residual=residual, gate=gate, row_mask=mask), dtype)


def test_a_batch_without_its_first_token():
    x, residual = (torch.randn(2, 4, c, dtype=BF16)[:, 1:] for c in (16, 48))
    check((x, *make(k=16)[1:]), dict(residual=residual))


@pytest.mark.parametrize("odd", ["x", "weight", "bias", "gate", "residual"])
def test_a_base_address_between_accesses(odd):
    """One element past an aligned address, in one tensor at a time."""
    shapes = dict(x=(6, 32), weight=(24, 32), bias=(24,), gate=(24,), residual=(6, 24))
    parts = {}
    for name, shape in shapes.items():
        first = int(name == odd)
        parts[name] = torch.randn(torch.Size(shape).numel() + first, dtype=BF16)[first:].view(shape)
    assert parts[odd].data_ptr() % 16 == 2
    check((parts.pop("x"), parts.pop("weight"), parts.pop("bias")), parts)


@given(
    rows=st.lists(st.integers(0, 9), max_size=2), k=st.integers(1, 80), n=st.integers(1, 80), bias=st.booleans(),
    gate=st.sampled_from([None, "scalar", "vector"]), mask=st.booleans(), dtype=st.sampled_from(DTYPES),
)  # fmt: skip
@settings(max_examples=10, deadline=None)
def test_any_shape(rows, k, n, bias, gate, mask, dtype):
    kwargs = dict(row_mask=some(*rows) if mask else None)
    kwargs["gate"] = None if gate is None else torch.randn(() if gate == "scalar" else n)
    check(make(rows, k, n, bias), kwargs, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [4, 6, 18])
def test_masked_and_nan_rows(rows, dtype):
    """A masked row is zero even where its product is NaN; another NaN stays in its row, through relu too."""
    x, w, b = (t.to(dtype) for t in make((rows,)))
    x[1:3, 3] = float("nan")
    mask = torch.arange(rows) != 1
    with vlmops.use_backend("cuda"):
        out = linear(x, w, b, activation="relu", row_mask=mask)
    assert out[1].eq(0).all() and out[2].isnan().all() and out[0].isfinite().all() and out[3:].isfinite().all()


def test_gradients_are_those_of_torch():
    x, w, b = make((5,), grad=True)
    check((x, w, b), dict(activation="gelu", gate=torch.randn(48, requires_grad=True), row_mask=some(5)))


def test_a_closed_gate():
    check(make((6,)), dict(gate=torch.zeros(48), residual=torch.randn(6, 48)))


def test_opcheck():
    x, w, b = make((5,), grad=True)
    args = (x, w, b, "gelu", None, None, torch.randn(5, 48), False, "cuda")
    opcheck(torch.ops.vlmops.linear.default, args)


def test_what_is_refused():
    x, w, b = make()
    with vlmops.use_backend("cuda"), pytest.raises(vlmops.backends.BackendError, match="float64"):
        linear(x.double(), w.double(), b.double())
    none = (None, None, None)
    assert "beside" in backend.supports(x, w.double(), None, "", *none, True)
    long = torch.zeros(1, 1).expand(2**31, 1)
    assert "at most" in backend.supports(long, torch.zeros(1, 1), None, "", *none, True)


# -- plans, work and traffic ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("m", "n", "tile"),
    [(5, 8192, backend.FLAT), (17, 16384, backend.SMALL), (1024, 1024, backend.SMALL), (8192, 4096, backend.LARGE)],
)
def test_tiles_by_shape(m, n, tile):
    assert backend.tile_of(m, n, 108) == tile


@pytest.mark.parametrize(("n", "columns"), [(1024, 1), (4096, 2), (16384, 4)])
def test_columns_of_a_warp(n, columns):
    assert backend.columns_of(n, 108) == columns


def test_offsets_past_two_billion_elements():
    """Planned on meta tensors: strides are 64-bit, every grid can be launched."""
    with cuda_runtime.record(cuda_runtime.TARGETS["sm_80"]) as plans:
        for dtype in DTYPES:
            x, w = (torch.empty(2**21, 4096, dtype=dtype, device="meta") for _ in range(2))
            backend.forward(x, w[:2048], None, "", None, None, None, True)
            backend.forward(x[:8], w.expand(3, -1, -1).reshape(-1, 4096), None, "", None, None, None, True)
    assert len(plans) == 6


@pytest.mark.parametrize("gate_shape", [(), (128,)])
@pytest.mark.parametrize("dtype", [BF16, torch.float16])
def test_traffic_and_work_of_tiles(gate_shape, dtype):
    """Dense tiles: no more products, sectors or bytes than the tiles need, no bank conflict."""
    x, w, b = (t.to(dtype) for t in make((128,), 96, 128))
    gate, mask, residual = torch.randn(gate_shape).to(dtype), some(128), torch.randn(128, 128).to(dtype)
    with counted() as seen:
        linear(x, w, b, gate=gate, row_mask=mask, residual=residual)
    least = cost(x, w, b, "", gate, mask, residual, True)
    tiled = cost(x, w, b, "", gate, mask, residual, True, tile=(64, 64))
    assert seen["mma_flops"] == least.flops
    assert seen["global_load_unique_bytes"] == least.read and seen["global_store_bytes"] == least.written
    # every thread reads the terms of its columns and the mask of its rows itself, from the L1 cache
    assert seen["global_load_bytes"] <= 1.35 * tiled.read
    assert seen["global_load_sectors"] == seen["global_load_sectors_least"]
    assert seen["global_store_sectors"] * 32 == least.written
    assert seen["shared_wavefronts"] == seen["shared_wavefronts_least"]
    assert seen["barriers"] == 4 * 3  # tiles, steps of 32


@pytest.mark.parametrize("rows", [16, 300])
def test_traffic_of_the_other_tiles(rows):
    x, w, _ = (t.to(BF16) for t in make((rows,), 128, 384))
    with counted() as seen:
        linear(x, w)
    tile = backend.tile_of(rows, 384, cuda_runtime.SIMT.processors)
    assert tile == (backend.FLAT if rows == 16 else backend.LARGE)
    padded = -(-rows // tile.bm) * tile.bm
    least = cost(x, w, None, "", None, None, None, True, tile=(tile.bm, tile.bn))
    assert seen["mma_flops"] == 2 * padded * w.numel()
    assert seen["global_load_bytes"] == least.read == seen["global_load_sectors"] * 32
    assert seen["global_store_sectors"] * 32 == least.written
    assert seen["shared_wavefronts"] == seen["shared_wavefronts_least"]


def test_traffic_of_float_tiles():
    x, w, _ = make((128,), 48, 64)
    with counted() as seen:
        linear(x, w)
    least = cost(x, w, None, "", None, None, None, True, tile=(64, 64))
    assert seen["global_load_bytes"] == least.read == seen["global_load_sectors"] * 32
    assert seen["global_store_sectors"] * 32 == least.written and seen["mma_flops"] == 0
    assert seen["shared_wavefronts"] == seen["shared_wavefronts_least"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 4])
def test_traffic_of_few_rows(rows, dtype):
    """Decoding: the weight once; x once a warp, from the cache. Warps without a column read nothing."""
    x, w, _ = (t.to(dtype) for t in make((rows,), 512, 98))
    with counted() as seen:
        linear(x, w)
    least = cost(x, w, None, "", None, None, None, True, tile=(rows, backend.columns_of(98, 4)))
    assert seen["global_load_bytes"] == least.read == seen["global_load_sectors"] * 32
    assert seen["mma_flops"] == 0 and seen["global_store_bytes"] == least.written
