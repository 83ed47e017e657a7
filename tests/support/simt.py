"""Driving the host SIMT machine (csrc/simt) by ctypes, for the machine's own tests.

The machine is the one the executor builds: two of them in one process would take each other's hooks. Kernels of the
tests live in tests/simt/kernels; a unit is one .cu file with defines, as the launch plans have it.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import subprocess
import tempfile
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch

from vlmops.backends import build, cuda_simt, native

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "csrc"
KERNELS = ROOT / "tests" / "simt" / "kernels"
SANITIZED = bool(build.sanitizers())  # kernels are instrumented for AddressSanitizer then, and have no hooks
FORWARD, REVERSE, SEEDED = SCHEDULES = tuple(cuda_simt.SCHEDULES.values())


def compiler() -> str:
    """The C++ compiler, or the test is skipped."""
    try:
        return build.compiler()
    except build.BuildError as err:
        pytest.skip(f"the SIMT machine needs a C++ compiler: {err}")


@lru_cache(maxsize=1)
def _folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="vlmops-simt-")


def environment() -> dict[str, str]:
    """For compilers: without a sanitizer that is preloaded for the tests."""
    return {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}


def build_kernel(source: str, name: str, entry: str, threads: int, **defines: Any) -> Path:
    """A kernel unit of tests/simt/kernels as a library; `defines` become -DVLMOPS_<NAME>=<value>."""
    macros = {"NAME": name, f"ENTRY_{entry}": 1, "THREADS": threads, **defines}
    words = [f"-DVLMOPS_{key}={value}" for key, value in macros.items()]
    key = hashlib.sha256(" ".join([source, *words]).encode()).hexdigest()[:16]
    out = Path(_folder().name) / f"{name}-{key}.so"
    if out.exists():
        return out
    sanitize = [f"-fsanitize={build.sanitizers()}", "-fno-sanitize-recover=undefined"] if SANITIZED else []
    flags = [
        *cuda_simt.KERNEL_FLAGS,
        *(sanitize or ["-fsanitize=thread"]),
        "-Wall",
        "-Wextra",
        "-Werror",
        "-Wno-unknown-pragmas",
    ]
    unit = ["-include", str(KERNELS / source), "-c", str(CSRC / "simt" / "entry.cpp"), "-o", str(out.with_suffix(".o"))]
    link = [compiler(), *sanitize, "-shared", str(out.with_suffix(".o")), "-o", str(out)]
    for command in ([compiler(), *flags, *words, f"-I{CSRC}", f"-I{CSRC / 'cuda'}", *unit], link):
        run = subprocess.run(command, capture_output=True, text=True, env=environment())
        if run.returncode != 0:
            raise RuntimeError(f"{' '.join(command)}\n{run.stderr}")
    return out


class Machine:
    """The machine in this process. One launch is one call; reports and counters are those of the last one."""

    def __init__(self) -> None:
        compiler()
        path = native.in_cache(cuda_simt.machine(), "simt")
        self.library = ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)  # kernel units find the hooks there
        self.library.vlmops_simt_reports.restype = ctypes.c_char_p
        self.library.vlmops_simt_counter_names.restype = ctypes.c_char_p
        self.names = self.library.vlmops_simt_counter_names().decode().split(",")
        self.reports: list[str] = []
        self.counters: dict[str, int] = {}

    def register(self, tensor: torch.Tensor, name: str, initialised: bool = True, elements: int | None = None) -> None:
        """`elements`: fewer than the tensor has, so that what lies behind them is out of bounds yet harmless to touch."""
        count = tensor.numel() if elements is None else elements
        bytes_ = ctypes.c_uint64(count * tensor.element_size())
        self.library.vlmops_simt_register(ctypes.c_void_p(tensor.data_ptr()), bytes_, name.encode(), int(initialised))

    def launch(
        self, kernel: Path, args: Sequence[Any], grid: Sequence[int], block: int, shared: int = 0,
        schedule: int = FORWARD, seed: int = 0,
    ) -> list[str]:  # fmt: skip
        """Runs a unit built by `build_kernel`. Integers go as int32, floats as float32, tensors by address, bytes as they are."""
        values: list[Any] = []
        for arg in args:
            if arg is None or isinstance(arg, torch.Tensor):
                values.append(ctypes.c_void_p(None if arg is None else arg.data_ptr()))
            elif isinstance(arg, bytes):
                values.append((ctypes.c_char * len(arg)).from_buffer_copy(arg))
            else:
                values.append(ctypes.c_float(arg) if isinstance(arg, float) else ctypes.c_int32(arg))
        pointers = (ctypes.c_void_p * max(1, len(values)))(
            *(ctypes.cast(ctypes.byref(v), ctypes.c_void_p) for v in values)
        )
        name = kernel.stem.rsplit("-", 1)[0] + "_simt"
        unit = ctypes.CDLL(str(kernel))
        self.library.vlmops_simt_clear_reports()
        self.library.vlmops_simt_clear_counters()
        size = (*grid, *(1,) * (3 - len(grid)))
        found = self.library.vlmops_simt_launch(
            getattr(unit, name), pointers, (ctypes.c_uint32 * 3)(*size), (ctypes.c_uint32 * 3)(block, 1, 1),
            ctypes.c_uint64(shared), schedule, ctypes.c_uint64(seed),
        )  # fmt: skip
        self.reports = self.library.vlmops_simt_reports().decode().splitlines()
        assert found == len(self.reports), (found, self.reports)
        counters = (ctypes.c_uint64 * len(self.names))()
        self.library.vlmops_simt_counters(counters)
        self.counters = dict(zip(self.names, counters, strict=True))
        return self.reports

    def clear(self) -> None:
        """Forgets the registered buffers."""
        self.library.vlmops_simt_clear_buffers()


@lru_cache(maxsize=1)
def machine() -> Machine:
    """The one machine of this process, without buffers."""
    return Machine()
