"""What is compiled ahead of time and counted for the budget: the head sizes of the field's towers and decoders."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from vlmops.ops.rotary import cuda as kernels

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def _run(device: str, rows: int, dtype: torch.dtype, dim: int, interleaved: bool, tables: torch.dtype) -> None:
    x, k = (torch.zeros(rows, 16, dim, dtype=dtype, device=device) for _ in range(2))
    cos, sin = (torch.zeros(rows, dim, dtype=tables, device=device) for _ in range(2))
    kernels.forward(x, k, cos, sin, interleaved)


def cases() -> Iterator[tuple[str, Callable[[str, int], Any]]]:
    """(label, run) of each; ``run(device, rows)``."""
    for dtype, dim in ((BF16, 64), (BF16, 72), (BF16, 80), (BF16, 128), (FP16, 64), (FP32, 80)):
        for interleaved in (False, True):
            label = f"{str(dtype)[6:]} d{dim}" + (" interleaved" if interleaved else "")
            yield label, partial(_run, dtype=dtype, dim=dim, interleaved=interleaved, tables=FP32)
    yield "bfloat16 d128 bfloat16 tables", partial(_run, dtype=BF16, dim=128, interleaved=False, tables=BF16)
