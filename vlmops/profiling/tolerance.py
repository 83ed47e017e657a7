"""The one tolerance rule: an error is measured against float64 and bounded by twice torch's own at that precision.

Tests and `vlmops gpu-check` judge by it; FlashAttention's tests do the same.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["EPS", "OWN", "Judgement", "judge", "max_error"]

#: Absolute floor: a few ulp of the value range, so that a case where torch happens to be exact is not a failure.
EPS = {torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4, torch.float64: 1e-12}

#: For plain torch itself, which has nobody to be measured against: relative to the largest value.
OWN = {torch.float32: 2e-5, torch.bfloat16: 4e-2, torch.float16: 5e-3, torch.float64: 1e-10}


@dataclass(frozen=True)
class Judgement:
    """One tensor against the oracle.

    Args:
        what: which output or gradient.
        error: max|out - oracle|; infinite where shapes, NaNs or infinities differ.
        bound: what it may be.
        torchs: max|torch - oracle|, 0 where torch itself is judged.
        size: max|oracle|, at least 1.
        note: what else is wrong.
    """

    what: str
    error: float
    bound: float
    torchs: float
    size: float
    note: str = ""

    @property
    def ok(self) -> bool:
        """Whether the error is within its bound."""
        return self.error <= self.bound

    def __str__(self) -> str:
        if self.note:
            return f"{self.what}: {self.note}"
        sign = "<=" if self.ok else ">"
        numbers = f"(torch's own {self.torchs:.3e}, scale {self.size:.2e})"
        return f"{self.what}: error {self.error:.3e} {sign} {self.bound:.3e} {numbers}"


def max_error(x: Tensor, oracle: Tensor) -> float:
    """Largest absolute difference, in float64; shapes and the places of NaN and infinities must agree.

    Raises:
        AssertionError: they do not.
    """
    if x.shape != oracle.shape:
        raise AssertionError(f"shape {tuple(x.shape)} != {tuple(oracle.shape)}")
    if x.numel() == 0:
        return 0.0
    x, oracle = x.detach().double(), oracle.detach().double()
    if not torch.equal(x.isnan(), oracle.isnan()):
        raise AssertionError("NaN in different places")
    if not torch.equal(x.isinf(), oracle.isinf()):
        raise AssertionError("infinities in different places")
    diff = (x - oracle).abs()
    return float(diff[diff.isfinite()].max()) if bool(diff.isfinite().any()) else 0.0


def judge(
    out: Tensor, lowprec: Tensor | None, oracle: Tensor, what: str = "output", dtype: torch.dtype | None = None
) -> Judgement:
    """max|out - oracle| <= 2 max|lowprec - oracle| + eps * max(1, max|oracle|).

    Args:
        out: what is judged.
        lowprec: plain torch at the same precision as ``out``; None where ``out`` is that: then a fixed bound holds.
        oracle: the float64 result.
        what: its name in the message.
        dtype: lowest precision on the way, where the result itself has a higher one (a float32 loss of bfloat16 rows).
    """
    finite = oracle.detach()[oracle.detach().isfinite()]
    size = max(1.0, float(finite.abs().max())) if finite.numel() else 1.0
    try:
        mine = max_error(out, oracle)
        theirs = 0.0 if lowprec is None else max_error(lowprec, oracle)
    except AssertionError as err:
        return Judgement(what, float("inf"), 0.0, 0.0, size, str(err))
    eps = EPS[out.dtype] if lowprec is not None else max(OWN[out.dtype], OWN[dtype or out.dtype])
    return Judgement(what, mine, 2 * theirs + eps * size, theirs, size)
