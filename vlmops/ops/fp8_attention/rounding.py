"""What the plain-PyTorch sides of fp8_attention share: rounded heads, and the refusal of a gradient."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor

from vlmops.ops._shared.quantisation import finite_max, power_of_two_scale, round_e4m3

__all__ = ["NO_GRADIENT", "backward", "rounded_heads"]

NO_GRADIENT = "fp8_attention is for inference and has no gradient:"


def rounded_heads(x: Tensor, work: torch.dtype) -> Tensor:
    """x [T, H, D] with each head rounded to e4m3 times its power of two, in ``work`` (float32 or float64)."""
    x = x.to(work)
    size = power_of_two_scale(finite_max(x, (0, 2)))[None, :, None]
    return round_e4m3(x / size) * size


def backward(*args: Any) -> NoReturn:
    """RuntimeError: reached only where the raw op was called on tensors that require a gradient."""
    raise RuntimeError(f"{NO_GRADIENT} use varlen_attention")
