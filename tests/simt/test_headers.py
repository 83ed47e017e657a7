"""The device headers under nvcc for every architecture, and their scalar functions on the machine."""

from __future__ import annotations

import subprocess

import numpy as np
import pytest
import torch

from tests.support import simt
from vlmops.backends import build, cuda_build

ARCHS = ("sm_80", "sm_90a", "sm_100a", "sm_120")


@pytest.mark.parametrize("arch", ARCHS)
def test_nvcc_takes_every_function_without_a_warning(arch, tmp_path):
    try:
        nvcc = cuda_build.toolkit().nvcc
    except build.BuildError as err:
        pytest.skip(str(err))
    out = tmp_path / "headers.ptx"
    for entry in ("every", "math"):
        words = [
            f"-arch={arch}",
            "-std=c++17",
            "-Werror",
            "all-warnings",
            f"-I{simt.CSRC / 'cuda'}",
            "-DVLMOPS_NAME=headers",
        ]
        words += [
            "-DVLMOPS_THREADS=128",
            f"-DVLMOPS_ENTRY_{entry}",
            str(simt.KERNELS / "headers.cu"),
            "-ptx",
            "-o",
            str(out),
        ]
        run = subprocess.run([nvcc, *words], capture_output=True, text=True, env=simt.environment())
        assert run.returncode == 0, run.stderr
        if entry == "every":
            ptx = out.read_text()
            for word in (
                "cp.async.cg.shared.global", "cp.async.ca.shared.global", "cp.async.wait_group",
                "ldmatrix.sync.aligned.m8n8.x4.trans",
                "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32", "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32",
                "cvt.rn.bf16x2.f32", "cvt.rn.f16x2.f32", ".minnctapersm 2",
                "ld.global.v4", "ld.global.nc.v2", "st.global.v4",  # vectors stay whole though their elements are used alone
            ):  # fmt: skip
                assert word in ptx, word


@pytest.mark.parametrize("entry", ["box", "product", "ring"])
def test_nvcc_takes_what_is_sm_90a_alone(entry, tmp_path):
    try:
        nvcc = cuda_build.toolkit().nvcc
    except build.BuildError as err:
        pytest.skip(str(err))
    out = tmp_path / "hopper.ptx"
    words = ["-arch=sm_90a", "-std=c++17", "-Werror", "all-warnings", f"-I{simt.CSRC / 'cuda'}", "-DVLMOPS_NAME=hopper"]
    words += [
        "-DVLMOPS_THREADS=160",
        f"-DVLMOPS_ENTRY_{entry}",
        "-DVLMOPS_T=fp16",
        "-DVLMOPS_N=72",
        "-DVLMOPS_ALONG_N=1",
    ]
    source = str(simt.KERNELS / "hopper.cu")
    run = subprocess.run(
        [nvcc, *words, source, "-ptx", "-o", str(out)], capture_output=True, text=True, env=simt.environment()
    )
    assert run.returncode == 0, run.stderr
    wanted = {
        "box": ("cp.async.bulk.tensor.2d", "cp.async.bulk.tensor.3d", "prefetch.tensormap", "mbarrier.try_wait.parity"),
        "product": ("wgmma.mma_async.sync.aligned.m64n72k16.f32.f16.f16", "wgmma.fence", "mbarrier.arrive.expect_tx"),
        "ring": ("wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16", "wgmma.wait_group", "fence.mbarrier_init"),
    }
    ptx = out.read_text()
    for word in wanted[entry]:
        assert word in ptx, word


def test_the_machine_compiles_every_function():
    simt.build_kernel("headers.cu", "every", "every", 128)  # -Wall -Wextra -Werror


@pytest.mark.filterwarnings("ignore:.*encountered.*:RuntimeWarning")
def test_scalar_functions():
    special = [0.0, -0.0, float("inf"), float("-inf"), float("nan"), 1.0, 0.5, 0.125, 0.375, 2.5, 1e-40, -130.0, 127.5]
    x = torch.cat([torch.tensor(special), torch.randn(200) * 3])
    n = x.numel()
    kernel = simt.build_kernel("headers.cu", "math", "math", 64)
    machine = simt.machine()
    machine.clear()
    y = torch.full((20, n), float("nan"))
    machine.register(x, "x")
    machine.register(y, "y", False)
    v = x.double().numpy()
    finite = np.isfinite(v)  # rounding infinity to an int is not defined
    x[~finite] = 0.0
    v[~finite] = 0.0
    assert machine.launch(kernel, [x, y, n], (-(-n // 64),), 64) == []
    p = np.abs(v)
    erf = torch.erf(torch.from_numpy(v)).numpy()
    wanted = [
        np.exp2(v), np.exp2(v), np.exp(v), np.exp(v), np.log2(p), np.log2(p), np.log(p), np.tanh(v), np.tanh(v), erf,
        1 / (1 + np.exp(-v)), 1 / np.sqrt(p), 1 / np.sqrt(p), np.sqrt(p), 1 / v, v * v - 1, v, np.minimum(v, 0.5),
        np.round(v * 4), np.isnan(v),
    ]  # fmt: skip
    for row, want in zip(y.numpy(), wanted, strict=True):
        np.testing.assert_allclose(row, want.astype(np.float32), rtol=3e-6, atol=1e-7)
