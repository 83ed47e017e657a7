"""Every CUDA kernel compiles for every GPU without warnings or spills, as benchmarks/budgets/cuda.json says (`make budgets`)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.scripts import load_script
from vlmops.backends import build, cuda_build
from vlmops.backends.cuda_runtime import TARGETS
from vlmops.ops._shared.cuda_kernels import ops_with_kernels

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "scripts" / "cuda_budget.py"
FILE = ROOT / "benchmarks" / "budgets" / "cuda.json"
OPS = ops_with_kernels()


@pytest.fixture(scope="module")
def tool():
    return load_script("cuda_budget")


@pytest.fixture(scope="module")
def budget():
    if not FILE.exists():
        pytest.skip("benchmarks/budgets/cuda.json has not been written: python scripts/cuda_budget.py")
    return json.loads(FILE.read_text())


def run(*words: str) -> None:
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, str(SCRIPT), *words], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("op", OPS)
def test_compiles_as_budgeted(op, budget):
    pytest.importorskip("triton", reason="its wheel carries cuobjdump and nvdisasm")
    try:
        cuda_build.toolkit()
    except build.BuildError as err:
        pytest.skip(str(err))
    run("--check", "--quick", "--op", op, "--jobs", "1")


@pytest.mark.slow
@pytest.mark.parametrize("op", OPS)
def test_nvrtc_compiles_every_specialisation(op):
    """What CuPy would do on a machine without nvcc."""
    nvrtc = pytest.importorskip("cuda.bindings.nvrtc", reason="pip install cuda-bindings nvidia-cuda-nvrtc")
    try:
        nvrtc.nvrtcVersion()
    except Exception as err:  # the bindings are there, the library is not
        pytest.skip(f"pip install nvidia-cuda-nvrtc: {err}")
    run("--nvrtc", "--op", op)


def test_a_quick_check_has_every_kernel_and_every_architecture(tool):
    """Each kernel on two architectures, or on the one it is for; over an op's kernels each architecture has its turn."""
    seen = set()
    for op in ("linear", "rotary", "varlen_attention"):
        every, quick = tool.compiled(op, None, False), tool.compiled(op, None, True)
        archs = {key: [a for k, a, _ in every if k == key] for key, _, _ in every}
        for key, all_of_it in archs.items():
            chosen = [a for k, a, _ in quick if k == key]
            assert len(chosen) == min(2, len(all_of_it)) and chosen[0] == all_of_it[0]
        seen |= {a for _, a, _ in quick}
    assert seen == set(TARGETS)


def test_every_op_with_kernels_has_a_budget(budget):
    kernels = {p.parent.name for p in (ROOT / "vlmops" / "ops").glob("*/cuda.py")}
    assert kernels == set(OPS) == {key.split(" | ")[0] for key in budget["counters"]}


def test_the_budget_is_whole(budget):
    assert budget["nvcc"]
    for version, kernels in budget["nvcc"].items():
        for key, rows in kernels.items():
            assert rows and set(rows) <= set(TARGETS), f"{key}, nvcc {version}"
            for target, row in rows.items():
                assert row["spills"] == 0 and 0 < row["occupancy"] <= 1, f"{key} on {target}, nvcc {version}"


def test_occupancy_of_known_kernels(tool):
    row = dict(registers=32, shared=0, warps=4)
    assert tool.occupancy(row, TARGETS["sm_80"]) == 1.0  # 16 blocks of 4 warps fill 64
    assert tool.occupancy(row | dict(registers=128), TARGETS["sm_80"]) == 0.25  # 65536 / (128 * 128) = 4 blocks
    assert tool.occupancy(row | dict(registers=128), TARGETS["sm_89"]) == 0.333  # of 48 warps
    assert tool.occupancy(row | dict(shared=100 << 10), TARGETS["sm_90a"]) == 0.125  # two blocks fit 228 KiB


def test_rows_are_written_in_a_line(tool):
    data = {
        "kernels": {"a": {"sm_80": {"registers": 3, "mma": {"HMMA": 2}, "warps": 1}}},
        "counters": {"a": {"launches": 1}},
    }
    text = tool.in_lines(data)
    assert json.loads(text) == data and '{"registers": 3, "mma": { "HMMA": 2 }, "warps": 1}' in text
