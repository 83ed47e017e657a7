"""What is compiled ahead of time and counted for the budget: the head sizes and masks of the field's towers and decoders."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from vlmops.ops.varlen_attention import cuda as kernels

BF16, FP16 = torch.bfloat16, torch.float16


def _forward(
    device: str, rows: int, dtype: torch.dtype, dim: int, causal: bool = False, left: int = -1, softcap: float = 0.0,
    longest: int = -1, kv_heads: int = 16,
) -> None:  # fmt: skip
    q, k, v = (torch.zeros(rows, heads, dim, dtype=dtype, device=device) for heads in (16, kv_heads, kv_heads))
    n = 2 if longest < 0 else rows // longest
    cu = torch.arange(n + 1, dtype=torch.int32, device=device) * (rows // n)
    kernels.forward(
        q, k, v, cu, cu, longest, longest, dim**-0.5, causal, left, -1, None, softcap, None, None, None, None, False
    )


def cases() -> Iterator[tuple[str, Callable[[str, int], Any]]]:
    """(label, run) of each; ``run(device, rows)``."""
    for dim in (64, 72, 80, 88, 96, 128, 256):
        yield f"forward bfloat16 d{dim}", partial(_forward, dtype=BF16, dim=dim)
    yield "forward float16 d64", partial(_forward, dtype=FP16, dim=64)
    yield "forward bfloat16 d80 short", partial(_forward, dtype=BF16, dim=80, longest=8)
    yield "forward bfloat16 d128 causal grouped", partial(_forward, dtype=BF16, dim=128, causal=True, kv_heads=4)
