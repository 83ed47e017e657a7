"""What is compiled ahead of time for the budget: the norms of ViTs and decoders."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from vlmops.ops.norms import triton as kernels

BF16, FP32 = torch.bfloat16, torch.float32


def _forward(dtype: torch.dtype, width: int, center: bool, residual: bool) -> None:
    x = torch.empty(4096, width, dtype=dtype, device="meta")
    w = torch.empty(width, dtype=dtype, device="meta")
    kernels.forward(x, x if residual else None, w, w if center else None, 1e-6, 0.0, center)


def _backward(dtype: torch.dtype, width: int, center: bool, residual: bool) -> None:
    x = torch.empty(4096, width, dtype=dtype, device="meta")
    w = torch.empty(width, dtype=dtype, device="meta")
    args = [x, x if residual else None, w, w if center else None, 1e-6, 0.0, center]
    kernels.backward([x, x if residual else None], [x], args, [True, True, center])


def cases() -> Iterator[tuple[str, Callable[[], Any]]]:
    """(label, thunk) of each."""
    for name, run in (("forward", _forward), ("backward", _backward)):
        yield f"{name} layer_norm bfloat16 1024", partial(run, BF16, 1024, True, False)
        yield f"{name} layer_norm float32 1280", partial(run, FP32, 1280, True, False)
        yield f"{name} rms_norm bfloat16 4096 residual", partial(run, BF16, 4096, False, True)
        yield f"{name} rms_norm bfloat16 12288", partial(run, BF16, 12288, False, False)
