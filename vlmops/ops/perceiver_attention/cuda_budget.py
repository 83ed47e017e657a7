"""What is compiled ahead of time and counted for the budget: Flamingo's, Idefics2's, Q-Former's and Qwen-VL's head sizes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from vlmops.ops.perceiver_attention import cuda as kernels

BF16, FP16 = torch.bfloat16, torch.float16


def _forward(
    device: str, rows: int, dtype: torch.dtype, dim: int, latents: int = 64, context: int = 100, own: bool = True,
    split: bool = False,
) -> None:  # fmt: skip
    """As many items as ``rows`` allow, of ``context`` tokens. Split: one item."""
    items = 1 if split else max(2, rows // latents)
    q = torch.zeros(items * latents, 16, dim, dtype=dtype, device=device)
    k, v = (torch.zeros(items * context, 4, dim, dtype=dtype, device=device) for _ in range(2))
    kl, vl = (torch.zeros(items * latents, 4, dim, dtype=dtype, device=device) if own else None for _ in range(2))
    cu = torch.arange(items + 1, dtype=torch.int32, device=device) * context
    kernels.forward(q, k, v, kl, vl, cu, latents, dim**-0.5)


def _backward(
    device: str, rows: int, dtype: torch.dtype, dim: int, latents: int = 64, context: int = 100, own: bool = True
) -> None:
    items = max(2, rows // latents)
    q = torch.zeros(items * latents, 16, dim, dtype=dtype, device=device)
    k, v = (torch.zeros(items * context, 4, dim, dtype=dtype, device=device) for _ in range(2))
    kl, vl = (torch.zeros(items * latents, 4, dim, dtype=dtype, device=device) if own else None for _ in range(2))
    cu = torch.arange(items + 1, dtype=torch.int32, device=device) * context
    lse = torch.zeros(16, items * latents, device=device)
    kernels.backward([q, None], [q, lse], [q, k, v, kl, vl, cu, latents, dim**-0.5], [True, True, True, own, own])


def cases() -> Iterator[tuple[str, Callable[[str, int], Any]]]:
    """(label, run) of each; ``run(device, rows)``."""
    for dim in (64, 72, 80, 96, 128):
        yield f"forward bfloat16 d{dim}", partial(_forward, dtype=BF16, dim=dim)
    yield "forward float16 d64", partial(_forward, dtype=FP16, dim=64)
    yield "forward bfloat16 d256", partial(_forward, dtype=BF16, dim=256, latents=8)
    yield "forward bfloat16 d128 many latents", partial(_forward, dtype=BF16, dim=128, latents=256)
    yield "forward bfloat16 d64 context only", partial(_forward, dtype=BF16, dim=64, latents=32, own=False)
    for dim in (64, 96):
        yield f"forward bfloat16 d{dim} split", partial(_forward, dtype=BF16, dim=dim, context=2048, split=True)
    for dim in (64, 96, 128):
        yield f"backward bfloat16 d{dim}", partial(_backward, dtype=BF16, dim=dim)
    yield "backward bfloat16 d96 many latents", partial(_backward, dtype=BF16, dim=96, latents=256)
    yield "backward float16 d64", partial(_backward, dtype=FP16, dim=64)
    yield "backward bfloat16 d64 context only", partial(_backward, dtype=BF16, dim=64, latents=32, own=False)
