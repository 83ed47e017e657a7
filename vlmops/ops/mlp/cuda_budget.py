"""What is compiled ahead of time and counted for the budget: SwiGLU, ViT and projector MLPs, gathers, and decoding."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from vlmops.backends import cuda_runtime
from vlmops.ops.mlp import cuda as kernels

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def _operands(device: str, rows: int, dtype: torch.dtype, gated: bool, gather: str) -> list[Any]:
    """A bias-free SwiGLU, or biases, LayerScale and residual around gelu; ``gather``: rows of four tokens."""
    k = 256
    hidden, n = (16384, 4096) if device == "meta" else (128, 64)  # large enough for the large tile
    height, width = (4, rows) if gather == "pixel_shuffle" else (0, 0)

    def zeros(*shape: int) -> torch.Tensor:
        return torch.zeros(*shape, dtype=dtype, device=device)

    x = zeros(1, height * width, k // 4) if height else zeros(rows, k)
    b1, b2, scale = (None if gated else zeros(size) for size in (hidden, n, n))
    residual = None if gated else zeros(1, rows, n) if height else zeros(rows, n)
    return [x, zeros(hidden, k), b1, zeros(n, hidden), b2, zeros(hidden, k) if gated else None, None,
            "silu" if gated else "gelu", residual, "", None, None, 0.0, "", None, None, 0.0, scale, gather, height, width,
            False]  # fmt: skip


def _forward(device: str, rows: int, dtype: torch.dtype, gated: bool = False) -> None:
    kernels.forward(*_operands(device, rows, dtype, gated, ""))


def _hidden(device: str, rows: int, dtype: torch.dtype, gated: bool = True, gather: str = "", few: int = 0) -> None:
    """The first product alone: the second one is a case of linear."""
    x, w1, b1, _, _, w_gate, _, activation, *_, height, width, _ = _operands(device, few or rows, dtype, gated, gather)
    weights = [w1] if w_gate is None else [w1, w_gate]
    read = kernels.rows_of([], x, gather, height, width, weights)
    h = x.new_empty(read.m, w1.shape[0])
    cuda_runtime.run([kernels.hidden_plan(read, weights, b1, None, activation, h)])


def cases() -> Iterator[tuple[str, Callable[[str, int], Any]]]:
    """(label, run) of each; ``run(device, rows)``."""
    yield "forward bfloat16", partial(_forward, dtype=BF16)
    yield "forward bfloat16 gated", partial(_forward, dtype=BF16, gated=True)
    for gated in (False, True):
        label = f"hidden bfloat16 {'gated ' * gated}pixel_shuffle"
        yield label, partial(_hidden, dtype=BF16, gated=gated, gather="pixel_shuffle")
    yield "hidden float32 pixel_shuffle", partial(_hidden, dtype=FP32, gated=False, gather="pixel_shuffle")
    for dtype in (FP16, FP32):
        yield f"hidden {str(dtype)[6:]} gated", partial(_hidden, dtype=dtype)
    for rows in (50, 16, 4, 1):
        yield f"hidden bfloat16 gated {rows} row{'s' * (rows > 1)}", partial(_hidden, dtype=BF16, few=rows)
    yield "hidden float32 gated 4 rows", partial(_hidden, dtype=FP32, few=4)
