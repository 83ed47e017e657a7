"""sm_90a's instructions on the machine: layouts against Triton's compiler and numpy, and every bug they make possible."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import numpy as np
import pytest
import torch

from tests.support import simt
from vlmops.backends.cuda_plan import TensorMap

TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
hooked = pytest.mark.skipif(
    simt.SANITIZED, reason="a kernel built for AddressSanitizer has no hooks, so nothing is checked"
)

# A process of its own: the compiler's Python binding prints what it leaks when it ends.
ASK_TRITON = """
import json
from triton._C.libtriton import gluon_ir, ir
from triton.experimental.gluon.language._layouts import DotOperandLayout, NVMMADistributedLayout, NVMMASharedLayout

context = ir.context()
ir.load_dialects(context)
builder = gluon_ir.GluonOpBuilder(context)
linear = lambda layout, shape: builder.to_linear_layout(layout._to_ir(builder), shape)
bases = {}
for n in (32, 64, 72, 80, 88, 96, 128, 256):
    shape = 1 << (n - 1).bit_length()
    d = linear(NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, shape, 16]), [64, shape])
    bases[n] = (d.reg_bases, d.lane_bases, d.warp_bases)
c = NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 32, 16])
a = linear(DotOperandLayout(0, c, 2), [64, 64])
bases["A"] = (a.reg_bases, a.lane_bases, a.warp_bases)
bases["tile"] = (linear(NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2), [64, 64]).offset_bases,)
print(json.dumps(bases))
"""


def _places(bases: list, numbers: list[int]) -> np.ndarray:
    """[..., 2]: the (row, column) of every number of each kind, the last kind of `bases` slowest."""
    found = np.zeros((*numbers, 2), int)
    for index in np.ndindex(*numbers):
        bits = [b for kind, i in zip(bases, index, strict=True) for j, b in enumerate(kind) if i >> j & 1]
        found[index] = np.bitwise_xor.reduce(np.array([[0, 0], *bits]), axis=0)
    return found


@pytest.fixture(scope="module")
def layouts() -> dict[str, np.ndarray]:
    """Per operand: [thread, register] -> (row, column); "tile": [element of shared memory] -> (row, column)."""
    pytest.importorskip("triton", reason="the layout oracle is Triton's compiler")
    run = subprocess.run([sys.executable, "-c", ASK_TRITON], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    found = {}
    for name, bases in json.loads(run.stdout).items():
        place = _places(bases, [1 << len(kind) for kind in bases])
        if name == "tile":
            found[name] = place
        else:  # [register, lane, warp] -> [thread, register]
            found[name] = place.transpose(2, 1, 0, 3).reshape(128, -1, 2)
    return found


# -- TMA ---------------------------------------------------------------------------------------------------------------


def _box(tensor: torch.Tensor, rows: int, x: int, y: int, z: int = 0, schedule: int = simt.FORWARD) -> torch.Tensor:
    """[rows * 64]: shared memory after a copy."""
    box = (rows, 64) if tensor.dim() == 2 else (rows, 1, 64)
    kernel = simt.build_kernel("hopper.cu", "box", "box", 64)
    machine = simt.machine()
    machine.clear()
    out = torch.zeros(rows * 64, dtype=torch.int16)
    machine.register(tensor, "tensor")
    machine.register(out, "out", False)
    args = [TensorMap(tensor, box).packed(), out, tensor.dim(), rows, x, y, z]
    assert machine.launch(kernel, args, (1,), 64, 1024 + rows * 128, schedule) == []
    assert machine.counters["tma_copies"] == 1
    return out.view(tensor.dtype)


@pytest.mark.parametrize("schedule", simt.SCHEDULES)
def test_a_box_lies_as_triton_has_the_swizzle(layouts, schedule):
    x = torch.randn(64, 64).bfloat16()
    place = layouts["tile"]
    assert torch.equal(_box(x, 64, 0, 0, schedule=schedule), x[place[:, 0], place[:, 1]])


def _plain(rows: int) -> np.ndarray:
    """The documented swizzle: bits 4-6 of the byte address are exclusive-ored with bits 7-9."""
    byte = np.arange(rows * 64) * 2
    byte = byte ^ ((byte >> 7 & 7) << 4)
    return byte // 2


@pytest.mark.parametrize(("rows", "x", "y"), [(8, 0, 0), (24, 40, 6), (256, 0, 0), (16, 64, 0), (8, 0, 9), (8, -8, -3)])
def test_a_box_over_the_edges_is_filled_with_zeros(rows, x, y):
    t = torch.randn(10, 72).half()
    wanted = torch.zeros(rows, 64).half()
    for r in range(rows):
        for c in range(64):
            if 0 <= y + r < 10 and 0 <= x + c < 72:
                wanted[r, c] = t[y + r, x + c]
    assert torch.equal(_box(t, rows, x, y), wanted.reshape(-1)[_plain(rows)])


@pytest.mark.parametrize("head", [0, 2])
def test_a_box_of_one_head(head):
    t = torch.randn(20, 3, 80).bfloat16()
    wanted = torch.zeros(16, 64).bfloat16()
    wanted[:13, :16] = t[7:, head, 64:]
    assert torch.equal(_box(t, 16, 64, 7, head), wanted.reshape(-1)[_plain(16)])
    wide = torch.randn(20, 3, 96).bfloat16()[:, :, 8:72]  # strided
    assert torch.equal(_box(wide, 8, 0, 4, head), wide[4:12, head].reshape(-1)[_plain(8)])


def test_what_tma_does_not_read_is_refused():
    t = torch.zeros(8, 80).bfloat16()
    assert TensorMap.why_not(t) is None and TensorMap.why_not(t[:, 8:72]) is None
    assert "16-bit" in TensorMap.why_not(t.float()) and "16-bit" in TensorMap.why_not(t[:0])
    for bad in (t[:, 1:], t.t(), torch.zeros(8, 81).bfloat16(), t[:1].expand(8, 80)):
        assert "aligned" in TensorMap.why_not(bad)


# -- wgmma -------------------------------------------------------------------------------------------------------------


def _product(layouts, n, k, dtype, along_n, by_registers, schedule=simt.FORWARD):
    a, b = torch.randn(64, 64).to(dtype), torch.randn(n, 64).to(dtype)
    b[:, k:] = 0
    place, d_place = layouts["A"], layouts[str(n)]
    inside = d_place[0, :, 1] < n  # registers of columns that there are
    d_place = d_place[:, inside]
    c = torch.randn(64, n)
    d = c[d_place[..., 0], d_place[..., 1]].contiguous()
    columns = torch.zeros(k, -(-n // 8) * 8).to(dtype)
    columns[:, :n] = b[:, :k].T
    matrix, box = (columns, (k, 64)) if along_n else (b, (n, 64))
    held = a[place[..., 0], place[..., 1]].reshape(128, 4, 8)  # [thread, step, elements]
    held = held[:, : k // 16].contiguous().view(torch.int32) if by_registers else None
    name = f"product_{n}_{'bf16' if dtype == torch.bfloat16 else 'fp16'}_{int(along_n)}"
    kernel = simt.build_kernel(
        "hopper.cu", name, "product", 128, T="bf16" if dtype == torch.bfloat16 else "fp16", N=n, ALONG_N=int(along_n)
    )
    machine = simt.machine()
    machine.clear()
    for tensor, what in ((a, "a"), (matrix, "b"), (d, "d"), (held, "registers")):
        if tensor is not None:
            machine.register(tensor, what)
    args = [TensorMap(a, (64, 64)).packed(), TensorMap(matrix, box).packed(), held, d, k]
    shared = 1024 + 64 * 128 + (-(-n // 64) * 128 * k if along_n else n * 128)
    assert machine.launch(kernel, args, (1,), 128, shared, schedule) == []
    assert machine.counters["mma_flops"] == 2 * 64 * n * k
    got = np.full((64, n), np.nan)
    got[d_place[..., 0], d_place[..., 1]] = d.numpy()
    wanted = a[:, :k].double().numpy() @ b[:, :k].double().numpy().T + c.double().numpy()
    np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("by_registers", [False, True])
@pytest.mark.parametrize("along_n", [False, True])
@pytest.mark.parametrize(("n", "k"), [(64, 64), (72, 32), (80, 16), (128, 48)])
def test_wgmma_multiplies_matrices_laid_out_as_triton_has_them(layouts, n, k, along_n, by_registers):
    _product(layouts, n, k, torch.bfloat16, along_n, by_registers)


@pytest.mark.parametrize("schedule", simt.SCHEDULES)
def test_wgmma_of_fp16_in_every_schedule(layouts, schedule):
    _product(layouts, 128, 64, torch.float16, False, False, schedule)
    _product(layouts, 128, 64, torch.float16, True, True, schedule)


# -- bugs --------------------------------------------------------------------------------------------------------------


def _ring(bug: int, schedule: int = simt.FORWARD, seed: int = 3, tiles: int = 5) -> tuple[list[str], torch.Tensor]:
    """Reports, and the product [64, 64] with what it has to be."""
    x = torch.randn(64, 64 * tiles).bfloat16()
    d = torch.zeros(128, 32)
    kernel = simt.build_kernel("hopper.cu", "ring", "ring", 160)
    machine = simt.machine()
    machine.clear()
    machine.register(x, "x")
    machine.register(d, "d", False)
    reports = machine.launch(
        kernel, [TensorMap(x, (64, 64)).packed(), d, tiles, bug], (1,), 160, 1024 + 3 * 8192, schedule, seed
    )
    thread = torch.arange(128)[:, None]
    i = torch.arange(32)[None]
    row = thread // 32 * 16 + thread % 32 // 4 + i // 2 % 2 * 8
    got = torch.empty(64, 64)
    got[row, i // 4 * 8 + thread % 4 * 2 + i % 2] = d
    return reports, torch.stack([got, (x.double() @ x.double().T).float()])


@pytest.mark.parametrize("schedule", simt.SCHEDULES)
@pytest.mark.parametrize("tiles", [1, 2, 5])
def test_a_correct_ring_gives_no_report(schedule, tiles):
    reports, (got, wanted) = _ring(0, schedule, tiles=tiles)
    assert reports == []
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-4)


# What a report says; where a schedule decides what goes wrong first, any of them.
BUGS = {
    1: r"deadlock: .* waits \(.*for parity 0 .* where 1 arrivals and 0 bytes are missing",
    2: r"tma: .* an mbarrier without a fence after its initialisation",
    3: r"race: .* not ordered after its initialisation by thread 0|mbarrier: .* that was never initialised",
    4: r"mbarrier: thread 128 .* where all 1 of the phase have arrived",
    5: r"deadlock: .* for parity 0 of the mbarrier shared empty",
    6: r"async: read of .* its TMA copy has not arrived",
    7: r"deadlock: .* 0 arrivals and -4096 bytes are missing",
    8: r"mbarrier: thread 128 .* where all 1 of the phase have arrived",
    9: r"tma: .* a misaligned place in shared memory",
    10: r"async: read of .* TMA copy|uninitialised: read of shared dynamic memory",
    11: r"async: read of .* TMA copy|uninitialised: read of shared dynamic memory",
    12: r"proxy: .* written by thread \d+ without fence.proxy.async|race: .* not ordered after the write by thread",
    13: r"wgmma: .* registers no wgmma.fence has ordered",
    14: r"wgmma: .* a tile of A that does not begin where the swizzle does",
    15: r"wgmma: .* differ in its warpgroup",
    16: r"wgmma: .* products it never waited for",
    17: r"race: a TMA copy by thread 128 .* reads what it overwrites",
    18: r"wgmma: .* wrote an accumulator before wgmma.wait_group",
    19: r"wgmma: .* products it never waited for",
    20: r"race: a TMA copy by thread 128 .* reads what it overwrites|mbarrier: ",
}  # fmt: skip


@hooked
@pytest.mark.parametrize("schedule", simt.SCHEDULES)
@pytest.mark.parametrize("bug", BUGS)
def test_a_bug_is_found_and_named(bug, schedule):
    reports, _ = _ring(bug, schedule)
    assert any(re.match(BUGS[bug], r) for r in reports), reports
