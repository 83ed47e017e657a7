"""What is compiled ahead of time for the budget: head sizes with one and two chunks, a mask, and float32's way."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from vlmops.ops.fp8_attention import triton as kernels

BF16, FP32 = torch.bfloat16, torch.float32


def _forward(dtype: torch.dtype, dim: int, causal: bool = False, left: int = -1, right: int = -1) -> None:
    q, k, v = (torch.empty(4096, 16, dim, dtype=dtype, device="meta") for _ in range(3))
    cu = torch.empty(5, dtype=torch.int32, device="meta")
    kernels.forward(q, k, v, cu, cu, -1, -1, dim**-0.5, causal, left, right)


def _attend(dtype: torch.dtype, dim: int, causal: bool = False) -> None:
    """Without the passes that round: they are compiled once."""
    q = torch.empty(4096, 16, dim, dtype=dtype, device="meta")
    cu = torch.empty(5, dtype=torch.int32, device="meta")
    low = torch.float8_e4m3fn if kernels.holds_e4m3(q) else torch.float16
    rows = torch.empty(16, 4096, sum(kernels.key_chunks(dim)), dtype=low, device="meta")
    turned = torch.empty(16, kernels.key_chunks(dim)[0] + kernels.value_chunk(dim), 4160, dtype=low, device="meta")
    scale = torch.empty(16, device="meta")
    kernels.attend(q, (rows, scale, rows, scale, turned, scale), cu, cu, 4096, 16, -1, dim**-0.5, causal, -1, -1)


def cases() -> Iterator[tuple[str, Callable[[], Any]]]:
    """(label, thunk) of each."""
    yield "bfloat16 d64", partial(_attend, BF16, 64)
    yield "bfloat16 d80 window", partial(_forward, BF16, 80, left=56, right=56)
    yield "bfloat16 d128", partial(_attend, BF16, 128)
    yield "bfloat16 d128 causal", partial(_attend, BF16, 128, causal=True)
    yield "bfloat16 d256", partial(_attend, BF16, 256)
    yield "float32 d72", partial(_attend, FP32, 72)
