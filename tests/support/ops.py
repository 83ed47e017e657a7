"""Running one op on two backends, with gradients, for the parity tests of every op."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from vlmops.profiling.gpu_check.parity import against_oracle, to_dtype

__all__ = ["check_op", "opcheck", "to_dtype"]


def check_op(
    fn: Callable[..., Any],
    args: tuple,
    kwargs: dict,
    *,
    backend: str,
    dtype: torch.dtype,
    lowprec: str | Callable[..., Any] = "torch",
) -> None:
    """Outputs and all gradients of ``backend`` at ``dtype`` against the reference in float64, by the tolerance rule.

    Arguments as ``vlmops.profiling.gpu_check.parity.against_oracle`` has them, which `vlmops gpu-check` runs too.
    """
    for found in against_oracle(fn, args, kwargs, backend=backend, dtype=dtype, lowprec=lowprec):
        assert found.ok, str(found)


def opcheck(op: Any, args: tuple) -> None:
    """torch.library.opcheck on a raw op with explicit ``backend`` as its last argument."""
    torch.library.opcheck(
        op,
        args,
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"),
    )
