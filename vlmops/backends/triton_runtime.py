"""Launching Triton kernels: what can run, which configuration, and a recorder that sees launches instead of running them.

Triton is imported only where a kernel is asked for. Every kernel of the project is launched by ``launch``, so one
switch (``record``) turns an op's own launch code into the list of kernels to compile ahead of time, for a GPU that
need not be there.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from vlmops.backends import choice

__all__ = [
    "INTERPRETED", "Config", "Launch", "Target", "assume", "capability", "installed", "interpreted", "launch", "pick",
    "processors", "record", "shared_bytes", "target", "why_not",
]  # fmt: skip

LEAST = (3, 4)
INSTALL = "pip install 'triton>=3.4'"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
#: What Triton's interpreter computes rightly as it comes; tests/support/triton_interpreter.py adds what it repairs.
INTERPRETED = {torch.float32, torch.float16, torch.float64}


@dataclass(frozen=True)
class Target:
    """A GPU to launch or compile for.

    Args:
        backend: "cuda" or "hip".
        arch: compute capability as triton has it (80, 90, 100), or the gfx name.
        processors: SMs (compute units).
        shared: bytes of shared memory a block may have.
        warp: threads of a warp.
    """

    backend: str
    arch: int | str
    processors: int
    shared: int
    warp: int = 32


TARGETS = {
    "sm_80": Target("cuda", 80, 108, 163 << 10),
    "sm_90": Target("cuda", 90, 132, 227 << 10),
    "sm_100": Target("cuda", 100, 148, 227 << 10),
    "gfx942": Target("hip", "gfx942", 304, 64 << 10, 64),
}
#: What the interpreter plays: few processors, so that a persistent kernel's loop runs more than once.
INTERPRETER = Target("cuda", 80, 4, 163 << 10)


@dataclass(frozen=True)
class Config:
    """One way to run a kernel: its block sizes (constexpr arguments), warps and pipeline stages."""

    meta: tuple[tuple[str, Any], ...]
    warps: int = 4
    stages: int = 2

    @classmethod
    def of(cls, warps: int = 4, stages: int = 2, **meta: Any) -> Config:
        """``Config.of(BM=128, BN=64, warps=8)``."""
        return cls(tuple(meta.items()), warps, stages)

    def __getitem__(self, name: str) -> Any:
        return dict(self.meta)[name]

    @property
    def name(self) -> str:
        """Its name in the tuning cache, e.g. "BM128 BN64 w8 s3"."""
        return " ".join([*(f"{k}{v}" for k, v in self.meta), f"w{self.warps}", f"s{self.stages}"])


@dataclass
class Launch:
    """A kernel with what it was launched with."""

    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    constants: dict[str, Any]
    warps: int
    stages: int
    options: dict[str, Any] = field(default_factory=dict)


_recorder: ContextVar[list[Launch] | None] = ContextVar("vlmops_triton_recorder", default=None)
_target: ContextVar[Target | None] = ContextVar("vlmops_triton_target", default=None)


@lru_cache(maxsize=1)
def installed() -> str | None:
    """None if a Triton that is new enough is installed, else what to do."""
    if importlib.util.find_spec("triton") is None:
        return f"triton is not installed: {INSTALL}"
    from importlib.metadata import PackageNotFoundError, version

    try:
        found = version("triton")
    except PackageNotFoundError:  # a build without metadata (ROCm's pytorch-triton-rocm): let it try
        return None
    if tuple(int(n) for n in re.findall(r"\d+", found)[:2]) < LEAST:
        return f"triton {found} is too old: {INSTALL}"
    return None


def interpreted() -> bool:
    """Whether Triton's interpreter runs the kernels (``TRITON_INTERPRET=1``, set before the first kernel is imported)."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes")


def why_not(x: Tensor, dtypes: Sequence[torch.dtype] = DTYPES) -> str | None:
    """Why no Triton kernel can run on this tensor; None if one can."""
    reason = installed()
    if reason is not None:
        return reason
    if x.dtype not in dtypes:
        return f"{str(x.dtype)[6:]} (only {', '.join(str(d)[6:] for d in dtypes)})"
    if x.device.type == "cuda" or _recorder.get() is not None:
        return None
    if x.device.type == "cpu":
        if not interpreted():
            return "a tensor on the CPU needs Triton's interpreter: set TRITON_INTERPRET=1 (slow)"
        if x.dtype not in INTERPRETED:
            return (
                f"{str(x.dtype)[6:]}, which Triton's interpreter computes wrongly (the tests repair it: docs/triton.md)"
            )
        return None
    return f"a tensor on {x.device}"


@lru_cache(maxsize=16)
def _device_target(index: int) -> Target:
    p = torch.cuda.get_device_properties(index)
    if torch.version.hip:
        return Target("hip", p.gcnArchName.split(":")[0], p.multi_processor_count, 64 << 10, 64)
    shared = getattr(p, "shared_memory_per_block_optin", 99 << 10)
    return Target("cuda", p.major * 10 + p.minor, p.multi_processor_count, shared)


def target(x: Tensor) -> Target:
    """The GPU a kernel on x runs on: assumed or recorded for, x's own, or the interpreter's."""
    assumed = _target.get()
    if assumed is not None:
        return assumed
    return _device_target(x.device.index or 0) if x.device.type == "cuda" else INTERPRETER


def capability(x: Tensor) -> int:
    """Compute capability of x's GPU as one number (90 for sm_90); 0 for another maker's."""
    arch = target(x).arch
    return arch if isinstance(arch, int) else 0


def processors(x: Tensor) -> int:
    """SMs of x's GPU: the size of a persistent grid."""
    return target(x).processors


def shared_bytes(x: Tensor) -> int:
    """Shared memory a block may have on x's GPU."""
    return target(x).shared


@contextlib.contextmanager
def assume(what: Target) -> Iterator[None]:
    """Take the launch decisions of this GPU inside the block (tests, ahead-of-time compilation)."""
    token = _target.set(what)
    try:
        yield
    finally:
        _target.reset(token)


@contextlib.contextmanager
def record(what: Target) -> Iterator[list[Launch]]:
    """Collect the launches of the block for this GPU instead of running them; tensors may be meta tensors."""
    launches: list[Launch] = []
    token = _recorder.set(launches)
    try:
        with assume(what):
            yield launches
    finally:
        _recorder.reset(token)


def launch(
    kernel: Any, grid: Sequence[int], *args: Any, config: Config | None = None, warps: int = 4, stages: int = 2,
    options: dict[str, Any] | None = None, **constants: Any,
) -> None:  # fmt: skip
    """Run a kernel on torch's current stream; nothing for an empty grid.

    Args:
        kernel: a ``triton.jit`` function whose tensor and scalar arguments come first.
        grid: programs, up to three sizes.
        args: those arguments, in order; the first tensor decides the device.
        config: block sizes, warps and stages; or give ``warps`` and ``stages``.
        options: more compiler options, e.g. ``{"maxnreg": 128}``.
        constants: the constexpr arguments.
    """
    if config is not None:
        constants = {**dict(config.meta), **constants}
        warps, stages = config.warps, config.stages
    if any(n <= 0 for n in grid):
        return
    # Said explicitly: the default of fusing a * b + c changes between Triton releases.
    options = {"enable_fp_fusion": True, **(options or {})}
    recorder = _recorder.get()
    if recorder is not None:
        recorder.append(Launch(kernel, tuple(grid), args, constants, warps, stages, options))
        return
    device = next((a.device for a in args if isinstance(a, Tensor)), None)
    other = device is not None and device.type == "cuda" and device.index != torch.cuda.current_device()
    with torch.cuda.device(device) if other else contextlib.nullcontext():
        kernel[tuple(grid)](*args, **constants, num_warps=warps, num_stages=stages, **options)


def pick(op: str, key: str, configs: Sequence[Config], run: Callable[[Config], Any], device: torch.device) -> Config:
    """The configuration to use: remembered or measured on a GPU, else the first, which is the default.

    Args:
        op: kernel name in the tuning cache.
        key: what its speed depends on.
        configs: candidates that fit shape and shared memory, the default first.
        run: runs the kernel with one of them, without side effects that matter.
        device: where.
    """
    if len(configs) == 1 or device.type != "cuda" or _recorder.get() is not None:
        return configs[0]
    by_name = {config.name: config for config in configs}
    chosen = choice.decide(
        f"{op}.triton", key, {name: partial(run, c) for name, c in by_name.items()}, list(by_name), device
    )
    return by_name[chosen]
