"""What is compiled ahead of time and counted for the budget: the norms of ViTs and decoders."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from vlmops.ops.norms import cuda as kernels

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def _arguments(device: str, rows: int, dtype: torch.dtype, width: int, center: bool, residual: bool) -> list[Any]:
    x, r = (torch.zeros(rows, width, dtype=dtype, device=device) for _ in range(2))
    w = torch.zeros(width, dtype=dtype, device=device)
    return [x, r if residual else None, w, w if center else None, 1e-6, 0.0, center]


def _forward(device: str, rows: int, **shape: Any) -> None:
    kernels.forward(*_arguments(device, rows, **shape))


def _backward(device: str, rows: int, **shape: Any) -> None:
    args = _arguments(device, rows, **shape)
    x, residual, _, bias = args[:4]
    kernels.backward([x, residual], [x], args, [True, True, bias is not None])


def cases() -> Iterator[tuple[str, Callable[[str, int], Any]]]:
    """(label, run) of each; ``run(device, rows)``."""
    for name, run in (("forward", _forward), ("backward", _backward)):
        for dtype, width in ((BF16, 1024), (BF16, 1152), (FP32, 1280)):
            label = f"{name} layer_norm {str(dtype)[6:]} {width}"
            yield label, partial(run, dtype=dtype, width=width, center=True, residual=False)
        for dtype, width in ((BF16, 1280), (BF16, 4096), (FP16, 4096)):
            label = f"{name} rms_norm {str(dtype)[6:]} {width} residual"
            yield label, partial(run, dtype=dtype, width=width, center=False, residual=True)
