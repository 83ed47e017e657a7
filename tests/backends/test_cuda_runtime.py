"""Launch plans, and that every executor launches the same; what is forced."""

from __future__ import annotations

import ctypes
import dataclasses
import struct
import sys

import pytest
import torch

import vlmops
from tests.support.cuda_executors import GPU, FakeCupy, FakeLibrary, arguments, some_plans
from vlmops.backends import BackendError, build, cuda_build, cuda_cupy, cuda_library, cuda_runtime, cuda_simt
from vlmops.backends.cuda_errors import CudaError
from vlmops.backends.cuda_plan import Scalar, TensorMap
from vlmops.backends.cuda_runtime import TARGETS, Out, Plan, f32, i32, i64, vector
from vlmops.ops import rotary
from vlmops.ops.rotary import OP
from vlmops.ops.rotary import cuda as rotary_cuda


def test_arguments_are_packed_in_slots_of_eight_bytes():
    x = torch.randn(4)
    plan = Plan("a.cu", "a", (), (1, 1, 1), 32, (x, None, Out(x), i32(-5), i64(1 << 40), f32(0.5)))
    assert plan.packed() == struct.pack("<QQQi4xqf4x", x.data_ptr(), 0, x.data_ptr(), -5, 1 << 40, 0.5)


def test_tensor_maps_come_first_and_whole():
    """128 bytes each, innermost dimension first; then the slots."""
    x, y = torch.zeros(20, 3, 80).half(), torch.zeros(9, 72).bfloat16()
    maps = (TensorMap(x[:, :, 8:], (16, 1, 64)), TensorMap(y, (8, 64)))
    plan = Plan("a.cu", "a", (), (1, 1, 1), 32, (*maps, Out(y), i32(-5)), arch="sm90a")
    assert plan.maps == 2 and plan.device == x.device
    three = struct.pack("<Q6q6I48x", x.data_ptr() + 16, 72, 3, 20, 2, 160, 480, 64, 1, 16, 3, 2, 3)
    two = struct.pack("<Q6q6I48x", y.data_ptr(), 72, 9, 1, 2, 144, 0, 64, 8, 1, 2, 2, 3)
    assert plan.packed() == three + two + struct.pack("<Qi4x", y.data_ptr(), -5) and len(three) == 128
    with pytest.raises(ValueError, match="first arguments"):
        dataclasses.replace(plan, args=(y, maps[0])).packed()


def test_tensor_maps_reach_the_library(fresh_cuda, stream, monkeypatch):
    seen = []

    class Library(FakeLibrary):
        def launch(self, *args):
            seen.append(args[-2:])
            return 0

    monkeypatch.setattr(cuda_library, "ready_libraries", lambda: (Library(),))
    y = torch.zeros(9, 72).bfloat16()
    plan = Plan("a.cu", "a", (), (1, 1, 1), 32, (TensorMap(y, (8, 64)), Out(y)), arch="sm90a")
    cuda_library.launch(plan, GPU)
    assert seen == [(plan.packed(), 1)]


def test_cupy_needs_the_bindings_for_tensor_maps(monkeypatch):
    monkeypatch.setitem(sys.modules, "cuda.bindings.driver", None)
    y = torch.zeros(9, 72).bfloat16()
    with pytest.raises(CudaError, match="pip install cuda-bindings"):
        cuda_cupy.arguments(Plan("a.cu", "a", (), (1, 1, 1), 32, (TensorMap(y, (8, 64)), Out(y))))


def test_an_int_that_does_not_fit_is_an_error():
    with pytest.raises(OverflowError, match="no 32-bit integer"):
        i32(1 << 31)


def test_names_and_macros():
    plan = Plan("a.cu", "norm", (("T", "bf16"), ("D", 80), ("CAUSAL", True), ("BIAS", False)), (1, 1, 1), 64, ())
    assert plan.name == "norm_bf16_d80_causal_t64"
    assert plan.macros == [
        "-DVLMOPS_ENTRY_norm=1", "-DVLMOPS_NAME=norm_bf16_d80_causal_t64", "-DVLMOPS_THREADS=64", "-DVLMOPS_T=bf16",
        "-DVLMOPS_D=80", "-DVLMOPS_CAUSAL=1", "-DVLMOPS_BIAS=0",
    ]  # fmt: skip
    assert dataclasses.replace(plan, arch="sm90a").name == plan.name + "_sm90a"


def test_every_kernel_has_a_name_of_its_own():
    plans = some_plans()
    assert len({p.name for p in plans}) == len({p.kernel for p in plans}) >= 6


@pytest.mark.parametrize(
    ("grid", "block"), [((1, 1 << 16, 1), 32), ((1 << 31, 1, 1), 32), ((1, 1, 1), 2048), ((1, 1, 1), 33)]
)
def test_launches_no_gpu_takes_are_refused(grid, block):
    with pytest.raises(ValueError, match="cannot be launched"):
        cuda_runtime.run([Plan("a.cu", "a", (), grid, block, (torch.empty(1),))])


def test_more_shared_memory_than_the_gpu_has_is_refused():
    plan = Plan("a.cu", "a", (), (1, 1, 1), 32, (torch.empty(1, device="meta"),), shared=120 << 10)
    with cuda_runtime.record(cuda_runtime.TARGETS["sm_80"]) as seen:
        cuda_runtime.run([plan])
    assert seen == [plan]
    with cuda_runtime.record(cuda_runtime.TARGETS["sm_89"]), pytest.raises(ValueError, match="a block may have 101376"):
        cuda_runtime.run([plan])


@pytest.mark.parametrize(("shape", "begin", "want"), [
    ((4, 16), 0, 8), ((4, 20), 0, 4), ((4, 17), 0, 1), ((4, 18), 2, 2), ((1, 17), 0, 8), ((0, 17), 0, 8),
])  # fmt: skip
def test_width_of_an_access(shape, begin, want):
    for device in ("cpu", "meta"):
        x = torch.empty(shape, dtype=torch.bfloat16, device=device)[:, begin : begin + 16]
        assert vector([x, None], [16]) == want
    assert vector([x], [12]) == min(want, 4)


def test_recorder_sees_plans_and_runs_nothing():
    x, cos, sin = arguments("meta")
    with cuda_runtime.record(TARGETS["sm_90a"]) as plans:
        out, _ = rotary_cuda.forward(x, None, cos, sin, False)
        assert cuda_runtime.processors(x) == 132 and cuda_runtime.shared_bytes(x) == 227 << 10
        rotary_cuda.forward(x[:0], None, cos[:0], sin[:0], False)  # an empty grid is no launch
    assert out.device.type == "meta" and [p.entry for p in plans] == ["rotary_heads"]
    assert cuda_runtime.target(torch.empty(1)) == cuda_runtime.SIMT


def test_plans_do_not_depend_on_the_executor(monkeypatch):
    found = []
    for name in cuda_runtime.EXECUTORS:
        monkeypatch.setenv("VLMOPS_CUDA_EXECUTOR", name)
        found.append([dataclasses.replace(p, args=()) for p in some_plans()])
    assert found[0] == found[1] == found[2]


# -- executors -------------------------------------------------------------------------------------------------------


def launches_of_library(plans, monkeypatch):
    library = FakeLibrary()
    monkeypatch.setattr(cuda_library, "ready_libraries", lambda: (library,))
    for plan in plans:
        cuda_library.launch(plan, GPU)
    return library.seen


def launches_of_simt(plans, monkeypatch):
    seen = []

    class Machine:
        def vlmops_simt_launch(self, entry, args, grid, block, shared, schedule, seed):
            slots = b"".join(ctypes.string_at(p, 8) for p in args)
            seen.append((entry, tuple(grid), block[0], shared, slots))
            return 0

        def __getattr__(self, name):
            return lambda *args: None

    monkeypatch.setattr(cuda_simt, "_machine", Machine)
    monkeypatch.setattr(cuda_simt, "_entry", lambda kernel, name: name)
    for plan in plans:
        cuda_simt.launch(plan, torch.device("cpu"))
    return seen


def test_executors_launch_the_same(fresh_cuda, stream, monkeypatch):
    """Same kernels, grids, blocks, shared memory and bytes of arguments; CuPy gets each argument in its own size."""
    plans = some_plans()
    want = [(p.name, p.grid, p.block, p.shared, p.packed()) for p in plans]
    assert launches_of_library(plans, monkeypatch) == want
    assert launches_of_simt(plans, monkeypatch) == want
    cupy = FakeCupy()
    monkeypatch.setattr(cuda_cupy, "_cupy", lambda: cupy)
    for plan in plans:
        cuda_cupy.launch(plan, GPU)
    for have, (*head, slots), plan in zip(cupy.seen, want, plans, strict=True):
        assert list(have[:4]) == head
        for i, (value, arg) in enumerate(zip(have[4], plan.args, strict=True)):
            size = 4 if isinstance(arg, Scalar) and arg.code != "q" else 8
            assert value.tobytes() == slots[8 * i : 8 * i + size]
    assert (77, 0) in cupy.streams, "not on torch's stream"


def test_cupy_compiles_what_the_others_do(fresh_cuda, stream, monkeypatch):
    cupy, plan = FakeCupy(), some_plans()[0]
    monkeypatch.setattr(cuda_cupy, "_cupy", lambda: cupy)
    cuda_cupy.launch(plan, GPU)
    code, options = cupy.options[plan.name]
    assert f'#include "{plan.source}"' in code and cuda_build.source_digest(build.csrc_dir(), plan.source) in code
    assert set(plan.macros) < set(options) and f"-I{build.csrc_dir() / 'cuda'}" in options
    assert set(plan.macros) < set(cuda_simt.unit(plan).commands[0][2])
    assert set(plan.macros) < set(cuda_build.flags(plan, ["sm_80"]))


def test_a_kernel_of_one_architecture_is_compiled_for_that_alone():
    plan = dataclasses.replace(some_plans()[0], arch="sm90a")
    words = cuda_build.flags(plan, cuda_build.ARCHS)
    assert [w for w in words if w.startswith("arch=")] == ["arch=compute_90a,code=sm_90a"]


def test_two_kernels_of_one_name_are_an_error(monkeypatch):
    monkeypatch.setattr(cuda_build, "toolkit", lambda: cuda_build.Toolkit("nvcc", "13.0.0", "", ""))
    first = Plan("rotary.cu", "a", (("X", 11),), (1, 1, 1), 32, ())
    second = Plan("rotary.cu", "a", (("X1", 1),), (1, 1, 1), 32, ())
    assert first.name == second.name
    with pytest.raises(ValueError, match="two kernels are called a_x11_t32"):
        cuda_build.library([first, second])


def test_a_name_that_is_no_executor(monkeypatch):
    monkeypatch.setenv("VLMOPS_CUDA_EXECUTOR", "gpu")
    with vlmops.use_backend("cuda"), pytest.raises(ValueError, match="expected one of library, cupy, simt"):
        rotary(*arguments())


@pytest.mark.parametrize("name", [None, "library", "cupy"])
def test_cpu_tensors_need_the_machine(name, monkeypatch):
    monkeypatch.delenv("VLMOPS_CUDA_EXECUTOR", raising=False)
    if name:
        monkeypatch.setenv("VLMOPS_CUDA_EXECUTOR", name)
    with vlmops.use_backend("cuda"), pytest.raises(BackendError, match="VLMOPS_CUDA_EXECUTOR=simt"):
        rotary(*arguments())


def test_the_machine_takes_cpu_tensors_only(fresh_cuda, monkeypatch):
    monkeypatch.setenv("VLMOPS_CUDA_EXECUTOR", "simt")
    with pytest.raises(BackendError, match="simt runs CPU tensors only"):
        cuda_runtime.executor(GPU)


@pytest.mark.parametrize("name", [None, *cuda_runtime.EXECUTORS])
def test_auto_never_picks_it_on_a_cpu(name, monkeypatch):
    if name:
        monkeypatch.setenv("VLMOPS_CUDA_EXECUTOR", name)
    x, cos, sin = arguments()
    OP._memory.clear()
    assert OP.resolve((x, None, cos, sin, False)) != "cuda"


def test_other_dtypes_are_refused(monkeypatch):
    monkeypatch.setenv("VLMOPS_CUDA_EXECUTOR", "simt")
    with vlmops.use_backend("cuda"), pytest.raises(BackendError, match=r"float64 \(only float32"):
        rotary(*arguments(dtype=torch.float64))


def on_a_gpu(monkeypatch, capability=(8, 6)):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)


def test_without_nvcc_and_cupy_both_are_named(fresh_cuda, monkeypatch):
    on_a_gpu(monkeypatch)
    monkeypatch.setattr(cuda_build, "toolkit", lambda: (_ for _ in ()).throw(build.BuildError("nvcc not found")))
    monkeypatch.setitem(sys.modules, "cupy", None)
    monkeypatch.setattr(cuda_cupy.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(BackendError, match=r"library: nvcc not found; cupy: cupy is not installed: pip install"):
        cuda_runtime.executor(GPU)


def test_old_gpus_are_refused(fresh_cuda, monkeypatch):
    on_a_gpu(monkeypatch, (7, 5))
    with pytest.raises(BackendError, match=r"compute capability 7\.5 \(8\.0 or newer\)"):
        cuda_runtime.executor(GPU)


def test_the_library_comes_first_then_cupy(fresh_cuda, monkeypatch):
    on_a_gpu(monkeypatch)
    monkeypatch.setattr(cuda_library, "why_not", lambda device: None)
    assert cuda_runtime.executor(GPU) is cuda_library
    cuda_runtime._choose.cache_clear()
    monkeypatch.setattr(cuda_library, "why_not", lambda device: "no nvcc")
    monkeypatch.setattr(cuda_cupy, "why_not", lambda device: None)
    assert cuda_runtime.executor(GPU) is cuda_cupy
