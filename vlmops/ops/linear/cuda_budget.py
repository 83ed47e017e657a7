"""What is compiled ahead of time and counted for the budget: the projections of towers and language models, and decoding."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from vlmops.ops._shared import cuda_sm90
from vlmops.ops.linear import cuda as kernels

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def _forward(
    device: str, rows: int, dtype: torch.dtype, activation: str, everything: bool = False, few: int = 0, k: int = 128
) -> None:
    n = 16384 if device == "meta" else 128  # large enough for the large tile; the machine counts a small product
    rows = few or rows
    x, weight, bias, gate, residual = (
        torch.zeros(*shape, dtype=dtype, device=device) for shape in ((rows, k), (n, k), (n,), (n,), (rows, n))
    )
    mask = torch.ones(rows, dtype=torch.bool, device=device)
    args: list[Any] = [x, weight, bias, activation, *((gate, mask, residual) if everything else [None] * 3), False]
    kernels.forward(*args)


def _sm90(device: str, rows: int, **options: Any) -> None:
    """On sm_90a and on the machine: by wgmma."""
    with cuda_sm90.only():
        _forward(device, rows, **options)


def cases() -> Iterator[tuple[str, Callable[[str, int], Any]]]:
    """(label, run) of each; ``run(device, rows)``."""
    for activation in ("", "gelu"):
        yield f"forward bfloat16 {activation}".strip(), partial(_forward, dtype=BF16, activation=activation)
    yield "forward float16 everything", partial(_forward, dtype=FP16, activation="gelu", everything=True)
    yield "forward bfloat16 k 588", partial(_forward, dtype=BF16, activation="", k=588)
    yield "forward bfloat16 k 587", partial(_forward, dtype=BF16, activation="", k=587)
    yield "forward bfloat16 50 rows", partial(_forward, dtype=BF16, activation="", few=50)
    yield "forward bfloat16 16 rows", partial(_forward, dtype=BF16, activation="", few=16)
    yield "forward float32", partial(_forward, dtype=FP32, activation="gelu", everything=True)
    yield "sm90 bfloat16 gelu", partial(_sm90, dtype=BF16, activation="gelu")
    yield "sm90 float16 everything", partial(_sm90, dtype=FP16, activation="gelu", everything=True)
    yield "sm90 bfloat16 50 rows", partial(_sm90, dtype=BF16, activation="", few=50)
    for dtype, rows in ((BF16, 1), (FP16, 1), (BF16, 4), (FP32, 4)):
        label = f"forward {str(dtype)[6:]} {rows} row{'s' * (rows > 1)}"
        yield (
            label,
            partial(_forward, dtype=dtype, activation="silu" if rows > 1 else "", everything=rows > 1, few=rows),
        )
