"""What the CUDA quantized_linear reads and computes, counted by the SIMT machine."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.ops.test_quantized_linear_cuda import BF16, WEIGHTS, arguments, make
from tests.support.cuda_machine import counted, simt
from vlmops.backends import cuda_runtime
from vlmops.ops import quantized_linear
from vlmops.ops._shared.quantisation import QuantizedWeight
from vlmops.ops.quantized_linear import cuda as backend
from vlmops.ops.quantized_linear.cost import cost

__all__ = ["simt"]


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("n", [32, 256])
@pytest.mark.parametrize("name", ["int8 g128", "int4 g32", "fp8"])
def test_traffic(name, n, rows):
    """Each byte of the weight once, in whole sectors; x once a warp, from the cache."""
    x, weight, _ = make((rows,), 1024, n, False, **WEIGHTS[name])
    x = x.to(BF16)
    with counted() as seen:
        quantized_linear(x, weight)
    with counted() as again:  # the same work without scales: what is left of the sectors is x and the weight
        quantized_linear(x, replace(weight, scale=weight.scale[:1], zero=None, group_size=None))
    least = cost(*arguments(x, weight))
    assert seen["global_load_unique_bytes"] == least.read and seen["global_store_bytes"] == least.written
    warps = n // backend.share(n, weight.data.shape[1], cuda_runtime.SIMT.processors)[0]
    x_sectors = x.numel() * 2 // 32 * (2 if rows <= 2 else 1) * warps
    assert again["global_load_sectors"] - x_sectors <= 1.1 * weight.data.numel() / 32
    assert again["mma_flops"] == 0


def test_warps_behind_the_last_column_read_nothing():
    x, weight, _ = make((1,), 1024, 1, False, kind="int8")
    with counted() as seen:
        quantized_linear(x.to(BF16), weight)
    lanes = 32 * backend.share(1, 1024, cuda_runtime.SIMT.processors)[1]
    assert seen["global_load_bytes"] == 1024 * 2 + 1024 + 4 * lanes  # x, the column, its scale


def test_a_scale_is_read_once_for_both_halves_of_a_block():
    """An int4 access has two runs of columns; they lie in one group where a group is whole blocks of packed columns."""
    x, weight, _ = make((1,), 1024, 1, False, kind="int4", group_size=256, symmetric=True)
    with counted() as seen:
        quantized_linear(x.to(BF16), weight)
    accesses = 512 // 16
    assert seen["global_load_bytes"] == 1024 * 2 + 512 + 4 * accesses  # x, the column, a scale an access


@pytest.mark.parametrize(
    ("kind", "rows", "group", "zero"),
    [("int8", 64, 0, False), ("int8", 300, 0, False), ("int4", 16, 0, False), ("int4", 64, 64, True), ("fp8", 64, 0, False)],
)  # fmt: skip
def test_traffic_and_work_of_tiles(kind, rows, group, zero):
    """Whole tiles: each byte of the weight once a tile of rows, in whole sectors, an int4 byte once for its two steps."""
    n, k = 384 if rows > 64 else 128, 256
    codes = torch.randint(0, 120, (n, k // (2 if kind == "int4" else 1)), dtype=torch.uint8)
    scale = torch.rand(k // group if group else 1, n)
    data = codes if kind == "int4" else codes.view(torch.int8 if kind == "int8" else torch.float8_e4m3fn)
    zeros = torch.full(scale.shape, 3, dtype=torch.uint8) if zero else None
    weight, x = QuantizedWeight(kind, data, scale, zeros, group or None, (n, k), BF16), torch.randn(rows, k, dtype=BF16)
    with counted() as seen:
        quantized_linear(x, weight)
    tile = backend.tile_of(rows, n, cuda_runtime.SIMT.processors, backend.TILES)
    assert tile == {16: backend.FLAT, 64: backend.SMALL, 300: backend.LARGE}[rows]
    padded = -(-rows // tile.bm) * tile.bm
    least = cost(*arguments(x, weight))
    tiled = cost(*arguments(x, weight), block_m=tile.bm, block_n=tile.bn)
    assert seen["mma_flops"] == 2 * padded * n * k
    assert seen["global_load_unique_bytes"] == least.read
    assert seen["global_store_sectors"] * 32 == least.written
    assert seen["shared_wavefronts"] == seen["shared_wavefronts_least"]
    if not group and not zero:  # scales of groups and zero-points are read by each thread itself, from the L1 cache
        assert seen["global_load_sectors"] <= 1.1 * tiled.read / 32
