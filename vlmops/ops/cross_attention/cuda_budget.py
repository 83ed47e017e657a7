"""What is compiled ahead of time and counted for the budget: Flamingo's, Idefics' and Mllama's head sizes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from vlmops.ops.cross_attention import cuda as kernels

BF16, FP16 = torch.bfloat16, torch.float16


def _forward(
    device: str, rows: int, dtype: torch.dtype, dim: int, keys: int, split: bool = False, ranges: bool = False
) -> None:
    """Text of two images of ``keys`` keys. Split: few rows over all keys of a long context."""
    tokens = min(rows, 64) if split else rows
    q = torch.zeros(tokens, 16, dim, dtype=dtype, device=device)
    k, v = (torch.zeros(2 * keys, 8, dim, dtype=dtype, device=device) for _ in range(2))
    cu_q = torch.arange(2, dtype=torch.int32, device=device) * tokens
    cu_k = torch.arange(3, dtype=torch.int32, device=device) * keys
    media = torch.arange(tokens, dtype=torch.int32, device=device) * 3 // tokens - 1
    if ranges:
        media = torch.stack((torch.zeros_like(media), media + 1), dim=1)
    kernels.forward(q, k, v, cu_q, cu_k, media, dim**-0.5)


def _backward(device: str, rows: int, dtype: torch.dtype, dim: int, keys: int = 144) -> None:
    """Text of two images of ``keys`` keys."""
    q = torch.zeros(rows, 16, dim, dtype=dtype, device=device)
    k, v = (torch.zeros(2 * keys, 8, dim, dtype=dtype, device=device) for _ in range(2))
    cu_q = torch.arange(2, dtype=torch.int32, device=device) * rows
    cu_k = torch.arange(3, dtype=torch.int32, device=device) * keys
    media = torch.arange(rows, dtype=torch.int32, device=device) * 3 // rows - 1
    lse = torch.zeros(16, rows, device=device)
    kernels.backward([q, None], [q, lse], [q, k, v, cu_q, cu_k, media, dim**-0.5], [True] * 3)


def cases() -> Iterator[tuple[str, Callable[[str, int], Any]]]:
    """(label, run) of each; ``run(device, rows)``."""
    for dim in (64, 72, 80, 96, 128):
        yield f"forward bfloat16 d{dim}", partial(_forward, dtype=BF16, dim=dim, keys=144)
    yield "forward float16 d64", partial(_forward, dtype=FP16, dim=64, keys=144)
    yield "forward bfloat16 d256", partial(_forward, dtype=BF16, dim=256, keys=40)
    yield "forward bfloat16 d128 ranges", partial(_forward, dtype=BF16, dim=128, keys=144, ranges=True)
    yield "forward bfloat16 d128 split", partial(_forward, dtype=BF16, dim=128, keys=1601, split=True)
    yield (
        "forward bfloat16 d128 split ranges",
        partial(_forward, dtype=BF16, dim=128, keys=1601, split=True, ranges=True),
    )
    for dim in (64, 80, 128):
        yield f"backward bfloat16 d{dim}", partial(_backward, dtype=BF16, dim=dim)
    yield "backward bfloat16 d64 many keys", partial(_backward, dtype=BF16, dim=64, keys=1601)
    yield "backward float16 d128", partial(_backward, dtype=FP16, dim=128)
