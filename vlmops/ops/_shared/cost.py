"""What an operation must move and compute at the least: the roofline that budgets, benchmarks and reports share.

Each op states its own in ``<op>/cost.py`` as ``cost(*schema arguments) -> Cost``. The Triton interpreter's counters are held
against it in the tests.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

__all__ = ["Cost", "nbytes"]


@dataclass(frozen=True)
class Cost:
    """Bytes read and written in main memory, and floating-point operations of matrix products."""

    read: int
    written: int
    flops: int = 0

    @property
    def bytes(self) -> int:
        """Read and written."""
        return self.read + self.written

    @property
    def intensity(self) -> float:
        """FLOPs a byte."""
        return self.flops / self.bytes if self.bytes else 0.0

    def seconds(self, bandwidth: float, peak: float) -> float:
        """Least time at this many bytes/s and FLOP/s (Williams et al. 2009)."""
        return max(self.bytes / bandwidth, self.flops / peak)

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.read + other.read, self.written + other.written, self.flops + other.flops)


def nbytes(*tensors: Tensor | None) -> int:
    """Bytes of tensors, each read or written once."""
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)
