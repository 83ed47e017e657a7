"""How far a replacement may be from the original, on the activations of a real forward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["relative_error", "tolerance"]

#: Largest difference over the largest value of the original's output. Two roundings of a different order of summation.
LIMIT = {torch.float64: 1e-10, torch.float32: 2e-4, torch.float16: 2e-2, torch.bfloat16: 6e-2}


def _first(x: Any) -> Tensor:
    return x if isinstance(x, Tensor) else x[0]


def relative_error(got: Any, want: Any) -> float:
    """max|got - want| / max|want|; infinite where kinds of output, shapes, dtypes or the places of NaN differ."""
    if isinstance(got, tuple) != isinstance(want, tuple):
        return float("inf")
    if isinstance(want, tuple) and [x is None for x in got] != [x is None for x in want]:
        return float("inf")
    got, want = _first(got), _first(want)
    if got.shape != want.shape or got.dtype != want.dtype or not torch.equal(got.isnan(), want.isnan()):
        return float("inf")
    if want.numel() == 0:
        return 0.0
    diff = torch.nan_to_num(got.detach().float() - want.detach().float())
    top = torch.nan_to_num(want.detach().float()).abs().max()
    return float(diff.abs().max() / top.clamp_min(1e-12))


def tolerance(want: Any) -> float:
    """The limit for the dtype of the original's output."""
    return LIMIT.get(_first(want).dtype, 2e-4)
