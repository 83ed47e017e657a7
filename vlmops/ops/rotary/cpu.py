"""One native pass: read, rotate in float, round, write (csrc/cpu/kernels/rotary.cpp)."""

from __future__ import annotations

import torch
from torch import Tensor

from vlmops.backends import native

native.define("rotary(Tensor x, Tensor cos, Tensor sin, bool interleaved) -> Tensor")
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def supports(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> str | None:
    """Why this kernel cannot run these arguments; None if it can."""
    if x.device.type != "cpu":
        return f"a tensor on {x.device}"
    if x.dtype not in _DTYPES:
        return f"{str(x.dtype)[6:]} (float32, bfloat16 and float16 only)"
    return None if native.available() else native.reason()


def forward(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """[T, H, D] in x's dtype."""
    native.load()
    x = x if x.stride(2) == 1 or x.numel() == 0 else x.contiguous()
    out: Tensor = torch.ops.vlmops_cpu.rotary(x, cos.float().contiguous(), sin.float().contiguous(), interleaved)
    return out
