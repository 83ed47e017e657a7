"""Every Triton kernel compiles for every target without spills and as benchmarks/budgets/triton.json says (`make budgets`)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.scripts import load_script

pytest.importorskip("triton")

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "scripts" / "triton_budget.py"
BUDGET = json.loads((ROOT / "benchmarks" / "budgets" / "triton.json").read_text())
OPS = sorted({key.split(" | ")[0] for key in BUDGET["kernels"]})
TARGETS = ["sm_80", "sm_90", "sm_100", "gfx942"]
#: Kernels whose work is a matrix product.
PRODUCTS = {
    "activation_gradient_gemm", "cross_dkdv_kernel", "cross_dq_kernel", "cross_forward_kernel", "fp8_forward_kernel",
    "gemm_kernel", "hidden_gradient_gemm", "logits_kernel", "patchify_forward_kernel", "patchify_images_kernel",
    "patchify_weight_kernel", "perceiver_dq_kernel", "perceiver_forward_kernel", "product_kernel", "quantized_gemm_kernel",
    "row_sums_gemm", "varlen_dkdv_kernel", "varlen_dq_kernel", "varlen_forward_kernel",
}  # fmt: skip
#: What a product of 16- or 8-bit operands must hold. float32 products are exact: plain FMA on NVIDIA.
TENSOR_CORES = {"sm_80": {"HMMA"}, "sm_90": {"HGMMA", "QGMMA"}, "sm_100": {"UTC*MMA"}, "gfx942": {"MFMA"}}
#: These have mma.sync in the place of wgmma (tcgen05): the 64 rows those take spill beside accumulators this wide.
MMA_SYNC = {
    ("cross_dkdv_kernel", "backward bfloat16 d128", "sm_90"),
    ("varlen_dkdv_kernel", "backward bfloat16 d256", "sm_90"),
    ("varlen_dkdv_kernel", "backward bfloat16 d256", "sm_100"),
    ("varlen_dq_kernel", "backward bfloat16 d256", "sm_90"),
    ("varlen_dq_kernel", "backward bfloat16 d256", "sm_100"),
}


@pytest.fixture(scope="module")
def tool():
    interpret = os.environ.get("TRITON_INTERPRET")
    module = load_script("triton_budget")  # it turns the interpreter off for its own process
    if interpret is not None:
        os.environ["TRITON_INTERPRET"] = interpret
    return module


@pytest.mark.slow
@pytest.mark.parametrize("op", OPS)
def test_compiles_as_budgeted(op):
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--check", "--op", op, "--jobs", "1"], capture_output=True, text=True, env=env
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_op_with_kernels_has_a_budget(tool):
    kernels = {p.parent.name for p in (ROOT / "vlmops" / "ops").glob("*/triton.py")}
    assert kernels == set(OPS) == set(tool.ops_with_budgets())


def test_the_budget_is_whole():
    for key, rows in BUDGET["kernels"].items():
        if " #" in key:  # one more specialisation, which tiles may make necessary on some GPUs only
            assert rows and set(rows) <= set(TARGETS) and key.split(" #")[0] in BUDGET["kernels"], key
        else:
            assert sorted(rows) == sorted(TARGETS), key
        for target, row in rows.items():
            assert row["spills"] == 0, f"{key} on {target}"
            assert 0 < row["occupancy"] <= 1, f"{key} on {target}"


def test_products_run_on_tensor_cores():
    seen = set()
    for key, rows in BUDGET["kernels"].items():
        _, label, kernel = key.split(" | ")
        kernel = kernel.split(" #")[0]
        if any(row["mma"] for row in rows.values()):
            assert kernel in PRODUCTS, f"{key}: name it a product"
        if kernel in PRODUCTS and "float32" not in label:
            seen.add(kernel)
            for target, row in rows.items():
                wanted = {"HMMA"} if (kernel, label, target) in MMA_SYNC else TENSOR_CORES[target]
                assert wanted & set(row["mma"]), f"{key} on {target}: {row['mma']}"
    assert seen == PRODUCTS


def test_a_difference_is_found(tool):
    key = next(iter(BUDGET["kernels"]))
    op = key.split(" | ")[0]
    have = {k: json.loads(json.dumps(v)) for k, v in BUDGET["kernels"].items() if k.split(" | ")[0] == op}
    assert tool.compare(have, BUDGET["kernels"], [op]) == []
    have[key]["sm_90"]["registers"] += 1
    assert len(tool.compare(have, BUDGET["kernels"], [op])) == 1
    del have[key]
    assert any(line.startswith("gone") for line in tool.compare(have, BUDGET["kernels"], [op]))
    assert tool.faults({key: {"sm_90": {"spills": 3}}}) == [f"{key} on sm_90: 3 spills"]


def test_occupancy_of_known_kernels(tool):
    from vlmops.backends.triton_runtime import TARGETS as GPUS

    row = dict(registers=32, shared=0, warps=4)
    assert tool.occupancy(row, GPUS["sm_80"]) == 1.0  # 16 blocks of 4 warps fill 64
    assert tool.occupancy(row | dict(registers=128), GPUS["sm_80"]) == 0.25  # 65536 / (128 * 128) = 4 blocks
    assert tool.occupancy(row | dict(shared=100 << 10), GPUS["sm_90"]) == 0.125  # two blocks fit 228 KiB
