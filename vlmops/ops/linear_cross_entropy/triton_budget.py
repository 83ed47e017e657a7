"""What is compiled ahead of time for the budget: the output heads of decoders (Qwen2-VL's 151,936 words)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from vlmops.ops.linear_cross_entropy import triton as kernels


def _arguments(dtype: torch.dtype, tokens: int, reduction: str, wants: bool) -> list[Any]:
    hidden, weight = (torch.empty(n, 2048, dtype=dtype, device="meta") for n in (tokens, 151_936))
    targets = torch.empty(tokens, dtype=torch.int64, device="meta")
    return [hidden, weight, None, targets, -100, reduction, 0.0, 0.0, 0.0, [wants, wants, False]]


def _forward(dtype: torch.dtype, tokens: int) -> None:
    kernels.forward(*_arguments(dtype, tokens, "mean", False))


def _backward(dtype: torch.dtype, tokens: int) -> None:
    args = _arguments(dtype, tokens, "none", False)
    kernels.backward([torch.empty(tokens, device="meta")], [], args, [True, True, False])


def cases() -> Iterator[tuple[str, Callable[[], Any]]]:
    """(label, thunk) of each. Gradients made in the forward come from the backward's kernels."""
    yield "forward bfloat16 v151936", partial(_forward, torch.bfloat16, 8192)
    yield "backward bfloat16 v151936", partial(_backward, torch.bfloat16, 8192)  # four pieces
    yield "backward float32 v151936", partial(_backward, torch.float32, 256)  # one
