"""Executor "simt": the host SIMT machine (csrc/simt) runs the kernels of csrc/cuda on CPU tensors. For tests; slow.

Anything the machine reports (a race, an uninitialised or out-of-bounds read, a divergent collective) raises. ``schedule`` chooses
the order in which blocks, warps and lanes run, ``count`` collects what the launches moved.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from pathlib import Path

import torch
from torch import Tensor

from vlmops.backends import BackendError, build, cuda_build, native
from vlmops.backends.cuda_plan import MAP_BYTES, Kernel, Out, Plan, tensor_of

__all__ = ["SCHEDULES", "Count", "SimtError", "count", "launch", "prepare", "run_in_order", "schedule", "why_not"]

SCHEDULES = {"forward": 0, "reverse": 1, "seeded": 2}
POISON = 0x7F  # bytes of a tensor nobody has written: a huge number, or a NaN

_schedule: ContextVar[tuple[int, int]] = ContextVar("vlmops_simt_schedule", default=(0, 0))
_counts: ContextVar[Count | None] = ContextVar("vlmops_simt_counts", default=None)
_lock = threading.RLock()


class SimtError(BackendError):
    """The machine found a bug in a kernel; one line for each."""


class Count(Counter[str]):
    """The machine's counters (csrc/simt/capi.cpp), summed over launches, with ``launches``."""


# -- building ----------------------------------------------------------------------------------------------------------

#: Hooks before every access; nothing that hides or merges the accesses a GPU would make.
KERNEL_FLAGS = (
    "-std=c++20", "-O1", "-g1", "-fPIC", "-fvisibility=hidden", "-fno-tree-vectorize", "-ffp-contract=off",
    "-fno-threadsafe-statics", "-fno-exceptions", "-fno-math-errno", "-DVLMOPS_SIMT=1",
    "-gdwarf-4",  # addr2line of binutils 2.40 names the wrong file for -include in DWARF 5
    "-fno-gnu-unique", "-fno-thread-jumps",  # a __shared__ variable of a template is the unit's own; no barrier is duplicated
)  # fmt: skip
MACHINE_FLAGS = ("-std=c++20", "-O2", "-g1", "-fPIC", "-fvisibility=hidden")


def _sanitize() -> list[str]:
    """``VLMOPS_NATIVE_SANITIZE`` takes the place of the hooks: a compiler instruments for one of them."""
    chosen = build.sanitizers()
    return [f"-fsanitize={chosen}", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer"] if chosen else []


def machine(csrc: Path | None = None) -> cuda_build.Recipe:
    """The machine's own library."""
    csrc = csrc or build.csrc_dir()
    cxx, flags = build.compiler(), [*MACHINE_FLAGS, *_sanitize()]
    sources = sorted(p for p in (csrc / "simt").glob("*.cpp") if p.name != "entry.cpp")
    name, objects = "vlmops_simt.so", [f"{p.stem}.o" for p in sources]
    commands = [
        (f"{p.stem}.o", [str(p)], [cxx, *flags, f"-I{csrc}", "-c", str(p), "-o", f"{p.stem}.o"]) for p in sources
    ]
    commands.append((name, objects, [cxx, *flags, "-shared", *objects, "-o", name, "-ldl", "-pthread"]))
    key = cuda_build.digest(
        build.compiler_version(cxx), *flags, cuda_build.folder_digest(csrc / "simt", (".h", ".cpp"))
    )
    return cuda_build.Recipe(name, "the SIMT machine", commands, key=key)


def unit(plan: Plan, csrc: Path | None = None) -> cuda_build.Recipe:
    """The library of one kernel."""
    csrc = csrc or build.csrc_dir()
    cxx, source, entry = build.compiler(), csrc / "cuda" / plan.source, csrc / "simt" / "entry.cpp"
    flags = [*KERNEL_FLAGS, *(_sanitize() or ["-fsanitize=thread"]), *plan.macros]
    words = [cxx, *flags, f"-I{csrc}", f"-I{csrc / 'cuda'}", "-include", str(source), "-c", str(entry), "-o", "unit.o"]
    # without -fsanitize=thread: the machine has the hooks
    link = [cxx, *_sanitize(), "-shared", "unit.o", "-o", "unit.so"]
    commands = [("unit.o", [str(entry), str(source)], words), ("unit.so", ["unit.o"], link)]
    headers = "".join((csrc / "simt" / name).read_text() for name in ("device.h", "entry.cpp"))
    key = cuda_build.digest(build.compiler_version(cxx), *flags, headers, cuda_build.source_digest(csrc, plan.source))
    return cuda_build.Recipe("unit.so", plan.name, commands, key=key)


@functools.lru_cache(maxsize=1)
def _machine() -> ctypes.CDLL:
    library = ctypes.CDLL(str(native.in_cache(machine(), "simt")), mode=ctypes.RTLD_GLOBAL)
    library.vlmops_simt_reports.restype = library.vlmops_simt_counter_names.restype = ctypes.c_char_p
    library.vlmops_simt_register.argtypes = [ctypes.c_void_p, ctypes.c_uint64, ctypes.c_char_p, ctypes.c_int]
    library.vlmops_simt_launch.argtypes = [
        ctypes.c_void_p, ctypes.c_void_p, *[ctypes.POINTER(ctypes.c_uint32)] * 2, ctypes.c_uint64, ctypes.c_int, ctypes.c_uint64
    ]  # fmt: skip
    return library


@functools.lru_cache(maxsize=4096)
def _entry(kernel: Kernel, name: str) -> int:
    """Address of a kernel's trampoline, compiled now unless the cache has it."""
    _machine()  # its symbols first
    library = ctypes.CDLL(str(native.in_cache(unit(Plan.bare(kernel)), "simt")))
    address = ctypes.cast(getattr(library, f"{name}_simt"), ctypes.c_void_p).value
    assert address is not None
    return address


def prepare(plans: Sequence[Plan]) -> None:
    """Compile the kernels of these plans."""
    for plan in plans:
        _entry(plan.kernel, plan.name)


def why_not(device: torch.device) -> str | None:
    """Why the machine cannot run; None if it can."""
    try:
        build.compiler()
        build.ninja()
        build.csrc_dir()
    except build.BuildError as err:
        return str(err)
    return None if device.type == "cpu" else f"a tensor on {device}"


# -- running -----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def schedule(name: str, seed: int = 0) -> Iterator[None]:
    """Run blocks, warps and lanes in this order inside the block: "forward", "reverse", or "seeded" with a seed."""
    token = _schedule.set((SCHEDULES[name], seed))
    try:
        yield
    finally:
        _schedule.reset(token)


@contextlib.contextmanager
def count() -> Iterator[Count]:
    """Collect the counters of the launches inside the block."""
    found = Count()
    token = _counts.set(found)
    try:
        yield found
    finally:
        _counts.reset(token)


def _extent(t: Tensor) -> int:
    """Bytes from a tensor's first to its last element."""
    if t.numel() == 0:
        return 0
    return (sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True)) + 1) * t.element_size()


@contextlib.contextmanager
def run_in_order() -> Iterator[None]:
    """The launches inside the block belong together: what one leaves unwritten is uninitialised for the next."""
    with _lock:
        library = _machine()
        library.vlmops_simt_clear_buffers()
        _known.clear()
        try:
            yield
        finally:
            library.vlmops_simt_clear_buffers()
            _known.clear()


_known: set[int] = set()  # addresses of what the launches of this run have written


def _register(library: ctypes.CDLL, plan: Plan) -> None:
    for i, arg in enumerate(plan.args):
        tensor = tensor_of(arg)
        if tensor is None or tensor.numel() == 0 or tensor.data_ptr() in _known:
            continue
        name = f"argument {i} {str(tensor.dtype)[6:]}{list(tensor.shape)}"
        if isinstance(arg, Out):
            _known.add(tensor.data_ptr())
            ctypes.memset(tensor.data_ptr(), POISON, _extent(tensor))
        library.vlmops_simt_register(tensor.data_ptr(), _extent(tensor), name.encode(), not isinstance(arg, Out))


def launch(plan: Plan, device: torch.device) -> None:
    """Run a plan to its end.

    Raises:
        SimtError: the machine found a bug.
        build.BuildError: the kernel does not compile.
    """
    library, entry = _machine(), _entry(plan.kernel, plan.name)
    _register(library, plan)
    slots, maps = ctypes.create_string_buffer(plan.packed()), plan.maps
    begin = ctypes.addressof(slots)
    places = [begin + MAP_BYTES * i for i in range(maps)]
    places += [begin + MAP_BYTES * maps + 8 * i for i in range(len(plan.args) - maps)]
    args = (ctypes.c_void_p * len(places))(*places)
    grid, block = (ctypes.c_uint32 * 3)(*plan.grid), (ctypes.c_uint32 * 3)(plan.block, 1, 1)
    library.vlmops_simt_clear_reports()
    library.vlmops_simt_clear_counters()
    found = library.vlmops_simt_launch(entry, args, grid, block, plan.shared, *_schedule.get())
    counts = _counts.get()
    if counts is not None:
        names = library.vlmops_simt_counter_names().decode().split(",")
        values = (ctypes.c_uint64 * len(names))()
        library.vlmops_simt_counters(values)
        counts.update({name.strip(): value for name, value in zip(names, values, strict=True)}, launches=1)
    if found:
        raise SimtError(f"{plan.name}: {library.vlmops_simt_reports().decode().strip()}")
