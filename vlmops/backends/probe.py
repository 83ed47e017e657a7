"""What this machine has: for `vlmops info`, bug reports, and the messages of forced backends."""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vlmops.backends import BackendError, build, cuda_runtime, native, triton_runtime
from vlmops.backends.cache_dir import cache_dir
from vlmops.backends.machine import cpu_model

__all__ = ["BackendInfo", "backends", "cpu_caches", "report"]


@dataclass(frozen=True)
class BackendInfo:
    """One backend: whether it can run here, and what it is or what is missing."""

    name: str
    available: bool
    detail: str


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _native_path() -> Path | None:
    """The native library if it is already there; nothing is built."""
    ready = native.ahead_of_time()
    if ready is not None:
        return ready
    try:
        path = cache_dir() / "native" / build.plan().key / build.LIBRARY
    except (RuntimeError, OSError):  # cannot be built, or no home folder
        return None
    return path if build.intact(path.parent) else None


def _cpu(build_now: bool) -> BackendInfo:
    if native.disabled():
        return BackendInfo("cpu", False, native.disabled())
    if build_now or _native_path() is not None:
        if native.load():
            return BackendInfo("cpu", True, f"native library loaded, instruction set {native.isa()}")
        return BackendInfo("cpu", False, native.reason() or "not available")
    try:
        build.ninja()
        sets = ", ".join(build.plan().isas)
        return BackendInfo(
            "cpu", True, f"not built yet: builds at first use for {sets} (`vlmops info --build` builds now)"
        )
    except build.BuildError as err:
        return BackendInfo("cpu", False, str(err))


def _triton(gpu: bool) -> BackendInfo:
    missing = triton_runtime.installed()
    if missing is not None:
        return BackendInfo("triton", False, missing)
    if gpu:
        return BackendInfo("triton", True, f"Triton {_version('triton')}")
    if triton_runtime.interpreted():
        return BackendInfo(
            "triton", True, f"Triton {_version('triton')}'s interpreter, on CPU tensors, where it is forced"
        )
    return BackendInfo(
        "triton", False, f"Triton {_version('triton')}, but torch sees no GPU (TRITON_INTERPRET=1 interprets, slowly)"
    )


def _cuda(gpu: bool) -> BackendInfo:
    import torch

    try:
        module = cuda_runtime.executor(torch.device("cuda", 0) if gpu else torch.device("cpu"))
    except (BackendError, ValueError) as err:
        missing = "" if gpu else "torch sees no GPU; "
        return BackendInfo("cuda", False, f"{missing}{err}")
    name = module.__name__.rsplit("_", 1)[-1]
    where = "" if gpu else ": the host SIMT machine, on CPU tensors, where the backend is forced"
    return BackendInfo("cuda", True, f"executor {name}{where}")


def backends(build_now: bool = False) -> list[BackendInfo]:
    """Every backend, in the order of ``vlmops.backends.BACKENDS``; Triton is looked for, not imported."""
    import torch

    gpu = torch.cuda.is_available()
    found = [
        BackendInfo("reference", True, "plain PyTorch in float64: the oracle, never chosen by itself"),
        BackendInfo("torch", True, f"PyTorch {torch.__version__}"),
        _cpu(build_now),
    ]
    found += [_triton(gpu), _cuda(gpu)]
    return found


def _cache() -> dict[str, Any]:
    """The cache folder and the bytes of what lies in it, by first name."""
    try:
        folder = cache_dir()
    except RuntimeError as err:  # no home folder
        return {"folder": f"none: {err}", "bytes": {}}
    sizes: dict[str, int] = {}
    # os.walk passes over a folder that vanishes: another process may be tidying up (Path.rglob raises there).
    for where, _, names in os.walk(folder):
        for path in (Path(where, name) for name in names):
            with contextlib.suppress(OSError):
                first = path.relative_to(folder).parts[0]
                sizes[first] = sizes.get(first, 0) + path.stat().st_size
    return {"folder": str(folder), "bytes": sizes}


def cpu_caches() -> dict[str, str]:
    """Caches that the first core sees, e.g. {"L1d": "32K", "L2": "1024K"}."""
    found = {}
    for index in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        with contextlib.suppress(OSError):
            level, kind, size = ((index / name).read_text().strip() for name in ("level", "type", "size"))
            found[f"L{level}" + {"Data": "d", "Instruction": "i"}.get(kind, "")] = size
    return found


def _compilers() -> dict[str, str | None]:
    found = {name: shutil.which(name) for name in ("c++", "g++", "clang++", "nvcc")}
    try:
        found["ninja"] = build.ninja()
    except build.BuildError:
        found["ninja"] = None
    try:
        found["used"] = build.compiler_version(build.compiler())
    except build.BuildError:
        found["used"] = None
    return found


def _cpu_flags() -> list[str]:
    info = Path("/proc/cpuinfo")
    wanted = ("avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512_bf16", "amx_bf16", "asimd", "asimdhp", "bf16")
    if not info.exists():
        return []
    for line in info.read_text(errors="replace").splitlines():
        if line.lower().startswith(("flags", "features")):
            have = line.split(":", 1)[1].split()
            return [flag for flag in wanted if flag in have]
    return []


def _memory_gib() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (ValueError, OSError, AttributeError):
        return None


def report(build_now: bool = False) -> dict[str, Any]:
    """Machine, versions, compilers, backends and cache folders as plain data.

    Args:
        build_now: build the native library if it is not there.
    """
    import torch

    from vlmops.version import __version__

    gpus = (
        [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    )
    return {
        "vlmops": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": _version("transformers"),
        "triton": _version("triton"),
        "platform": f"{sys.platform} {platform.machine()}",
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "instruction_sets": _cpu_flags(),
        "cpu_caches": cpu_caches(),
        "memory_gib": _memory_gib(),
        "gpus": gpus,
        "compilers": _compilers(),
        "backends": [asdict(b) for b in backends(build_now)],
        "cache": _cache(),
    }
