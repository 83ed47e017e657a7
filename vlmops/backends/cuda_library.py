"""Executor "library": kernels compiled by nvcc into a shared library, launched through its C ABI on torch's current stream.

Looked for in this order: the library built ahead of time (vlmops/_cuda), the one of ``build_default``, a library of the one
kernel in the user's cache, built now for this machine's GPU where nvcc is there.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib.util
import logging
import threading
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from vlmops.backends import build, cuda_build, native
from vlmops.backends.cache_dir import cache_dir
from vlmops.backends.cuda_errors import ArchNotBuilt, DriverTooOld, LibraryDamaged, NoDevice, cuda_error
from vlmops.backends.cuda_plan import MAP_BYTES, Kernel, Plan

__all__ = ["Library", "build_default", "launch", "open_library", "why_not"]

log = logging.getLogger("vlmops")
_lock = threading.RLock()
ABI = 2  # csrc/launch/library.h


class Library:
    """A kernel library through ctypes: what the pybind11 loader does where Python's headers are missing."""

    def __init__(self, path: str) -> None:
        self._abi = abi = ctypes.CDLL(path)
        if abi.vlmops_cuda_abi() != ABI:
            raise RuntimeError("a kernel library of another version of vlmops")
        abi.vlmops_cuda_kernel_name.restype = abi.vlmops_cuda_error_text.restype = ctypes.c_char_p
        abi.vlmops_cuda_find.restype = ctypes.c_void_p
        abi.vlmops_cuda_prepare.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_int]
        abi.vlmops_cuda_launch.argtypes = [
            ctypes.c_void_p, ctypes.c_int, *[ctypes.c_uint] * 5, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int, ctypes.c_int
        ]  # fmt: skip

    def kernels(self) -> list[str]:
        """Names of the kernels in it, sorted."""
        return [self._abi.vlmops_cuda_kernel_name(i).decode() for i in range(self._abi.vlmops_cuda_num_kernels())]

    def find(self, name: str) -> int:
        """The kernel's handle, 0 if it is not in this library."""
        return int(self._abi.vlmops_cuda_find(name.encode()) or 0)

    def error_text(self, error: int) -> str:
        """What CUDA says of an error number."""
        return str(self._abi.vlmops_cuda_error_text(error).decode())

    def versions(self) -> tuple[int, int, int]:
        """(error, driver, runtime): versions as 1000 * major + 10 * minor, driver 0 where there is none."""
        driver, runtime = ctypes.c_int(), ctypes.c_int()
        error = self._abi.vlmops_cuda_versions(ctypes.byref(driver), ctypes.byref(runtime))
        return int(error), driver.value, runtime.value

    def devices(self) -> tuple[int, int]:
        """(error, number of devices)."""
        count = ctypes.c_int()
        return int(self._abi.vlmops_cuda_devices(ctypes.byref(count))), count.value

    def prepare(self, kernel: int, device: int, shared: int) -> int:
        """Load a kernel on a device; an error number."""
        return int(self._abi.vlmops_cuda_prepare(kernel, device, shared))

    def launch(
        self, kernel: int, device: int, x: int, y: int, z: int, threads: int, shared: int, stream: int, slots: bytes,
        maps: int = 0,
    ) -> int:  # fmt: skip
        """Start a kernel; an error number. ``maps`` of the arguments are tensor maps."""
        slots_only = len(slots) - maps * MAP_BYTES
        args = (kernel, device, x, y, z, threads, shared, stream or None, slots, slots_only // 8, maps)
        return int(self._abi.vlmops_cuda_launch(*args))


@functools.lru_cache(maxsize=1)
def _loader() -> Any:
    """The class that opens libraries: the pybind11 module's, else the one above."""
    try:
        recipe = cuda_build.loader()
        path = native.in_cache(recipe, "cuda")
        spec = importlib.util.spec_from_file_location(cuda_build.LOADER, path)
        assert spec is not None and spec.loader is not None
        module: ModuleType = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module.Library
    except (build.BuildError, OSError, ImportError) as err:
        log.info("vlmops: kernel libraries are opened by ctypes: %s", err)
        return Library


def open_library(path: Path, key: str = "") -> Any:
    """Open a kernel library that is whole, as its stamp says: loading one that was cut short would kill the process.

    Raises:
        LibraryDamaged: missing, damaged, or no kernel library.
    """
    advice = f"delete {path.parent} to build it again"
    if not path.is_file():
        raise LibraryDamaged(f"the kernel library {path} is missing: {advice}")
    if not build.intact(path.parent, library=path.name):
        raise LibraryDamaged(f"the kernel library {path} is damaged: {advice}")
    try:
        return _loader()(str(path))
    except (OSError, RuntimeError, AttributeError) as err:
        raise LibraryDamaged(f"the kernel library {path} does not load ({err}): {advice}") from err


# -- which library -----------------------------------------------------------------------------------------------------


def packaged() -> Path:
    """Where a library built ahead of time lies (it need not be there)."""
    return Path(__file__).resolve().parent.parent / "_cuda" / cuda_build.LIBRARY


def build_default(plans: Sequence[Plan], archs: Sequence[str] = cuda_build.ARCHS) -> Path:
    """Build one library of these kernels into the user's cache, where ``launch`` finds it.

    Raises:
        build.BuildError: no nvcc, or it failed.
    """
    recipe = cuda_build.library(plans, archs)
    with contextlib.closing(native.Progress(recipe.what)) as progress:
        path = native.in_cache(recipe, "cuda", progress)
    with contextlib.suppress(OSError):
        (path.parent.parent / "default").write_text(recipe.key)
    ready_libraries.cache_clear()
    return path


@functools.lru_cache(maxsize=1)
def ready_libraries() -> tuple[Any, ...]:
    """The libraries of many kernels that are there: built ahead of time, built by ``build_default``. A damaged one is said."""
    found = []
    paths = [packaged()]
    with contextlib.suppress(OSError, RuntimeError):
        root = cache_dir() / "cuda"
        paths.append(root / (root / "default").read_text().strip() / cuda_build.LIBRARY)
    for path in paths:
        if path.parent.is_dir():
            try:
                found.append(open_library(path))
            except LibraryDamaged as err:
                log.warning("vlmops: %s", err)
    return tuple(found)


@functools.lru_cache(maxsize=1)
def _can_build() -> str | None:
    try:
        cuda_build.toolkit()
        build.compiler()
        build.ninja()
        build.csrc_dir()
        return None
    except build.BuildError as err:
        return str(err)


def why_not(device: torch.device) -> str | None:
    """Why this executor cannot run; None if it can. Builds nothing."""
    libraries = ready_libraries()
    if not libraries:
        return _can_build()
    try:
        check_driver(libraries[0])
    except (NoDevice, DriverTooOld) as err:
        return str(err)
    return None


def check_driver(library: Any) -> None:
    """NoDevice or DriverTooOld where no kernel of this library can run."""
    error, driver, runtime = library.versions()
    if error:
        raise cuda_error(error, library.error_text(error), "the kernel library")
    if driver == 0:
        raise NoDevice("there is no NVIDIA driver on this machine")
    if driver // 1000 < runtime // 1000:  # within a major version an older driver will do
        have, need = (f"{v // 1000}.{v % 1000 // 10}" for v in (driver, runtime))
        raise DriverTooOld(
            f"the NVIDIA driver is for CUDA {have}, the kernels were built with {need}: update the driver, or use an nvcc "
            "of the driver's version, or cupy (pip install 'vlmops[cuda12]')"
        )
    error, count = library.devices()
    if error or count == 0:
        raise cuda_error(error or 100, library.error_text(error or 100), "the kernel library")


def _own_arch(device: torch.device) -> tuple[str, ...]:
    major, minor = torch.cuda.get_device_capability(device)
    return (f"sm_{major}{minor}",)


@functools.lru_cache(maxsize=4096)
def _kernel(kernel: Kernel, name: str, index: int, shared: int) -> tuple[Any, int]:
    """(library, handle) of a kernel, loaded on the device and allowed its shared memory."""
    plan = Plan.bare(kernel)
    last: Exception | None = None
    for library in ready_libraries():
        handle = library.find(name)
        if not handle:
            continue
        check_driver(library)
        error = library.prepare(handle, index, shared)
        if not error:
            return library, handle
        last = cuda_error(error, library.error_text(error), name)
        if not isinstance(last, ArchNotBuilt):
            raise last
    reason = _can_build()
    if reason is not None:
        raise last or ArchNotBuilt(f"{name} is in no kernel library, and cannot be built: {reason}")
    with _lock:
        recipe = cuda_build.library([plan], _own_arch(torch.device("cuda", index)))
        with contextlib.closing(native.Progress(recipe.what)) as progress:
            try:
                path = native.in_cache(recipe, "cuda", progress)
            except build.BuildError as err:
                raise ArchNotBuilt(f"{name} cannot be built: {err}") from err
    library = open_library(path)
    check_driver(library)
    handle = library.find(name)
    error = library.prepare(handle, index, shared)
    if error:
        raise cuda_error(error, library.error_text(error), name)
    return library, handle


run_in_order = contextlib.nullcontext  # the stream keeps the order


def launch(plan: Plan, device: torch.device) -> None:
    """Start a plan on torch's current stream of the device.

    Raises:
        cuda_errors.CudaError: by type what is wrong and what to do.
    """
    index = torch.cuda.current_device() if device.index is None else device.index
    library, handle = _kernel(plan.kernel, plan.name, index, plan.shared)
    stream = torch.cuda.current_stream(index).cuda_stream
    maps = (plan.maps,) if plan.maps else ()
    error = library.launch(handle, index, *plan.grid, plan.block, plan.shared, stream, plan.packed(), *maps)
    if error:
        raise cuda_error(error, library.error_text(error), plan.name)
