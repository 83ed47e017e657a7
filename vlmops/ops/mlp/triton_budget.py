"""What is compiled ahead of time for the budget: ViT and projector MLPs, SwiGLU, gathers, and their gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from vlmops.ops.mlp import triton as kernels

BF16, FP32 = torch.bfloat16, torch.float32
ROWS, C, HIDDEN = 8192, 4096, 8192  # large enough for the same tiles on every GPU


def _empty(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def _arguments(dtype: torch.dtype, rows: int, gated: bool, shuffle: bool = False) -> list[Any]:
    """A bias-free SwiGLU, or biases, LayerScale and residual around gelu; ``shuffle``: rows of 2x2 blocks of pictures."""
    empty = partial(_empty, dtype)
    x = empty(8, rows // 2, C // 4) if shuffle else empty(rows, C)
    b1, b2, scale = (None if gated else empty(n) for n in (HIDDEN, C, C))
    residual = None if gated else empty(8, rows // 8, C) if shuffle else empty(rows, C)
    gather = ("pixel_shuffle", 64, rows // 128) if shuffle else ("", 0, 0)
    return [x, empty(HIDDEN, C), b1, empty(C, HIDDEN), b2, empty(HIDDEN, C) if gated else None, None,
            "silu" if gated else "gelu", residual, "", None, None, 0.0, "", None, None, 0.0, scale, *gather, False]  # fmt: skip


def _forward(*case: Any) -> None:
    kernels.forward(*_arguments(*case))


def _backward(dtype: torch.dtype, gated: bool) -> None:
    args = _arguments(dtype, ROWS, gated)
    given = [args[i] is not None for i in (0, 1, 2, 3, 4, 5, 6, 8, 10, 11, 14, 15, 17)]
    kernels.backward([_empty(dtype, ROWS, C)], [], args, given)


def _pass(dtype: torch.dtype) -> None:
    """The elementwise passes around a norm in the middle."""
    first, gate = _empty(dtype, ROWS, HIDDEN), _empty(dtype, ROWS, HIDDEN)
    hidden = kernels.Hidden(first, gate, "silu", True, True)
    hidden.differentiate(hidden.value())


def cases() -> Iterator[tuple[str, Callable[[], Any]]]:
    """(label, thunk) of each."""
    yield "forward bfloat16 pixel_shuffle", partial(_forward, BF16, ROWS, False, True)
    yield "forward bfloat16 gated", partial(_forward, BF16, ROWS, True)
    yield "forward bfloat16 gated 4 rows", partial(_forward, BF16, 4, True)
    yield "forward float32 gated", partial(_forward, FP32, ROWS, True)
    yield "backward bfloat16 gated", partial(_backward, BF16, True)
    yield "backward bfloat16 mid_norm", partial(_pass, BF16)
