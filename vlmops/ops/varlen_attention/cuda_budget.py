"""What is compiled ahead of time and counted for the budget: the head sizes and masks of the field's towers and decoders."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from vlmops.ops._shared import cuda_sm90
from vlmops.ops.varlen_attention import cuda as kernels
from vlmops.ops.varlen_attention.cuda_sm90 import DIMS

BF16, FP16 = torch.bfloat16, torch.float16


def _forward(
    device: str, rows: int, dtype: torch.dtype, dim: int, causal: bool = False, left: int = -1, softcap: float = 0.0,
    longest: int = -1, kv_heads: int = 16,
) -> None:  # fmt: skip
    q, k, v = (torch.zeros(rows, heads, dim, dtype=dtype, device=device) for heads in (16, kv_heads, kv_heads))
    n = 2 if longest < 0 else rows // longest
    cu = torch.arange(n + 1, dtype=torch.int32, device=device) * (rows // n)
    kernels.forward(
        q, k, v, cu, cu, longest, longest, dim**-0.5, causal, left, -1, None, softcap, None, None, None, None, False
    )


def _few_queries(device: str, rows: int, dtype: torch.dtype, dim: int) -> None:
    """One query over a long context: its keys are split."""
    q = torch.zeros(1, 16, dim, dtype=dtype, device=device)
    k = torch.zeros(2048, 4, dim, dtype=dtype, device=device)
    cu_q, cu_k = (torch.arange(2, dtype=torch.int32, device=device) * n for n in (1, 2048))
    kernels.forward(q, k, k, cu_q, cu_k, 1, 2048, dim**-0.5, True, -1, -1, None, 0.0, None, None, None, None, False)


def _backward(
    device: str, rows: int, dtype: torch.dtype, dim: int, causal: bool = False, softcap: float = 0.0, longest: int = -1,
    kv_heads: int = 16,
) -> None:  # fmt: skip
    q, k, v = (torch.zeros(rows, heads, dim, dtype=dtype, device=device) for heads in (16, kv_heads, kv_heads))
    n = 2 if longest < 0 else rows // longest
    cu = torch.arange(n + 1, dtype=torch.int32, device=device) * (rows // n)
    args = [q, k, v, cu, cu, longest, longest, dim**-0.5, causal, -1, -1, None, softcap, *[None] * 4, False]
    kernels.backward([q, None], [q, torch.zeros(16, rows, device=device)], args, [True] * 3)


def _sm90(device: str, rows: int, **options: Any) -> None:
    """On sm_90a and on the machine: by wgmma."""
    with cuda_sm90.only():
        _forward(device, rows, **options)


def cases() -> Iterator[tuple[str, Callable[[str, int], Any]]]:
    """(label, run) of each; ``run(device, rows)``."""
    for dim in (64, 72, 80, 88, 96, 128, 256):
        yield f"forward bfloat16 d{dim}", partial(_forward, dtype=BF16, dim=dim)
    yield "forward float16 d64", partial(_forward, dtype=FP16, dim=64)
    yield "forward bfloat16 d80 short", partial(_forward, dtype=BF16, dim=80, longest=8)
    yield "forward bfloat16 d128 causal grouped", partial(_forward, dtype=BF16, dim=128, causal=True, kv_heads=4)
    yield "forward bfloat16 d128 few queries", partial(_few_queries, dtype=BF16, dim=128)
    for dim in (64, 72, 80, 96, 128):
        yield f"backward bfloat16 d{dim}", partial(_backward, dtype=BF16, dim=dim)
    yield "backward float16 d64", partial(_backward, dtype=FP16, dim=64)
    yield "backward bfloat16 d80 short", partial(_backward, dtype=BF16, dim=80, longest=8)
    yield "backward bfloat16 d128 causal grouped", partial(_backward, dtype=BF16, dim=128, causal=True, kv_heads=4)
    for dim in (64, 128):
        yield f"backward bfloat16 d{dim} softcap", partial(_backward, dtype=BF16, dim=dim, softcap=50.0)
    for dim in DIMS:
        yield f"sm90 bfloat16 d{dim}", partial(_sm90, dtype=BF16, dim=dim)
    yield "sm90 float16 d128 causal grouped", partial(_sm90, dtype=FP16, dim=128, causal=True, kv_heads=4)
    yield "sm90 bfloat16 d64 softcap", partial(_sm90, dtype=BF16, dim=64, softcap=30.0)
