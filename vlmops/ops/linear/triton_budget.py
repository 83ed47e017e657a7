"""What is compiled ahead of time for the budget: the projections of towers and language models, decoding, and their gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from vlmops.ops.linear import triton as kernels

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def _arguments(dtype: torch.dtype, rows: int, activation: str, everything: bool) -> list[Any]:
    k, n = 4096, 8192  # large enough for the same tiles on every GPU
    x, weight, bias, gate, residual = (
        torch.empty(*shape, dtype=dtype, device="meta") for shape in ((rows, k), (n, k), (n,), (n,), (rows, n))
    )
    mask = torch.empty(rows, dtype=torch.bool, device="meta")
    return [x, weight, bias, activation, *((gate, mask, residual) if everything else (None, None, None)), False]


def _forward(dtype: torch.dtype, rows: int, activation: str, everything: bool = False) -> None:
    kernels.forward(*_arguments(dtype, rows, activation, everything))


def _backward(dtype: torch.dtype, activation: str, everything: bool, needs: list[bool]) -> None:
    args = _arguments(dtype, 8192, activation, everything)
    kernels.backward([torch.empty(8192, 8192, dtype=dtype, device="meta")], [], args, needs)


def cases() -> Iterator[tuple[str, Callable[[], Any]]]:
    """(label, thunk) of each."""
    yield "forward bfloat16", partial(_forward, BF16, 8192, "")
    yield "forward float16 everything", partial(_forward, FP16, 8192, "gelu", True)
    yield "forward float32", partial(_forward, FP32, 8192, "gelu")
    yield "forward bfloat16 1 row", partial(_forward, BF16, 1, "")
    yield "forward bfloat16 4 rows everything", partial(_forward, BF16, 4, "silu", True)
    yield "backward bfloat16 gelu", partial(_backward, BF16, "gelu", False, [True, True, True, False, False])
    yield "backward bfloat16 gate", partial(_backward, BF16, "", True, [False, True, True, True, True])
    yield "backward float32", partial(_backward, FP32, "", False, [True, True, False, False, False])
