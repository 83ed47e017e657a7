"""When the kernels for sm_90a alone (wgmma, TMA) are taken: they are experimental, so where somebody asks for them."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from contextvars import ContextVar

from torch import Tensor

from vlmops.backends import cuda_runtime

__all__ = ["ALIGN", "THREADS", "VARIABLE", "asked", "only", "stages"]

VARIABLE = "VLMOPS_CUDA_EXPERIMENTAL"
THREADS = 384  # a producer warpgroup, two consumers
ALIGN = 1024  # bytes: a swizzled tile begins at a multiple

_asked: ContextVar[bool] = ContextVar("vlmops_cuda_sm90", default=False)


@contextlib.contextmanager
def only() -> Iterator[None]:
    """Ask for them inside the block: ahead-of-time compilation, tests."""
    token = _asked.set(True)
    try:
        yield
    finally:
        _asked.reset(token)


def asked(x: Tensor) -> bool:
    """Whether ``VLMOPS_CUDA_EXPERIMENTAL=1`` or ``only`` asks for them, and x's GPU is of capability 9.0 or the SIMT machine."""
    if not _asked.get() and os.environ.get(VARIABLE) != "1":
        return False
    target = cuda_runtime.target(x)
    return target.capability == 90 or target == cuda_runtime.SIMT


def stages(x: Tensor, size: int, most: int, fixed: int = 0) -> int:
    """Stages of ``size`` bytes that fit into a block's shared memory beside ``fixed`` and the barriers; ``most`` at most."""
    return min(most, (cuda_runtime.shared_bytes(x) - 2 * ALIGN - fixed) // size)
