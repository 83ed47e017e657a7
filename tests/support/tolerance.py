"""The tolerance rule of ``vlmops.profiling.tolerance`` as an assertion."""

from __future__ import annotations

import torch
from torch import Tensor

from vlmops.profiling.tolerance import EPS, OWN, judge, max_error

__all__ = ["EPS", "OWN", "assert_close_to_oracle", "max_error"]


def assert_close_to_oracle(
    out: Tensor, lowprec: Tensor | None, oracle: Tensor, what: str = "output", dtype: torch.dtype | None = None
) -> None:
    """max|out - oracle| <= 2 max|lowprec - oracle| + eps * max(1, max|oracle|); arguments as ``judge`` has them."""
    found = judge(out, lowprec, oracle, what, dtype)
    assert found.ok, str(found)
