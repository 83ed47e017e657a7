"""The CUDA mlp's plans, and its work and traffic on the SIMT machine."""

from __future__ import annotations

import pytest
import torch

from tests.ops.test_mlp import make
from tests.ops.test_mlp_cuda import BF16, arguments
from tests.support.cuda_machine import DTYPES, counted, simt
from vlmops.backends import cuda_runtime
from vlmops.ops import mlp
from vlmops.ops.linear import cuda as linear_backend
from vlmops.ops.mlp import cuda as backend
from vlmops.ops.mlp.cost import cost

__all__ = ["simt"]


def _plans(target, rows, gated, dtype=BF16, k=1024, h=4096, n=1024):
    def empty(*shape):
        return torch.empty(*shape, dtype=dtype, device="meta")

    args = list(arguments(empty(rows, k), empty(h, k), empty(n, h)))
    args[5] = empty(h, k) if gated else None
    with cuda_runtime.record(cuda_runtime.TARGETS[target]) as plans:
        backend.forward(*args)
    return plans


@pytest.mark.parametrize("target", ["sm_80", "sm_89", "sm_90a"])
def test_plans_by_shape(target):
    """Tiles as large as fill the GPU; few rows are streamed; without a gate the kernel is linear's."""
    large, small, flat = backend.GATED_TILES
    for rows, tile in ((8192, large), (100, small), (16, flat)):
        first, second = _plans(target, rows, True)
        assert first.entry == "mlp_gemm" and second.entry == "linear_gemm"
        assert first.block == tile.threads and set(tile.defines) <= set(first.defines)
        assert first.shared == tile.shared <= cuda_runtime.TARGETS[target].shared
        assert first.grid == (-(-rows // tile.bm) * (2 * 4096 // tile.bn), 1, 1)
    assert [p.entry for p in _plans(target, 4, True)] == ["mlp_few_rows", "linear_few_rows"]
    assert [p.entry for p in _plans(target, 4, False)] == ["linear_few_rows"] * 2
    assert [p.entry for p in _plans(target, 100, True, torch.float32)] == ["mlp_gemm_float", "linear_gemm_float"]


@pytest.mark.parametrize(("h", "columns"), [(1024, 1), (16384, 2)])
def test_columns_of_a_warp(h, columns):
    first, _ = _plans("sm_80", 1, True, h=h)
    assert dict(first.defines)["COLS"] == columns and first.grid[0] == h // (4 * columns)


def test_offsets_past_two_billion_elements():
    """Planned on meta tensors: strides are 64-bit, every grid can be launched."""
    for dtype in DTYPES:
        for gated in (False, True):
            assert len(_plans("sm_80", 2**21, gated, dtype, k=4096, h=2048)) == 2
    x = torch.empty(2**10, 2**12, 2**10, dtype=BF16, device="meta")
    args = list(arguments(x, x[0, :, :1].expand(-1, 2**12), x[0, :8, :1].expand(-1, 2**12)))
    args[-4:-1] = ["pixel_shuffle", 2**6, 2**6]
    with cuda_runtime.record(cuda_runtime.TARGETS["sm_80"]) as plans:
        backend.forward(*args)
    assert len(plans) == 2 and plans[0].args[7].value == 2**22


def _hidden_traffic(args, kwargs, tile):
    """Counters of the first product, and its least traffic where x counts once for every tile of columns."""
    x, w1, b1, *_ = args
    w_gate, b_gate = kwargs.get("w_gate"), kwargs.get("b_gate")
    weights = [w for w in (w1, w_gate) if w is not None]
    gather = kwargs.get("gather") or ("", 0, 0)
    rows = backend.rows_of([], x, *gather, weights)
    h = x.new_empty(rows.m, w1.shape[0])
    with counted() as seen:
        cuda_runtime.run([backend.hidden_plan(rows, weights, b1, b_gate, "silu", h)])
    size, passes = x.element_size(), (-(-rows.m // tile[0]), -(-w1.shape[0] // tile[1]))
    read = passes[1] * x.numel() + passes[0] * sum(t.numel() for t in (*weights, b1, b_gate) if t is not None)
    return seen, read * size, h.numel() * size


@pytest.mark.parametrize("dtype", [BF16, torch.float16])
@pytest.mark.parametrize(
    ("gated", "gather"), [(True, None), (False, ("pixel_shuffle", 16, 16)), (True, ("pixel_shuffle", 16, 16))]
)
def test_traffic_and_work_of_tiles(gated, gather, dtype):
    """Dense tiles: no more products, sectors or bytes than the tiles need, no bank conflict; x once for both products."""
    rows, c, wide = ((2, 256), 24, 4) if gather else ((128,), 96, 1)
    args = [t.to(dtype) for t in make(rows, c, h=128, wide=wide)]
    args[2], kwargs = None, dict(gather=gather, w_gate=torch.randn(128, 96).to(dtype) if gated else None)
    seen, read, written = _hidden_traffic(args, kwargs, (64, 64))
    assert seen["launches"] == 1
    assert seen["mma_flops"] == 2 * 128 * 128 * 96 * (2 if gated else 1)
    assert seen["global_store_sectors"] * 32 == seen["global_store_bytes"] == written
    assert seen["global_load_bytes"] == read == seen["global_load_sectors"] * 32
    assert seen["shared_wavefronts"] == seen["shared_wavefronts_least"]
    assert seen["barriers"] == 4 * 3  # tiles, steps of 32


@pytest.mark.parametrize("rows", [16, 300])
def test_traffic_of_the_other_tiles(rows):
    args = [t.to(BF16) for t in make((rows,), 128, 192)]
    args[2], kwargs = None, dict(w_gate=torch.randn(192, 128, dtype=BF16))
    tile = linear_backend.tile_of(rows, 384, cuda_runtime.SIMT.processors, backend.GATED_TILES)
    assert tile == backend.GATED_TILES[2 if rows == 16 else 0]
    seen, read, written = _hidden_traffic(args, kwargs, (tile.bm, tile.bn // 2))
    assert seen["mma_flops"] == 2 * -(-rows // tile.bm) * tile.bm * 2 * args[1].numel()
    assert seen["global_load_bytes"] == read == seen["global_load_sectors"] * 32
    assert seen["global_store_sectors"] * 32 == written
    assert seen["shared_wavefronts"] == seen["shared_wavefronts_least"]


@pytest.mark.parametrize("gather", [None, ("pixel_shuffle", 16, 16)])
def test_traffic_of_float_tiles(gather):
    args = list(make((2, 256) if gather else (128,), c=12 if gather else 48, h=64, wide=4 if gather else 1))
    args[2] = None
    seen, read, written = _hidden_traffic(args, dict(gather=gather, w_gate=torch.randn(64, 48)), (64, 64))
    assert seen["global_load_bytes"] == read == seen["global_load_sectors"] * 32
    assert seen["global_store_sectors"] * 32 == written and seen["mma_flops"] == 0
    assert seen["shared_wavefronts"] == seen["shared_wavefronts_least"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 4])
def test_traffic_of_few_rows(rows, dtype):
    """Decoding: each weight once; x once a warp, for both products, from the cache."""
    args = [t.to(dtype) for t in make((rows,), 512, 98)]
    args[2] = None
    seen, read, written = _hidden_traffic(args, dict(w_gate=torch.randn(98, 512, dtype=dtype)), (rows, 1))
    assert seen["global_load_bytes"] == read == seen["global_load_sectors"] * 32
    assert seen["mma_flops"] == 0 and seen["global_store_bytes"] == written


@pytest.mark.parametrize("gated", [False, True])
def test_traffic_of_all_passes(gated):
    """One tile: every operand once, h written and read once."""
    x, w1, _, w2, _ = (t.to(BF16) for t in make((64,), c=64, h=64, n=64))
    w_gate, residual = w1.clone() if gated else None, x.clone()
    with counted() as seen:
        mlp(x, w1, None, w2, None, activation="gelu", w_gate=w_gate, residual=residual)
    args = list(arguments(x, w1, w2))
    args[5], args[8] = w_gate, residual
    least = cost(*args)
    assert seen["launches"] == 2 and seen["mma_flops"] == least.flops
    assert seen["global_load_bytes"] == seen["global_load_sectors"] * 32 == least.read
    assert seen["global_store_bytes"] == seen["global_store_sectors"] * 32 == least.written


def test_vectors_of_the_columns_are_read_once_a_thread():
    """Biases and LayerScale: from memory once, by each thread for its own columns."""
    args = [t.to(BF16) for t in make((64,), c=64, h=64, n=64)]
    extra = {name: torch.randn(64, dtype=BF16) for name in ("b_gate", "layer_scale")}
    with counted() as seen:
        mlp(*args, activation="silu", w_gate=args[1].clone(), **extra)
    vectors = 2 * 64 * 4
    assert seen["global_load_unique_bytes"] == 2 * 64 * 64 * 5 + vectors
    assert seen["global_load_bytes"] == 2 * 64 * 64 * 5 + 128 * 16 * 4
