"""What is compiled ahead of time and counted for the budget."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from vlmops.ops.merge_tokens import cuda as kernels

IMAGE = 7


def _arguments(device: str, rows: int, dtype: torch.dtype, width: int) -> list[Any]:
    ids = torch.ones(2 * rows, dtype=torch.int64, device=device)
    ids[rows // 2 : rows // 2 + rows] = IMAGE
    embeds, features = (torch.zeros(n, width, dtype=dtype, device=device) for n in (2 * rows, rows))
    return [ids, embeds, features, IMAGE]


def _forward(device: str, rows: int, dtype: torch.dtype, width: int) -> None:
    kernels.forward(*_arguments(device, rows, dtype, width))


def _backward(device: str, rows: int, dtype: torch.dtype, width: int) -> None:
    args = _arguments(device, rows, dtype, width)
    kernels.backward([args[1]], [], args, [True, True])


def cases() -> Iterator[tuple[str, Callable[[str, int], Any]]]:
    """(label, run) of each; ``run(device, rows)``. The kernels copy bytes: one dtype stands for all."""
    for name, run in (("forward", _forward), ("backward", _backward)):
        for width in (896, 4096):
            yield f"{name} bfloat16 {width}", partial(run, dtype=torch.bfloat16, width=width)
