"""Running launch plans: which executor, what can run and why not, and a recorder that collects plans instead.

One plan (``cuda_plan.Plan``), three executors: ``library`` (built by nvcc), ``cupy`` (NVRTC) and ``simt`` (csrc/simt, on CPU
tensors). ``VLMOPS_CUDA_EXECUTOR`` forces one; else the library where it is built or nvcc is there, else CuPy. The SIMT machine
is for tests: it runs only where it is forced.
"""

from __future__ import annotations

import contextlib
import importlib
import os
from collections.abc import Iterable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from functools import lru_cache
from types import ModuleType

import torch
from torch import Tensor

from vlmops.backends import BackendError, ranges
from vlmops.backends.cuda_plan import CTYPE, Out, Plan, TensorMap, f32, i32, i64, vector

__all__ = [
    "CTYPE", "EXECUTORS", "TARGETS", "Out", "Plan", "Target", "TensorMap", "assume", "executor", "f32", "i32", "i64",
    "processors", "record", "run", "shared_bytes", "target", "vector", "why_not",
]  # fmt: skip

#: Modules with ``why_not(device) -> str | None``, ``launch(plan, device)`` and the context manager ``run_in_order()`` around the
#: launches of one run.
EXECUTORS = {name: f"vlmops.backends.cuda_{name}" for name in ("library", "cupy", "simt")}
LEAST_CAPABILITY = 80


@dataclass(frozen=True)
class Target:
    """A GPU to plan for.

    Args:
        capability: compute capability, 90 for sm_90.
        processors: SMs.
        shared: bytes of shared memory a block may have.
    """

    capability: int
    processors: int
    shared: int


#: GPUs the kernels are compiled for ahead of time, by nvcc's name of the architecture.
TARGETS = {
    "sm_80": Target(80, 108, 163 << 10),
    "sm_89": Target(89, 142, 99 << 10),
    "sm_90a": Target(90, 132, 227 << 10),
    "sm_100a": Target(100, 148, 227 << 10),
    "sm_120": Target(120, 170, 99 << 10),
}
#: What the SIMT machine plays: few processors, so that a loop over rows runs more than once.
SIMT = Target(80, 4, 163 << 10)

_recorder: ContextVar[list[Plan] | None] = ContextVar("vlmops_cuda_recorder", default=None)
_target: ContextVar[Target | None] = ContextVar("vlmops_cuda_target", default=None)


# -- which executor ----------------------------------------------------------------------------------------------------


def forced() -> str | None:
    """The executor ``VLMOPS_CUDA_EXECUTOR`` names; None: choose.

    Raises:
        ValueError: it names none.
    """
    name = os.environ.get("VLMOPS_CUDA_EXECUTOR") or None
    if name is not None and name not in EXECUTORS:
        raise ValueError(f"VLMOPS_CUDA_EXECUTOR={name}: expected one of {', '.join(EXECUTORS)}")
    return name


def _module(name: str) -> ModuleType:
    return importlib.import_module(EXECUTORS[name])


@lru_cache(maxsize=64)
def _choose(name: str | None, device: torch.device) -> tuple[ModuleType | None, str]:
    """The executor for a device, or why there is none. Remembered: it looks for compilers and packages."""
    if device.type == "cpu" and name != "simt":
        return None, "a tensor on the CPU needs the host SIMT machine (VLMOPS_CUDA_EXECUTOR=simt, for tests, slow)"
    if device.type == "cuda":
        if name == "simt":
            return None, "VLMOPS_CUDA_EXECUTOR=simt runs CPU tensors only"
        if torch.version.hip:
            return None, "an AMD GPU"
        try:
            major, minor = torch.cuda.get_device_capability(device)
        except (AssertionError, RuntimeError) as err:  # fake tensors where there is no GPU; a torch without CUDA
            return None, f"no GPU to ask: {str(err).strip().partition(chr(10))[0]}"
        if major * 10 + minor < LEAST_CAPABILITY:
            return None, f"a GPU of compute capability {major}.{minor} (8.0 or newer)"
    elif device.type != "cpu":
        return None, f"a tensor on {device}"
    reasons = []
    for candidate in (name,) if name else ("library", "cupy"):
        module = _module(candidate)
        reason = module.why_not(device)
        if reason is None:
            return module, ""
        reasons.append(f"{candidate}: {reason}")
    return None, "; ".join(reasons)


def executor(device: torch.device) -> ModuleType:
    """The executor in force for a device.

    Raises:
        BackendError: there is none; the message says what each of them misses.
    """
    module, reason = _choose(forced(), device)
    if module is None:
        raise BackendError(reason)
    return module


def why_not(x: Tensor, dtypes: Sequence[torch.dtype] = tuple(CTYPE)) -> str | None:
    """Why no CUDA kernel can run on this tensor; None if one can."""
    if x.dtype not in dtypes:
        return f"{str(x.dtype)[6:]} (only {', '.join(str(d)[6:] for d in dtypes)})"
    if _recorder.get() is not None:
        return None
    return _choose(forced(), x.device)[1] or None


# -- which GPU ---------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=16)
def _device_target(index: int) -> Target:
    p = torch.cuda.get_device_properties(index)
    return Target(
        p.major * 10 + p.minor, p.multi_processor_count, getattr(p, "shared_memory_per_block_optin", 99 << 10)
    )


def target(x: Tensor) -> Target:
    """The GPU a kernel on x runs on: assumed or recorded for, x's own, or the SIMT machine."""
    return _target_of(x.device)


def _target_of(device: torch.device) -> Target:
    assumed = _target.get()
    if assumed is not None:
        return assumed
    return _device_target(device.index or 0) if device.type == "cuda" else SIMT


def processors(x: Tensor) -> int:
    """SMs of x's GPU: the size of a persistent grid."""
    return target(x).processors


def shared_bytes(x: Tensor) -> int:
    """Shared memory a block may have on x's GPU."""
    return target(x).shared


@contextlib.contextmanager
def assume(what: Target) -> Iterator[None]:
    """Take the decisions of this GPU inside the block (tests, ahead-of-time compilation)."""
    token = _target.set(what)
    try:
        yield
    finally:
        _target.reset(token)


# -- running -----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def record(what: Target) -> Iterator[list[Plan]]:
    """Collect the plans of the block for this GPU instead of running them; tensors may be meta tensors."""
    plans: list[Plan] = []
    token = _recorder.set(plans)
    try:
        with assume(what):
            yield plans
    finally:
        _recorder.reset(token)


def run(plans: Iterable[Plan]) -> None:
    """Execute plans in order, on torch's current stream, each in an NVTX range of the kernel's name; empty grids are left out.

    Raises:
        BackendError: no executor, or a typed ``cuda_errors.CudaError`` from one.
        ValueError: a plan no GPU could launch, or this one could not: too much shared memory.
    """
    recorder = _recorder.get()
    todo = [plan for plan in plans if not plan.empty]
    for plan in todo:
        plan.check(_target_of(plan.device).shared)
    if recorder is not None:
        recorder.extend(todo)
        return
    if not todo:
        return
    device = todo[0].device
    module, nvtx = executor(device), ranges.installed()
    other = device.type == "cuda" and device.index != torch.cuda.current_device()
    with torch.cuda.device(device) if other else contextlib.nullcontext(), module.run_in_order():
        for plan in todo:
            if nvtx is None:
                module.launch(plan, device)
            else:
                with nvtx.annotate(plan.name, color=ranges.COLOURS["kernel"], domain=ranges.DOMAIN):
                    module.launch(plan, device)
