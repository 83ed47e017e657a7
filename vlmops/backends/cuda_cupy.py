"""Executor "cupy": kernels compiled by NVRTC through CuPy's RawModule, where there is no nvcc. Zero copy, torch's stream.

CuPy keeps compiled kernels in its own cache (~/.cupy/kernel_cache); the sources' digest is part of the code, because CuPy's key
does not look into included files.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
from typing import Any

import numpy as np
import torch

from vlmops.backends import build, cuda_build
from vlmops.backends.cuda_errors import CudaError, DriverTooOld, NoDevice, cuda_error
from vlmops.backends.cuda_plan import MAP_BYTES, Kernel, Plan, Scalar, TensorMap

__all__ = ["arguments", "code", "launch", "options", "run_in_order", "why_not"]

INSTALL = "pip install 'vlmops[cuda13]' (or [cuda12], as the driver is)"
_NUMPY = {"i4x": np.int32, "q": np.int64, "f4x": np.float32}
PLAIN_SHARED = 48 << 10  # bytes a kernel may have without asking


def why_not(device: torch.device) -> str | None:
    """Why this executor cannot run; None if it can. CuPy is looked for, not imported."""
    if importlib.util.find_spec("cupy") is None:
        return f"cupy is not installed: {INSTALL}"
    try:
        build.csrc_dir()
    except build.BuildError as err:
        return str(err)
    return None if device.type == "cuda" else f"a tensor on {device}"


@functools.lru_cache(maxsize=1)
def _cupy() -> Any:
    try:
        return importlib.import_module("cupy")
    except Exception as err:  # it raises what the missing CUDA library raises
        raise NoDevice(f"cupy does not start: {err} ({INSTALL})") from err


def code(plan: Plan) -> str:
    """What NVRTC compiles: the kernel's file, and the digest of all it includes."""
    digest = cuda_build.source_digest(build.csrc_dir(), plan.source)
    return f'// {digest}\n#include "{plan.source}"\n'


def options(plan: Plan) -> tuple[str, ...]:
    """NVRTC's options, without the architecture, which CuPy adds."""
    return (f"-I{build.csrc_dir() / 'cuda'}", cuda_build.STANDARD, *plan.macros)


def arguments(plan: Plan) -> tuple[Any, ...]:
    """The plan's arguments as numpy scalars of their sizes: CuPy hands on their bytes."""
    found: list[Any] = []
    maps = plan.maps
    found += [_encoded(arg) for arg in plan.args[:maps] if isinstance(arg, TensorMap)]
    for arg, slot in zip(plan.args[maps:], _eights(plan.packed()[maps * MAP_BYTES :]), strict=True):
        kind = _NUMPY[arg.code] if isinstance(arg, Scalar) else np.uint64
        found.append(np.frombuffer(slot, kind, 1)[0])
    return tuple(found)


def _encoded(arg: TensorMap) -> Any:
    """A tensor map as the driver makes it, by value.

    Raises:
        CudaError: cuda.bindings is not installed, or the driver refuses the map.
    """
    try:
        driver = importlib.import_module("cuda.bindings.driver")
    except ImportError as err:
        raise CudaError("tensor maps (sm_90a kernels) need cuda.bindings: pip install cuda-bindings") from err
    t, dims = arg.tensor, arg.tensor.dim()
    strides = [driver.cuuint64_t(s * t.element_size()) for s in t.stride()[-2::-1]]
    error, made = driver.cuTensorMapEncodeTiled(
        driver.CUtensorMapDataType.CU_TENSOR_MAP_DATA_TYPE_UINT16, dims, t.data_ptr(),
        [driver.cuuint64_t(n) for n in t.shape[::-1]], strides, [driver.cuuint32_t(n) for n in arg.box[::-1]],
        [driver.cuuint32_t(1)] * dims, driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
        driver.CUtensorMapSwizzle.CU_TENSOR_MAP_SWIZZLE_128B,
        driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
        driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
    )  # fmt: skip
    if int(error):
        raise cuda_error(int(error), f"the driver refuses a tensor map of {list(t.shape)}", "cuTensorMapEncodeTiled")
    return np.array([int(word) for word in made.opaque], np.uint64).view(f"V{MAP_BYTES}").reshape(())


def _eights(data: bytes) -> list[bytes]:
    return [data[i : i + 8] for i in range(0, len(data), 8)]


@functools.lru_cache(maxsize=4096)
def _kernel(kernel: Kernel, name: str, index: int, shared: int) -> Any:
    cupy = _cupy()
    plan = Plan.bare(kernel)
    try:
        with cupy.cuda.Device(index):
            module = cupy.RawModule(code=code(plan), options=options(plan), backend="nvrtc")
            found = module.get_function(name)
            if shared > PLAIN_SHARED:
                found.max_dynamic_shared_size_bytes = shared
            return found
    except Exception as err:
        raise _typed(err, name) from err


def _typed(err: Exception, name: str) -> Exception:
    """CuPy's exception as ours: its errors carry CUDA's number."""
    status = getattr(err, "status", None)
    if isinstance(status, int):
        return cuda_error(status, str(err), name)
    if "nvrtc" in type(err).__name__.lower() or type(err).__name__ == "CompileException":
        text = str(err)[-400:]
        if "invalid value for --gpu-architecture" in text:
            return DriverTooOld(f"{name}: this cupy's NVRTC is older than the GPU: install a newer one ({INSTALL})")
        return CudaError(f"{name} does not compile with this cupy's NVRTC: {text}")
    return CudaError(f"{name}: {type(err).__name__}: {err}")


run_in_order = contextlib.nullcontext  # the stream keeps the order


def launch(plan: Plan, device: torch.device) -> None:
    """Start a plan on torch's current stream of the device.

    Raises:
        cuda_errors.CudaError: by type what is wrong and what to do.
    """
    index = torch.cuda.current_device() if device.index is None else device.index
    kernel = _kernel(plan.kernel, plan.name, index, plan.shared)
    cupy = _cupy()
    stream = cupy.cuda.ExternalStream(torch.cuda.current_stream(index).cuda_stream, index)
    try:
        with cupy.cuda.Device(index), stream:
            kernel(plan.grid, (plan.block,), arguments(plan), shared_mem=plan.shared)
    except Exception as err:
        raise _typed(err, plan.name) from err
