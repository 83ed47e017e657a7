"""What the machine counts, on accesses whose cost is known by hand."""

from __future__ import annotations

import pytest
import torch

from tests.support import simt

pytestmark = pytest.mark.skipif(
    simt.SANITIZED, reason="a kernel built for AddressSanitizer has no hooks: nothing is counted"
)


def _aligned(n: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """`n` elements from an address that is a multiple of 256 on, so that sectors do not depend on the allocator."""
    storage = torch.zeros(n + 256, dtype=dtype)
    skip = -storage.data_ptr() % 256 // storage.element_size()
    return storage[skip : skip + n]


def _copy(offset: int, stride: int, dtype: torch.dtype = torch.float32, threads: int = 32) -> dict[str, int]:
    name = {torch.float32: "float", torch.bfloat16: "bf16", torch.int8: "int8_t"}[dtype]
    kernel = simt.build_kernel("counters.cu", f"copy_{name}_{threads}", "copy", threads, T=name)
    x, y = _aligned(32 * 70, dtype), _aligned(threads, dtype)
    machine = simt.machine()
    machine.clear()
    machine.register(x, "x")
    machine.register(y, "y", False)
    assert machine.launch(kernel, [x, y, offset, stride], (1,), threads) == []
    return machine.counters


@pytest.mark.parametrize(
    ("offset", "stride", "sectors", "least", "unique"),
    [
        (0, 1, 4, 4, 128),  # 32 neighbouring floats
        (1, 1, 5, 4, 128),  # one float late
        (8, 1, 4, 4, 128),  # one sector late
        (0, 2, 8, 4, 128),  # every other float
        (0, 8, 32, 4, 128),  # a float per sector
        (0, 64, 32, 4, 128),
        (5, 0, 1, 1, 4),  # all the same
    ],
)
def test_sectors_of_a_strided_load(offset, stride, sectors, least, unique):
    c = _copy(offset, stride)
    assert c["global_load_requests"] == c["global_store_requests"] == 1
    assert (c["global_load_sectors"], c["global_load_sectors_least"]) == (sectors, least)
    assert (c["global_store_sectors"], c["global_store_sectors_least"]) == (4, 4)
    assert c["global_load_bytes"] == c["global_store_bytes"] == 128
    assert (c["global_load_unique_bytes"], c["global_store_unique_bytes"]) == (unique, 128)


def test_sectors_of_narrow_types_and_of_a_tail():
    assert _copy(0, 1, torch.bfloat16)["global_load_sectors"] == 2
    assert _copy(0, 1, torch.int8)["global_load_sectors"] == 1
    c = _copy(0, 1, threads=40)  # the second warp has 8 lanes
    assert (c["global_load_requests"], c["global_load_sectors"], c["global_load_bytes"]) == (2, 5, 160)
    assert c["accesses"] == 80


@pytest.mark.parametrize(("n", "sectors"), [(2, 8), (4, 16)])
def test_sectors_of_vectors(n, sectors):
    kernel = simt.build_kernel("counters.cu", f"copy_vec_{n}", "copy_vec", 32, T="float", N=n)
    x, y = _aligned(32 * n), _aligned(32 * n)
    machine = simt.machine()
    machine.clear()
    machine.register(x, "x")
    machine.register(y, "y", False)
    assert machine.launch(kernel, [x, y], (1,), 32) == []
    c = machine.counters
    assert c["global_load_requests"] == 1 and c["global_load_bytes"] == 128 * n
    assert c["global_load_sectors"] == c["global_load_sectors_least"] == c["global_store_sectors"] == sectors


@pytest.mark.parametrize(
    ("n", "stride", "next_", "wavefronts", "least"),
    [
        (1, 1, 8, 1, 1),
        (1, 2, 16, 2, 1),  # two lanes a bank
        (1, 32, 256, 32, 1),  # one bank
        (1, 33, 264, 1, 1),  # padded
        (1, 32, 1, 8, 1),  # four banks, together
        (2, 2, 16, 2, 2),  # 8 bytes: half a warp at a time
        (2, 32, 2, 16, 2),  # eight deep in each half
        (4, 4, 32, 4, 4),  # 16 bytes: a quarter at a time
        (4, 32, 256, 32, 4),  # rows of 128 bytes: each quarter on the same four banks
        (4, 32, 4, 32, 4),  # each quarter on four banks of its own
        (4, 36, 288, 4, 4),  # padded by 16 bytes
        (4, 8, 64, 8, 4),
    ],
)
def test_bank_conflicts(n, stride, next_, wavefronts, least):
    kernel = simt.build_kernel("counters.cu", f"shared_{n}", "shared", 32, N=n)
    machine = simt.machine()
    machine.clear()
    assert machine.launch(kernel, [stride, next_], (1,), 32, shared=7 * stride * 4 + 3 * next_ * 4 + 16) == []
    c = machine.counters
    assert (c["shared_requests"], c["shared_bytes"]) == (1, 128 * n)
    assert (c["shared_wavefronts"], c["shared_wavefronts_least"]) == (wavefronts, least)


@pytest.mark.parametrize("swizzle", [0, 1])
def test_a_swizzle_removes_the_conflicts_of_a_tile(swizzle):
    m = n = k = 64
    kernel = simt.build_kernel("gemm.cu", f"gemm_bf16_{swizzle}", "gemm", 128, T="bf16", SWIZZLE=swizzle)
    a, b, c = _aligned(m * k, torch.bfloat16), _aligned(n * k, torch.bfloat16), _aligned(m * n)
    machine = simt.machine()
    machine.clear()
    machine.register(a, "a")
    machine.register(b, "b")
    machine.register(c, "c", False)
    assert machine.launch(kernel, [a, b, c, m, n, k], (1, 1), 128, 16384) == []
    got = machine.counters
    assert got["mma_flops"] == 2 * m * n * k
    assert got["barriers"] == 2 * k // 32
    assert got["async_copies"] == (m + n) * k // 8
    assert got["ldmatrices"] == 4 * (k // 16) * (1 + 4)  # warps, steps, A and four pairs of B
    assert got["global_load_bytes"] == got["global_load_unique_bytes"] == (m + n) * k * 2
    assert got["global_load_sectors"] == (m + n) * k * 2 // 32  # a row's 64 bytes of a step are whole sectors
    assert got["global_store_bytes"] == m * n * 4
    copies = (m + n) * k // 8 // 32 * 4  # a warp writes 32 x 16 bytes: four wavefronts at least
    reads = got["ldmatrices"] * 4
    assert got["shared_wavefronts_least"] == copies + reads
    if swizzle:
        assert got["shared_wavefronts"] == got["shared_wavefronts_least"]
    else:
        assert got["shared_wavefronts"] == copies + 4 * reads  # 8 rows of 64 bytes start in two places: 4 lanes a bank


def test_lanes_that_skip_and_stop_early_fall_into_step():
    kernel = simt.build_kernel("counters.cu", "ragged", "ragged", 32)
    x, y = _aligned(160), _aligned(32)
    machine = simt.machine()
    for schedule in simt.SCHEDULES:
        machine.clear()
        machine.register(x, "x")
        machine.register(y, "y", False)
        assert machine.launch(kernel, [x, y], (1,), 32, schedule=schedule, seed=3) == []
        c = machine.counters
        # three rounds of the loop, the odd lanes' load, everyone's load
        assert c["global_load_requests"] == 5
        assert c["global_load_bytes"] == 4 * (8 * (1 + 2 + 3) + 16 + 32)
        assert c["global_store_requests"] == 1


def test_collectives_are_counted_and_right():
    kernel = simt.build_kernel("counters.cu", "collectives", "collectives", 64)
    y = torch.full((64,), float("nan"))
    machine = simt.machine()
    machine.clear()
    machine.register(y, "y", False)
    for schedule in simt.SCHEDULES:
        assert machine.launch(kernel, [y], (1,), 64, schedule=schedule) == []
        c = machine.counters
        assert (c["shuffles"], c["ballots"], c["warp_syncs"], c["barriers"]) == (2 * (5 + 5 + 3), 2, 2, 1)
        lane = torch.arange(32)
        for warp in (0, 1):
            t = lane + 32 * warp
            wanted = t.sum() + t.max() + t[3] + t[(lane + 1).clamp(max=31)] + t[torch.where(lane < 2, lane, lane - 2)]
            assert torch.equal(y[32 * warp :][:32], (wanted + 1000 * warp).float())
