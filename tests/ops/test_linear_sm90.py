"""The sm_90a linear (TMA, wgmma) on the SIMT machine: parity of every epilogue and tile; when it is taken."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import vlmops
from tests.ops.test_linear import make, plain
from tests.ops.test_mlp import make as make_mlp
from tests.support.cuda_machine import check_on_machine, counted, simt
from tests.support.ops import check_op
from vlmops.backends import cuda_runtime
from vlmops.backends.cuda_plan import TensorMap
from vlmops.ops import linear, mlp
from vlmops.ops._shared import cuda_sm90
from vlmops.ops._shared.activations import ACTIVATIONS
from vlmops.ops.linear import cuda as backend
from vlmops.ops.linear import cuda_sm90 as sm90
from vlmops.ops.linear.cost import cost

__all__ = ["simt"]

BF16, FP16 = torch.bfloat16, torch.float16


@pytest.fixture(autouse=True)
def asked(monkeypatch, simt):
    monkeypatch.setenv(cuda_sm90.VARIABLE, "1")


def check(args, kwargs, dtype=BF16):
    check_op(linear, args, kwargs, backend="cuda", dtype=dtype, lowprec=plain)


def everything(rows, n, **more):
    mask = torch.arange(rows) % 3 != 1
    return dict(activation="silu", gate=torch.randn(n), row_mask=mask, residual=torch.randn(rows, n)) | more


@pytest.mark.parametrize("activation", [None, *ACTIVATIONS])
def test_activations(activation):
    check(make((20,), 64, 48), dict(activation=activation))


@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("part", ["activation", "gate", "row_mask", "residual", "one gate", "all"])
def test_epilogues(part, dtype):
    parts = everything(70, 72)
    parts = parts if part == "all" else {"gate": torch.tensor(0.7)} if part == "one gate" else {part: parts[part]}
    check(make((70,), 72, 72, bias=part == "all"), parts, dtype)


#: rows, k, n: whole tiles and ragged ones, a ring that turns round, more tiles than blocks, both widths.
TILES = {
    "whole": (128, 64, 128),
    "one step, ragged": (17, 8, 8),
    "a ring that turns round": (50, 64 * 9 + 8, 40),
    "ragged": (150, 136, 200),
    "persistent": (300, 72, 264),
    "wide tiles": (140, 72, 1040),
    "odd columns": (40, 72, 37),
    "one column": (40, 72, 1),
}


@pytest.mark.parametrize("case", TILES)
def test_every_tile(case):
    rows, k, n = TILES[case]
    check(make((rows,), k, n), everything(rows, n))


@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("shape", [(70, 200, 72), (200, 400, 136)])
def test_every_schedule(shape, dtype):
    rows, k, n = shape
    check_on_machine(linear, make((rows,), k, n), everything(rows, n), dtype)


@pytest.mark.parametrize(
    ("extra", "copies"), [({}, 2), (dict(w_gate=torch.randn(64, 32) / 6), 1)], ids=["plain", "gated"]
)
def test_the_products_of_an_mlp(extra, copies):
    """Both are linear's; the gated first one is mlp.cu's own."""
    args = make_mlp((20,))
    check_op(mlp, args, dict(activation="silu", **extra), backend="cuda", dtype=BF16)
    with counted() as seen:
        mlp(*(t.to(BF16) for t in args), activation="silu", **{name: t.to(BF16) for name, t in extra.items()})
    assert seen["tma_copies"] == 2 * copies and seen["launches"] == 2


def test_layouts():
    """Slices of wide rows that are still aligned, and a residual between accesses."""
    x, w = (torch.randn(rows, 96, dtype=BF16)[:, 8:80] for rows in (40, 24))
    residual = torch.randn(40, 25, dtype=BF16)[:, 1:]
    assert sm90.wanted(x, w, 40, 24, 72)
    check((x, w, torch.randn(24, dtype=BF16)), dict(residual=residual))


@given(
    rows=st.integers(17, 150),
    k=st.integers(1, 20),
    n=st.integers(1, 150),
    bias=st.booleans(),
    dtype=st.sampled_from([BF16, FP16]),
)
@settings(max_examples=8, deadline=None)
def test_any_shape(rows, k, n, bias, dtype):
    check(make((rows,), 8 * k, n, bias), dict(residual=torch.randn(rows, n)), dtype)


def test_masked_and_nan_rows():
    """What is outside the matrix is zeros: a NaN stays in its row and its column."""
    x, w, b = (t.to(BF16) for t in make((20,), 72, 40))
    x[2, 3] = w[5, 71] = float("nan")
    with vlmops.use_backend("cuda"):
        out = linear(x, w, b, activation="relu", row_mask=torch.arange(20) != 2)
    bad = torch.zeros(20, 40, dtype=torch.bool)
    bad[:, 5] = True
    bad[2] = False
    assert torch.equal(out.isnan(), bad) and out[2].eq(0).all()


@pytest.mark.parametrize(("m", "n", "bn"), [(128, 128, 128), (150, 1040, 256)])
def test_traffic_and_work(m, n, bn):
    """Each tile's operands once, by whole sectors; the epilogue writes whole sectors."""
    x, w, _ = (t.to(BF16) for t in make((m,), 128, n))
    with counted() as seen:
        linear(x, w)
    tiles = -(-m // 128), -(-n // bn)
    assert seen["mma_flops"] == 2 * tiles[0] * 128 * tiles[1] * bn * 128
    least = cost(x, w, None, "", None, None, None, True, tile=(128, bn))
    assert seen["tma_copies"] == tiles[0] * tiles[1] * 2 * 2
    assert seen["global_load_bytes"] == least.read == 32 * seen["global_load_sectors"]
    assert seen["global_store_sectors"] * 32 == least.written
    assert seen["global_load_unique_bytes"] == cost(x, w, None, "", None, None, None, True).read
    assert seen["barriers"] == min(tiles[0] * tiles[1], cuda_runtime.SIMT.processors)  # one a block


# -- when it is taken ----------------------------------------------------------------------------------------------------


def entries(target, x, w):
    with cuda_runtime.record(cuda_runtime.TARGETS[target]) as plans:
        backend.forward(x, w, None, "", None, None, None, True)
    return [(p.entry, p.arch) for p in plans]


def meta(*shape, dtype=BF16):
    return torch.empty(*shape, dtype=dtype, device="meta")


HOPPER, ANY = [("linear_gemm_sm90", "sm90a")], [("linear_gemm", "sm80")]


def test_only_on_capability_9_0_and_where_it_is_asked_for(monkeypatch):
    x, w = meta(256, 128), meta(512, 128)
    for target in cuda_runtime.TARGETS:
        assert entries(target, x, w) == (HOPPER if target == "sm_90a" else ANY)
    monkeypatch.setenv(cuda_sm90.VARIABLE, "0")
    assert entries("sm_90a", x, w) == ANY
    monkeypatch.delenv(cuda_sm90.VARIABLE)
    assert entries("sm_90a", x, w) == ANY
    with cuda_sm90.only():
        assert entries("sm_90a", x, w) == HOPPER


@pytest.mark.parametrize(("x", "w", "entry"), [
    (meta(16, 128), meta(512, 128), "linear_gemm"), (meta(3, 128), meta(512, 128), "linear_few_rows"),
    (meta(256, 129), meta(512, 129), "linear_gemm"), (meta(256, 132)[:, 4:], meta(512, 128), "linear_gemm"),
    (meta(256, 128, dtype=torch.float32), meta(512, 128, dtype=torch.float32), "linear_gemm_float"),
    (meta(1, 128).expand(256, 128), meta(512, 128), "linear_gemm"),
])  # fmt: skip
def test_other_operands_are_left_to_the_other_kernels(x, w, entry):
    assert entries("sm_90a", x, w) == [(entry, "sm80")]


def test_the_launch_on_a_hopper():
    """A block an SM, wide tiles where there are enough, four stages; maps first, then slots."""
    with cuda_runtime.record(cuda_runtime.TARGETS["sm_90a"]) as plans:
        for n in (128, 16384):
            backend.forward(meta(4096, 512), meta(n, 512), None, "", None, None, None, True)
    assert [dict(p.defines)["BN"] for p in plans] == [128, 256] and [p.grid[0] for p in plans] == [32, 132]
    assert [dict(p.defines)["STAGES"] for p in plans] == [4, 4]
    for plan in plans:
        assert plan.maps == 2 and isinstance(plan.args[1], TensorMap)
        assert len(plan.packed()) == 2 * 128 + 8 * (len(plan.args) - 2)
