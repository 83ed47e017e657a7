"""What is compiled ahead of time for the budget: the head sizes of the field's towers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from vlmops.ops.rotary import triton as kernels


def _run(dtype: torch.dtype, dim: int, interleaved: bool) -> None:
    x, k = (torch.empty(4096, 16, dim, dtype=dtype, device="meta") for _ in range(2))
    cos, sin = (torch.empty(4096, dim, device="meta") for _ in range(2))
    kernels.forward(x, k, cos, sin, interleaved)


def cases() -> Iterator[tuple[str, Callable[[], Any]]]:
    """(label, thunk) of each."""
    for dtype, dim in ((torch.bfloat16, 80), (torch.bfloat16, 64), (torch.float32, 128)):
        for interleaved in (False, True):
            label = f"forward {str(dtype)[6:]} d{dim}" + (" interleaved" if interleaved else "")
            yield label, partial(_run, dtype, dim, interleaved)
