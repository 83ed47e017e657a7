"""What is compiled ahead of time for the budget: Flamingo's, Idefics' and Mllama's head sizes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from vlmops.ops.cross_attention import triton as kernels

BF16, FP32 = torch.bfloat16, torch.float32


def _arguments(dtype: torch.dtype, dim: int) -> list[Any]:
    q = torch.empty(2048, 16, dim, dtype=dtype, device="meta")
    k, v = (torch.empty(6400, 8, dim, dtype=dtype, device="meta") for _ in range(2))
    cu_q, cu_k, media = (torch.empty(n, dtype=torch.int32, device="meta") for n in (3, 5, 2048))
    return [q, k, v, cu_q, cu_k, media, dim**-0.5]


def _forward(dtype: torch.dtype, dim: int) -> None:
    kernels.forward(*_arguments(dtype, dim))


def _backward(dtype: torch.dtype, dim: int) -> None:
    args = _arguments(dtype, dim)
    out, lse = torch.empty_like(args[0]), torch.empty(16, 2048, device="meta")
    kernels.backward([out, None], [out, lse], args, [True, True, True])


def cases() -> Iterator[tuple[str, Callable[[], Any]]]:
    """(label, thunk) of each."""
    for dim in (64, 80, 96, 128):
        yield f"forward bfloat16 d{dim}", partial(_forward, BF16, dim)
    yield "forward float32 d64", partial(_forward, FP32, 64)
    for dim in (64, 128):
        yield f"backward bfloat16 d{dim}", partial(_backward, BF16, dim)
