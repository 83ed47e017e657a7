"""The one tolerance rule: an error is measured against float64 and bounded by twice torch's own at that precision."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["assert_close_to_oracle", "max_error"]

#: Absolute floor: a few ulp of the value range, so that a case where torch happens to be exact is not a failure.
EPS = {torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4, torch.float64: 1e-12}

#: For plain torch itself, which has nobody to be measured against: relative to the largest value.
OWN = {torch.float32: 2e-5, torch.bfloat16: 4e-2, torch.float16: 5e-3, torch.float64: 1e-10}


def max_error(x: Tensor, oracle: Tensor) -> float:
    """Largest absolute difference, in float64; shapes and the places of NaN and infinities must agree."""
    assert x.shape == oracle.shape, f"shape {tuple(x.shape)} != {tuple(oracle.shape)}"
    if x.numel() == 0:
        return 0.0
    x, oracle = x.detach().double(), oracle.detach().double()
    assert torch.equal(x.isnan(), oracle.isnan()), "NaN in different places"
    assert torch.equal(x.isinf(), oracle.isinf()), "infinities in different places"
    diff = (x - oracle).abs()
    return float(diff[diff.isfinite()].max()) if bool(diff.isfinite().any()) else 0.0


def assert_close_to_oracle(
    out: Tensor, lowprec: Tensor | None, oracle: Tensor, what: str = "output", dtype: torch.dtype | None = None
) -> None:
    """max|out - oracle| <= 2 max|lowprec - oracle| + eps * max(1, max|oracle|).

    Args:
        out: what is tested.
        lowprec: plain torch at the same precision as ``out``; None where ``out`` is that: then a fixed bound holds.
        oracle: the float64 result.
        dtype: lowest precision on the way, where the result itself has a higher one (a float32 loss of bfloat16 rows).
    """
    mine = max_error(out, oracle)
    theirs = 0.0 if lowprec is None else max_error(lowprec, oracle)
    finite = oracle.detach()[oracle.detach().isfinite()]
    size = max(1.0, float(finite.abs().max())) if finite.numel() else 1.0
    bound = (
        2 * theirs + (EPS[out.dtype] if lowprec is not None else max(OWN[out.dtype], OWN[dtype or out.dtype])) * size
    )
    assert mine <= bound, f"{what}: error {mine:.3e} > {bound:.3e} (torch's own {theirs:.3e}, scale {size:.2e})"
