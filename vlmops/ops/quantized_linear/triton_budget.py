"""What is compiled ahead of time for the budget: each kind, few rows and many."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from vlmops.ops._shared.quantisation import KINDS
from vlmops.ops.quantized_linear import triton as kernels

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def _forward(dtype: torch.dtype, rows: int, kind: str, group: int = 0, quantize: bool = False, **parts: Any) -> None:
    k, n = 4096, 4096
    data = torch.empty(n, k // (2 if kind == "int4" else 1), dtype=KINDS[kind], device="meta")
    scale = torch.empty(k // group if group else 1, n, device="meta")
    zero = torch.empty(scale.shape, dtype=torch.uint8, device="meta") if kind == "int4" else None
    x, bias = torch.empty(rows, k, dtype=dtype, device="meta"), torch.empty(n, dtype=dtype, device="meta")
    residual = torch.empty(rows, n, dtype=dtype, device="meta") if parts.get("residual") else None
    kernels.forward(
        x, data, scale, zero, kind, group, k, bias, parts.get("activation", ""), None, None, residual, quantize
    )


def cases() -> Iterator[tuple[str, Callable[[], Any]]]:
    """(label, thunk) of each."""
    yield "int8 bfloat16 1 row", partial(_forward, BF16, 1, "int8")
    yield "int4 g128 bfloat16 1 row", partial(_forward, BF16, 1, "int4", 128)
    yield "int4 g32 float16 4 rows", partial(_forward, FP16, 4, "int4", 32)
    yield "fp8 bfloat16 2 rows residual", partial(_forward, BF16, 2, "fp8", residual=True)
    yield "int8 bfloat16 2048 rows gelu", partial(_forward, BF16, 2048, "int8", activation="gelu")
    yield "int4 g128 bfloat16 2048 rows", partial(_forward, BF16, 2048, "int4", 128)
    yield "int4 g128 bfloat16 16 rows", partial(_forward, BF16, 16, "int4", 128)
    yield "int8 g64 float32 2048 rows", partial(_forward, FP32, 2048, "int8", 64)
    yield "fp8 bfloat16 2048 rows", partial(_forward, BF16, 2048, "fp8")
    yield "fp8 x fp8 bfloat16 2048 rows", partial(_forward, BF16, 2048, "fp8", quantize=True)
