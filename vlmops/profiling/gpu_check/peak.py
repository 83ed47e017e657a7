"""What the GPU can do: bytes a second of a large copy, FLOPs a second of a large square product by cuBLAS."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from vlmops.profiling.bars import dtype_name
from vlmops.profiling.gpu_check.timing import Clock, interleave

__all__ = ["Peaks", "measure"]

COPY_BYTES = 1 << 30
SECONDS = 0.5  # of measuring, each
#: Rows, columns and inner size of the product: large enough to fill any GPU, some milliseconds long.
SIDE = {torch.bfloat16: 8192, torch.float16: 8192, torch.float32: 4096}


@dataclass(frozen=True)
class Peaks:
    """Measured limits.

    Args:
        bandwidth: bytes/s read and written by a copy.
        flops: FLOP/s of a product, by dtype ("bf16", "fp16", "fp32"; float32 without TF32).
    """

    bandwidth: float
    flops: dict[str, float] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


def measure(
    device: torch.device, clock: Clock, dtypes: Sequence[torch.dtype], *, copy_bytes: int = COPY_BYTES, side: int = 0
) -> Peaks:
    """Both limits, medians.

    Args:
        device: where.
        clock: of the device.
        dtypes: of the products.
        copy_bytes: of the copy's source.
        side: of the products; 0: by ``SIDE``.
    """
    bandwidth = _copy_rate(device, clock, copy_bytes)
    return Peaks(bandwidth, {dtype_name(d): _product_rate(device, clock, d, side or SIDE[d]) for d in dtypes})


def _copy_rate(device: torch.device, clock: Clock, size: int) -> float:
    source = torch.empty(size, dtype=torch.uint8, device=device).fill_(1)
    target = torch.empty_like(source)
    found, _ = interleave({"copy": lambda: target.copy_(source)}, clock, seconds=SECONDS)
    return 2 * size / found["copy"].median


def _product_rate(device: torch.device, clock: Clock, dtype: torch.dtype, n: int) -> float:
    x, y = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    found, _ = interleave({"product": lambda: x @ y}, clock, seconds=SECONDS)
    return 2.0 * n**3 / found["product"].median
