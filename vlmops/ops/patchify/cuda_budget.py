"""What is compiled ahead of time and counted for the budget: CLIP, SigLIP, Qwen's rows and raw pixels of mixed sizes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from vlmops.ops.patchify import cuda as kernels

BF16, FP16, FP32, U8 = torch.bfloat16, torch.float16, torch.float32, torch.uint8
MEAN, STD = [0.48, 0.46, 0.41], [0.27, 0.26, 0.28]


def _forward(
    device: str, rows: int, pixel: torch.dtype, dtype: torch.dtype, form: str = "stack", patch: int = 14, frames: int = 1,
    order: str = "raster", e: int = 1024, position: bool = False, last: bool = False, turned: bool = False,
) -> None:  # fmt: skip
    n, cells, across = 8, 576, 24
    if device != "meta":  # the machine counts a small product
        n, cells, across, e = 2, rows // 12 * 8, 8, 64
    shape = (cells // across * patch, across * patch)
    mean, std = (MEAN, STD) if pixel == U8 else ([], [])
    sizes = None
    if form == "rows":
        images = torch.zeros(n * cells, 3 * frames * patch * patch, dtype=pixel, device=device)
    elif form == "buffer":
        sizes = torch.tensor([[1, *shape, int(turned and i > 0)] for i in range(n)])
        images = torch.zeros(n * 3 * shape[0] * shape[1], dtype=pixel, device=device)
    elif last:
        images = torch.zeros(n, 1, *shape, 3, dtype=pixel, device=device).permute(0, 1, 4, 2, 3)
    else:
        images = torch.zeros(n, 1, 3, *shape, dtype=pixel, device=device)
    weight = torch.zeros(e, 3 * frames * patch * patch, dtype=dtype, device=device)
    bias = torch.zeros(e, dtype=dtype, device=device) if frames == 1 else None
    table = torch.zeros(cells, e, dtype=dtype, device=device) if position else None
    kernels.forward(images, sizes, weight, bias, table, mean, std, patch, frames, order, last, n * cells, True)


def cases() -> Iterator[tuple[str, Callable[[str, int], Any]]]:
    """(label, run) of each; ``run(device, rows)``."""
    yield "forward CLIP uint8 bfloat16", partial(_forward, pixel=U8, dtype=BF16, position=True)
    yield "forward CLIP bfloat16", partial(_forward, pixel=BF16, dtype=BF16)
    yield "forward SigLIP uint8 bfloat16", partial(_forward, pixel=U8, dtype=BF16, patch=16, e=1152, position=True)
    yield "forward SigLIP float16", partial(_forward, pixel=FP16, dtype=FP16, patch=16, e=1152)
    yield "forward Qwen rows bfloat16", partial(_forward, pixel=BF16, dtype=BF16, form="rows", frames=2, e=1280)
    yield "forward Qwen rows float32 bfloat16", partial(_forward, pixel=FP32, dtype=BF16, form="rows", frames=2, e=1280)
    qwen = partial(_forward, pixel=U8, form="buffer", frames=2, order="merge2x2", e=1280)
    yield "forward Qwen mixed uint8 bfloat16", partial(qwen, dtype=BF16)
    yield "forward Qwen3 mixed uint8 bfloat16", partial(qwen, dtype=BF16, patch=16, e=1152)
    yield "forward Pixtral mixed uint8 bfloat16", partial(_forward, pixel=U8, dtype=BF16, form="buffer", patch=16)
    yield "forward channels last uint8 bfloat16", partial(_forward, pixel=U8, dtype=BF16, patch=16, e=768, last=True)
    odd = partial(_forward, pixel=U8, form="buffer", patch=15, turned=True)
    yield "forward odd patches both ways uint8 bfloat16", partial(odd, dtype=BF16)
    yield "forward CLIP uint8 float32", partial(_forward, pixel=U8, dtype=FP32, position=True)
