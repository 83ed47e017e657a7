"""What is compiled ahead of time for the budget: the resamplers of Flamingo, Idefics 2 and Qwen-VL."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from vlmops.ops.perceiver_attention import triton as kernels

BF16, FP32 = torch.bfloat16, torch.float32


def _arguments(dtype: torch.dtype, dim: int, kv_heads: int) -> list[Any]:
    q = torch.empty(4 * 64, 16, dim, dtype=dtype, device="meta")
    k, v = (torch.empty(4 * 729, kv_heads, dim, dtype=dtype, device="meta") for _ in range(2))
    kl, vl = (torch.empty(4 * 64, kv_heads, dim, dtype=dtype, device="meta") for _ in range(2))
    return [q, k, v, kl, vl, torch.empty(5, dtype=torch.int32, device="meta"), 64, dim**-0.5]


def _forward(dtype: torch.dtype, dim: int, kv_heads: int) -> None:
    kernels.forward(*_arguments(dtype, dim, kv_heads))


def _backward(dtype: torch.dtype, dim: int, kv_heads: int) -> None:
    args = _arguments(dtype, dim, kv_heads)
    out, lse = torch.empty_like(args[0]), torch.empty(16, 4 * 64, device="meta")
    kernels.backward([out, None], [out, lse], args, [True] * 5)


def cases() -> Iterator[tuple[str, Callable[[], Any]]]:
    """(label, thunk) of each."""
    for dim, kv_heads in ((64, 16), (96, 4), (128, 16)):
        yield f"forward bfloat16 d{dim}", partial(_forward, BF16, dim, kv_heads)
    yield "forward float32 d64", partial(_forward, FP32, 64, 16)
    for dim, kv_heads in ((64, 16), (96, 4)):
        yield f"backward bfloat16 d{dim}", partial(_backward, BF16, dim, kv_heads)
