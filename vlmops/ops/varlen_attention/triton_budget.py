"""What is compiled ahead of time for the budget: the head sizes and masks of the field's towers and language models."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from vlmops.ops.varlen_attention import triton as kernels

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def _arguments(dtype: torch.dtype, dim: int, **options: Any) -> list[Any]:
    q, k, v = (torch.empty(4096, 16, dim, dtype=dtype, device="meta") for _ in range(3))
    cu = torch.empty(5, dtype=torch.int32, device="meta")
    table = torch.empty(4096, dim, device="meta") if options.get("rope") else None
    prefix = torch.empty(4, dtype=torch.int32, device="meta") if options.get("prefix") else None
    return [q, k, v, cu, cu, -1, -1, dim**-0.5, options.get("causal", False), options.get("left", -1),
            options.get("right", -1), prefix, options.get("softcap", 0.0), table, table, table, table, False]  # fmt: skip


def _forward(*case: Any, **options: Any) -> None:
    kernels.forward(*_arguments(*case, **options))


def _backward(*case: Any, **options: Any) -> None:
    args = _arguments(*case, **options)
    out, lse = torch.empty_like(args[0]), torch.empty(16, 4096, device="meta")
    kernels.backward([out, None], [out, lse], args, [True, True, True])


def cases() -> Iterator[tuple[str, Callable[[], Any]]]:
    """(label, thunk) of each."""
    for dim in (64, 72, 80, 88, 96, 128, 256):
        yield f"forward bfloat16 d{dim}", partial(_forward, BF16, dim)
    yield "forward float16 d64", partial(_forward, FP16, 64)
    for dim in (64, 80):
        yield f"forward float32 d{dim}", partial(_forward, FP32, dim)
    yield "forward bfloat16 d128 causal", partial(_forward, BF16, 128, causal=True)
    yield "forward bfloat16 d80 window", partial(_forward, BF16, 80, left=56, right=56)
    yield "forward bfloat16 d256 causal softcap", partial(_forward, BF16, 256, causal=True, softcap=50.0)
    yield "forward bfloat16 d128 causal prefix", partial(_forward, BF16, 128, causal=True, prefix=True)
    for dim in (64, 72, 80, 128, 256):
        yield f"backward bfloat16 d{dim}", partial(_backward, BF16, dim)
    yield "backward bfloat16 d128 causal", partial(_backward, BF16, 128, causal=True)
    yield "backward float32 d64", partial(_backward, FP32, 64)
