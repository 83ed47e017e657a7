"""What goes wrong with a launch: typed errors, another backend under auto, the SIMT machine's reports."""

from __future__ import annotations

import dataclasses
import sys
from types import SimpleNamespace

import pytest
import torch

import vlmops
from tests.support.cuda_executors import GPU, FakeLibrary, arguments, needs_compiler, some_plans
from vlmops.backends import BackendError, build, cuda_build, cuda_cupy, cuda_library, cuda_runtime, cuda_simt
from vlmops.backends.cuda_errors import (
    ArchNotBuilt,
    CudaError,
    DriverTooOld,
    LibraryDamaged,
    NoDevice,
    OutOfMemory,
    cuda_error,
)
from vlmops.backends.cuda_runtime import i64
from vlmops.ops import rotary
from vlmops.ops._shared import registry
from vlmops.ops.merge_tokens import cuda as merge
from vlmops.ops.rotary import OP


@pytest.mark.parametrize(("code", "kind", "advice"), [
    (100, NoDevice, "CUDA_VISIBLE_DEVICES"), (3, NoDevice, "forked"), (35, DriverTooOld, "update the NVIDIA driver"),
    (222, DriverTooOld, "PTX"), (209, ArchNotBuilt, "nvcc on the PATH"), (98, ArchNotBuilt, "nvcc on the PATH"),
    (2, OutOfMemory, "free some memory"), (1, CudaError, "another backend"),
])  # fmt: skip
@pytest.mark.parametrize("where", ["prepare", "launch"])
def test_cuda_errors_have_types_and_say_what_to_do(fresh_cuda, stream, monkeypatch, code, kind, advice, where):
    library = FakeLibrary(prepare=code) if where == "prepare" else FakeLibrary(error=code)
    monkeypatch.setattr(cuda_library, "ready_libraries", lambda: (library,))
    monkeypatch.setattr(cuda_library, "_can_build", lambda: "no nvcc")
    plan = some_plans()[0]
    with pytest.raises(kind, match=advice) as caught:
        cuda_library.launch(plan, GPU)
    assert type(caught.value) is kind and plan.name in str(caught.value) and isinstance(caught.value, BackendError)


def test_cupys_errors_get_the_same_types():
    class CUDADriverError(Exception):
        status = 209

    assert type(cuda_cupy._typed(CUDADriverError("no image"), "k")) is ArchNotBuilt
    assert type(cuda_cupy._typed(type("CompileException", (Exception,), {})("bad"), "k")) is CudaError
    old = type("NVRTCError", (Exception,), {})("nvrtc: error: invalid value for --gpu-architecture (-arch)")
    assert type(cuda_cupy._typed(old, "k")) is DriverTooOld


@pytest.mark.parametrize(("driver", "kind"), [(0, NoDevice), (12080, DriverTooOld)])
def test_a_missing_or_old_driver(fresh_cuda, monkeypatch, driver, kind):
    with pytest.raises(kind, match=r"no NVIDIA driver|for CUDA 12\.8, the kernels were built with 13\.0"):
        cuda_library.check_driver(FakeLibrary(driver=driver))
    monkeypatch.setattr(cuda_library, "ready_libraries", lambda: (FakeLibrary(driver=driver),))
    assert cuda_library.why_not(GPU) is not None


@pytest.mark.parametrize("damage", ["missing", "truncated", "no library"])
def test_a_damaged_library_is_not_loaded(tmp_path, damage):
    path = tmp_path / cuda_build.LIBRARY
    recipe = cuda_build.Recipe(path.name, "it", [])
    path.write_bytes(b"\x7fELF" + b"x" * 5000)
    build.stamp(recipe, tmp_path)
    if damage == "missing":
        path.unlink()
    elif damage == "truncated":
        path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(LibraryDamaged, match=r"delete .* to build it again"):
        cuda_library.open_library(path)


@pytest.fixture
def failing(fresh_cuda, monkeypatch):
    """On CPU tensors ``auto`` would take the machine, which has no memory; how often it was tried."""
    tried = []

    def launch(plan, device):
        tried.append(plan.name)
        raise cuda_error(2, "out of memory", plan.name)

    monkeypatch.setenv("VLMOPS_CUDA_EXECUTOR", "simt")
    monkeypatch.setitem(registry.ORDER, "cpu", ("cuda", "torch"))
    monkeypatch.setattr(cuda_simt, "launch", launch)
    monkeypatch.setattr(cuda_simt, "run_in_order", cuda_library.run_in_order)
    OP._memory.clear()
    yield tried
    OP._failed.clear()
    OP._memory.clear()


@needs_compiler
def test_under_auto_another_backend_takes_over(failing, caplog):
    args = arguments()
    with vlmops.use_backend("torch"):
        want = rotary(*args)
    assert torch.equal(rotary(*args), want) and torch.equal(rotary(*args), want)
    torch.testing.assert_close(rotary(args[0][:3], args[1][:3], args[2][:3]), want[:3])
    assert len(failing) == 1, "tried again after it had failed"
    assert sum("plain PyTorch takes over" in r.getMessage() for r in caplog.records) == 1


@needs_compiler
def test_under_auto_the_gradient_too(failing, monkeypatch):
    x, cos, sin = arguments()
    out, _ = OP.raw(x.requires_grad_(), None, cos, sin, False, "torch")
    (want,) = torch.autograd.grad(out.sum(), x)
    (found,) = torch.ops.vlmops.rotary_backward.default(
        torch.ones_like(x), None, x, None, cos, sin, False, [True, False], "cuda"
    )[:1]
    torch.testing.assert_close(found, want)


@needs_compiler
def test_forced_it_raises(failing):
    with vlmops.use_backend("cuda"), pytest.raises(OutOfMemory, match="free some memory"):
        rotary(*arguments())


# -- the machine -----------------------------------------------------------------------------------------------------


@needs_compiler
def test_the_machines_reports_raise(monkeypatch):
    """A token stride too large: the kernel reads past the end of x."""
    monkeypatch.setenv("VLMOPS_CUDA_EXECUTOR", "simt")
    plan = some_plans()[0]
    args = list(plan.args)
    args[6] = i64(1 << 10)
    with pytest.raises(cuda_simt.SimtError, match=r"rotary_heads.*out-of-bounds"):
        cuda_runtime.run([dataclasses.replace(plan, args=tuple(args))])


@needs_compiler
def test_what_a_launch_leaves_unwritten_is_uninitialised_for_the_next(monkeypatch):
    monkeypatch.setenv("VLMOPS_CUDA_EXECUTOR", "simt")
    plans, taken, _ = merge.number_plans(torch.tensor([1, 7, 7, 2]), 2, 7)
    rows = torch.randn(4, 4)
    copy = merge.select_plan(taken, rows, rows, torch.empty(4, 4))
    cuda_runtime.run([*plans, copy])
    args = list(plans[0].args)
    args[4] = i64(0)  # no tokens: nothing is written
    with pytest.raises(cuda_simt.SimtError, match="ninitialised"):
        cuda_runtime.run([dataclasses.replace(plans[0], args=tuple(args)), copy])


@needs_compiler
def test_outputs_are_poisoned_first(monkeypatch):
    monkeypatch.setenv("VLMOPS_CUDA_EXECUTOR", "simt")
    plan = some_plans()[0]
    out = plan.args[4].tensor.zero_()
    monkeypatch.setattr(cuda_simt._machine(), "vlmops_simt_launch", lambda *a: 0)
    cuda_runtime.run([plan])
    assert (out > 1e38).all()


def test_nvtx_ranges_have_the_kernels_names(fresh_cuda, monkeypatch):
    seen = []

    class Range:
        def __init__(self, name, color, domain):
            seen.append((name, color, domain))

        def __enter__(self):
            seen.append("in")

        def __exit__(self, *_):
            seen.append("out")

    monkeypatch.setitem(sys.modules, "nvtx", SimpleNamespace(annotate=Range))
    monkeypatch.setenv("VLMOPS_CUDA_EXECUTOR", "simt")
    monkeypatch.setattr(cuda_simt, "run_in_order", cuda_library.run_in_order)
    monkeypatch.setattr(cuda_simt, "launch", lambda plan, device: seen.append("launch"))
    plan = some_plans()[0]
    cuda_runtime.run([plan])
    assert seen == [(plan.name, "purple", "vlmops"), "in", "launch", "out"]
