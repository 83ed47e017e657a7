"""What is compiled ahead of time and counted for the budget: decoding with each kind of weight."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from vlmops.ops.quantized_linear import cuda as kernels

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def _forward(
    device: str, rows: int, dtype: torch.dtype, kind: str, few: int, group: int = 0, n: int = 16384, activation: str = "",
    everything: bool = False,
) -> None:  # fmt: skip
    """``few`` 0: ``rows``."""
    few, k, n = (
        few or rows,
        1024 if device == "meta" else 256,
        n if device == "meta" else 72,
    )  # the machine counts a small product
    codes = torch.int8 if kind == "int8" else torch.uint8
    data = torch.zeros(n, k // (2 if kind == "int4" else 1), dtype=codes, device=device)
    scale = torch.ones(k // group if group else 1, n, device=device)
    zero = torch.zeros(scale.shape, dtype=torch.uint8, device=device) if kind == "int4" else None
    x, bias, gate, residual = (torch.zeros(*s, dtype=dtype, device=device) for s in ((few, k), (n,), (n,), (few, n)))
    mask = torch.ones(few, dtype=torch.bool, device=device)
    args: list[Any] = [x, data, scale, zero, kind, group, k, bias, activation, gate, mask, residual, False]
    if not everything:
        args[9:12] = [None] * 3
    kernels.forward(*args)


def cases() -> Iterator[tuple[str, Callable[[str, int], Any]]]:
    """(label, run) of each; ``run(device, rows)``."""
    yield "int8 bfloat16 1 row", partial(_forward, dtype=BF16, kind="int8", few=1)
    yield "int8 bfloat16 1 row, a small weight", partial(_forward, dtype=BF16, kind="int8", few=1, n=1024)
    yield "int8 g64 float16 4 rows silu", partial(_forward, dtype=FP16, kind="int8", few=4, group=64, activation="silu")
    yield "int4 g128 bfloat16 1 row", partial(_forward, dtype=BF16, kind="int4", few=1, group=128)
    yield (
        "int4 g128 bfloat16 8 rows gelu everything",
        partial(_forward, dtype=BF16, kind="int4", few=8, group=128, activation="gelu", everything=True),
    )
    yield "int4 g32 float32 2 rows", partial(_forward, dtype=FP32, kind="int4", few=2, group=32)
    yield "fp8 bfloat16 1 row", partial(_forward, dtype=BF16, kind="fp8", few=1)
    yield "fp8 bfloat16 4 rows everything", partial(_forward, dtype=BF16, kind="fp8", few=4, everything=True)
    yield "int8 bfloat16 16 rows", partial(_forward, dtype=BF16, kind="int8", few=16)
    yield "int8 g64 float16 gelu", partial(_forward, dtype=FP16, kind="int8", few=0, group=64, activation="gelu")
    yield "int4 g128 bfloat16 16 rows", partial(_forward, dtype=BF16, kind="int4", few=16, group=128)
    yield "int4 g128 bfloat16 50 rows", partial(_forward, dtype=BF16, kind="int4", few=50, group=128)
    yield "int4 g32 bfloat16 everything", partial(_forward, dtype=BF16, kind="int4", few=0, group=32, everything=True)
    yield "fp8 bfloat16", partial(_forward, dtype=BF16, kind="fp8", few=0)
