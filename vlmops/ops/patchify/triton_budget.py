"""What is compiled ahead of time for the budget: CLIP, Qwen's rows, Qwen's raw pixels of mixed sizes, gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from vlmops.ops.patchify import triton as kernels

BF16, FP32, U8 = torch.bfloat16, torch.float32, torch.uint8
MEAN, STD = [0.48, 0.46, 0.41], [0.27, 0.26, 0.28]


def _stack(dtype: torch.dtype, height: int) -> tuple[Tensor, None, int]:
    return torch.empty(8, 1, 3, height, height, dtype=dtype, device="meta"), None, 8 * (height // 14) ** 2


def _mixed(dtype: torch.dtype) -> tuple[Tensor, Tensor, int]:
    sizes = torch.tensor([[1, 384, 512, 0], [1, 640, 384, 0]])
    pixels = int((sizes[:, 1] * sizes[:, 2]).sum())
    return torch.empty(3 * pixels, dtype=dtype, device="meta"), sizes, pixels // 256


def _rows(dtype: torch.dtype) -> tuple[Tensor, None, int]:
    return torch.empty(4096, 1176, dtype=dtype, device="meta"), None, 4096


def _run(
    make: Callable[[], tuple[Tensor, Tensor | None, int]], dtype: torch.dtype, frames: int, order: str, mean: list[float],
    std: list[float], position: bool, needs: list[bool] | None = None,
) -> None:  # fmt: skip
    images, sizes, tokens = make()
    patch = 14 if sizes is None else 16
    shape = (1280, 3, 2, patch, patch) if frames == 2 else (1024, 3, patch, patch)
    weight = torch.empty(shape, dtype=dtype, device="meta")
    bias = torch.empty(shape[0], dtype=dtype, device="meta") if frames == 1 else None
    table = torch.empty(tokens // 8, shape[0], dtype=dtype, device="meta") if position else None
    args = (images, sizes, weight, bias, table, mean, std, patch, frames, order, False, tokens, needs is None)
    if needs is None:
        kernels.forward(*args)
    else:
        kernels.backward([torch.empty(tokens, shape[0], dtype=dtype, device="meta")], [], args, needs)


def cases() -> Iterator[tuple[str, Callable[[], Any]]]:
    """(label, thunk) of each."""
    clip = partial(_stack, U8, 336)
    yield "forward CLIP uint8 bfloat16", partial(_run, clip, BF16, 1, "raster", MEAN, STD, True)
    yield "forward Qwen rows bfloat16", partial(_run, partial(_rows, BF16), BF16, 2, "raster", [], [], False)
    yield "forward CLIP float32", partial(_run, partial(_stack, FP32, 336), FP32, 1, "raster", [], [], False)
    mixed = partial(_mixed, U8)
    yield "forward Qwen mixed uint8 bfloat16", partial(_run, mixed, BF16, 2, "merge2x2", MEAN, STD, False)
    both = [True, True, True, False]
    clip = partial(_stack, BF16, 336)
    yield "backward CLIP bfloat16", partial(_run, clip, BF16, 1, "raster", MEAN, STD, False, both)
    clip = partial(_stack, FP32, 336)
    yield "backward CLIP float32", partial(_run, clip, FP32, 1, "raster", MEAN, STD, False, both)
