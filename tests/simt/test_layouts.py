"""Register layouts of mma and ldmatrix against two oracles that share no code with the machine: Triton's compiler, numpy."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
import torch

from tests.support import simt

TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}

# A process of its own: the compiler's Python binding prints what it leaks when it ends.
ASK_TRITON = """
import json
from triton._C.libtriton import gluon_ir, ir
from triton.experimental.gluon.language._layouts import DotOperandLayout, NVMMADistributedLayout

context = ir.context()
ir.load_dialects(context)
builder = gluon_ir.GluonOpBuilder(context)
c = NVMMADistributedLayout(version=[2, 0], warps_per_cta=[1, 1], instr_shape=[16, 8])
wanted = {"A": (DotOperandLayout(0, c, 2), [16, 16]), "B": (DotOperandLayout(1, c, 2), [16, 8]), "C": (c, [16, 8])}
bases = {}
for name, (layout, shape) in wanted.items():
    linear = builder.to_linear_layout(layout._to_ir(builder), shape)
    bases[name] = (linear.reg_bases, linear.lane_bases)
print(json.dumps(bases))
"""


@pytest.fixture(scope="module")
def layouts() -> dict[str, np.ndarray]:
    """Per operand: [lane, element of the lane] -> (row, column), from Triton's compiler for mma.m16n8k16."""
    pytest.importorskip("triton", reason="the layout oracle is Triton's compiler")
    run = subprocess.run([sys.executable, "-c", ASK_TRITON], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    found = {}
    for name, (registers, lanes) in json.loads(run.stdout).items():
        place = np.zeros((32, 1 << len(registers), 2), int)
        for lane in range(32):
            for element in range(1 << len(registers)):
                bits = [b for i, b in enumerate(lanes) if lane >> i & 1]
                bits += [b for i, b in enumerate(registers) if element >> i & 1]
                place[lane, element] = np.bitwise_xor.reduce(np.array([[0, 0], *bits]), axis=0)
        found[name] = place
    return found


def _registers(matrix: torch.Tensor, place: np.ndarray) -> torch.Tensor:
    """[lane, element] of a matrix."""
    return matrix[place[..., 0], place[..., 1]].contiguous()


@pytest.mark.parametrize("schedule", simt.SCHEDULES)
@pytest.mark.parametrize("dtype", TYPES)
def test_mma_multiplies_matrices_laid_out_as_triton_has_them(layouts, dtype, schedule):
    a, b = torch.randn(16, 16).to(TYPES[dtype]), torch.randn(16, 8).to(TYPES[dtype])
    c = torch.randn(16, 8)
    registers = {"a": _registers(a, layouts["A"]), "b": _registers(b, layouts["B"]), "c": _registers(c, layouts["C"])}
    kernel = simt.build_kernel("layouts.cu", f"mma_{dtype}", "mma", 32, T=dtype)
    machine = simt.machine()
    machine.clear()
    for name, tensor in registers.items():
        machine.register(tensor, name)
    assert machine.launch(kernel, list(registers.values()), (1,), 32, schedule=schedule) == []
    assert machine.counters["mma_flops"] == 2 * 16 * 8 * 16
    wanted = a.double().numpy() @ b.double().numpy() + c.double().numpy()
    got = np.full((16, 8), np.nan)
    got[layouts["C"][..., 0], layouts["C"][..., 1]] = registers["c"].numpy()
    np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", TYPES)
def test_mma_of_special_values(layouts, dtype):
    """Subnormals, infinities and NaN of both types go through the product."""
    info = torch.finfo(TYPES[dtype])
    column = torch.tensor([info.smallest_normal / 4, -info.tiny, info.max, 1.0, float("inf"), float("nan"), -0.0, 2.0])
    a = torch.zeros(16, 16)
    a[:8, 0] = column
    b = torch.zeros(16, 8)
    b[0] = torch.tensor([1.0, -1.0, 0.5, 0.25, 2.0, 1.0, 1.0, 1.0])
    a, b, c = a.to(TYPES[dtype]), b.to(TYPES[dtype]), torch.zeros(16, 8)
    registers = [_registers(a, layouts["A"]), _registers(b, layouts["B"]), _registers(c, layouts["C"])]
    kernel = simt.build_kernel("layouts.cu", f"mma_{dtype}", "mma", 32, T=dtype)
    machine = simt.machine()
    machine.clear()
    for name, tensor in zip("abc", registers, strict=True):
        machine.register(tensor, name)
    assert machine.launch(kernel, registers, (1,), 32) == []
    got = np.zeros((16, 8), np.float32)
    got[layouts["C"][..., 0], layouts["C"][..., 1]] = registers[2].numpy()
    with np.errstate(invalid="ignore", over="ignore"):
        wanted = a.float().numpy() @ b.float().numpy()
    np.testing.assert_array_equal(got, wanted)


def _ldmatrix(tile: torch.Tensor, row: torch.Tensor, matrices: int, transposed: bool) -> torch.Tensor:
    """[lane, element] that ldmatrix loads from the rows [32, 8] that the lanes name."""
    kernel = simt.build_kernel("layouts.cu", "ldmatrix_bf16", "ldmatrix", 32, T="bf16")
    machine = simt.machine()
    machine.clear()
    r = torch.zeros(32, 4, dtype=torch.int32)
    for name, tensor in (("tile", tile), ("row", row), ("r", r)):
        machine.register(tensor, name)
    assert machine.launch(kernel, [tile, row, r, matrices, int(transposed)], (1,), 32) == []
    return r[:, :matrices].contiguous().view(torch.bfloat16)


def test_ldmatrix_loads_the_a_operand(layouts):
    """x4 of a row-major [16, 16]: rows lane % 16, columns 8 from lane / 16 on."""
    a = torch.randn(16, 16).bfloat16()
    tile = a.view(16, 2, 8).transpose(0, 1).reshape(32, 8).contiguous()  # left half, right half
    lane = torch.arange(32)
    got = _ldmatrix(tile, (lane % 16 + lane // 16 * 16).int(), 4, False)
    assert torch.equal(got, _registers(a, layouts["A"]))


def test_ldmatrix_loads_the_b_operand_from_n_by_k(layouts):
    """x2 of a row-major [n = 8, k = 16]."""
    b = torch.randn(16, 8).bfloat16()
    tile = torch.zeros(32, 8).bfloat16()
    tile[:16] = b.T.reshape(8, 2, 8).transpose(0, 1).reshape(16, 8)  # k < 8, then the rest
    got = _ldmatrix(tile, (torch.arange(32) % 16).int(), 2, False)
    assert torch.equal(got, _registers(b, layouts["B"]))


def test_ldmatrix_trans_loads_the_b_operand_from_k_by_n(layouts):
    """x2.trans of a row-major [k = 16, n = 8], as attention reads V; x4.trans of two of them."""
    b = torch.randn(16, 8).bfloat16()
    tile = torch.cat([b, torch.randn(16, 8).bfloat16()])
    got = _ldmatrix(tile, (torch.arange(32) % 16).int(), 2, True)
    assert torch.equal(got, _registers(b, layouts["B"]))
    got = _ldmatrix(tile, torch.arange(32).int(), 4, True)
    both = torch.cat([_registers(b, layouts["B"]), _registers(tile[16:], layouts["B"])], 1)
    assert torch.equal(got, both)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("swizzle", [0, 1])
@pytest.mark.parametrize(("m", "n", "k"), [(64, 64, 64), (50, 70, 32), (1, 8, 96)])
def test_a_product_of_tiles_matches_numpy(dtype, swizzle, m, n, k):
    a, b = torch.randn(m, k).to(TYPES[dtype]), torch.randn(n, k).to(TYPES[dtype])
    kernel = simt.build_kernel("gemm.cu", f"gemm_{dtype}_{swizzle}", "gemm", 128, T=dtype, SWIZZLE=swizzle)
    machine = simt.machine()
    for schedule in simt.SCHEDULES:
        c = torch.full((m, n), float("nan"))
        machine.clear()
        for name, tensor in (("a", a), ("b", b)):
            machine.register(tensor, name)
        machine.register(c, "c", False)
        grid = (-(-m // 64), -(-n // 64))
        assert machine.launch(kernel, [a, b, c, m, n, k], grid, 128, 16384, schedule, seed=5) == []
        np.testing.assert_allclose(c.numpy(), a.double().numpy() @ b.double().numpy().T, rtol=1e-4, atol=1e-4)
