"""Running one op on two backends, with gradients, for the parity tests of every op."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

import vlmops
from tests.support.tolerance import assert_close_to_oracle

__all__ = ["check_op", "opcheck", "to_dtype"]


def to_dtype(args: Any, dtype: torch.dtype) -> Any:
    """Floating tensors of nested arguments in another dtype (new leaves that keep requires_grad); the rest as it is."""
    if isinstance(args, Tensor):
        return args.detach().to(dtype).requires_grad_(args.requires_grad) if args.is_floating_point() else args
    if isinstance(args, dict):
        return {k: to_dtype(v, dtype) for k, v in args.items()}
    if isinstance(args, (list, tuple)):
        return type(args)(to_dtype(v, dtype) for v in args)
    return args


def _leaves(args: Any) -> list[Tensor]:
    if isinstance(args, Tensor):
        return [args] if args.requires_grad else []
    values = args.values() if isinstance(args, dict) else args if isinstance(args, (list, tuple)) else []
    return [leaf for v in values for leaf in _leaves(v)]


def _run(fn: Callable[..., Any], args: Any, kwargs: Any, backend: str, grads: Sequence[Tensor] | None):
    with vlmops.use_backend(backend):
        out = fn(*args, **kwargs)
    outs = [o for o in (out if isinstance(out, (tuple, list)) else (out,)) if isinstance(o, Tensor)]
    leaves = _leaves((args, kwargs))
    if not leaves:
        return outs, []
    pairs = [(o, g.to(o.dtype)) for o, g in zip([o for o in outs if o.requires_grad], grads or [], strict=False)]
    found = torch.autograd.grad([o for o, _ in pairs], leaves, [g for _, g in pairs], allow_unused=True)
    return outs, [torch.zeros_like(x) if g is None else g for x, g in zip(leaves, found, strict=True)]


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

    Args:
        fn: public face of the op.
        args, kwargs: arguments; floating tensors are rounded to ``dtype`` first, so that both sides see the same
            numbers. Tensors with ``requires_grad`` get their gradients compared too.
        backend: what is tested.
        lowprec: backend that stands for torch's own error at this precision, or a function like ``fn`` in plain torch
            (needed where ``backend`` is "torch": compared with itself it could not fail).
    """
    args, kwargs = to_dtype(args, dtype), to_dtype(kwargs, dtype)
    args64, kwargs64 = to_dtype(args, torch.float64), to_dtype(kwargs, torch.float64)
    with vlmops.use_backend("reference"), torch.no_grad():
        probe = fn(*args64, **kwargs64)
    shapes = [o for o in (probe if isinstance(probe, (tuple, list)) else (probe,)) if isinstance(o, Tensor)]
    rng = torch.Generator().manual_seed(1)
    # Only finite outputs take part in the loss (an lse of -inf has no gradient).
    grads = [
        torch.randn(o.shape, generator=rng, dtype=torch.float64).to(dtype).double() * o.isfinite()
        for o in shapes
        if o.is_floating_point()
    ]
    oracle, oracle_grads = _run(fn, args64, kwargs64, "reference", grads)
    out, out_grads = _run(fn, args, kwargs, backend, grads)
    if lowprec == backend:  # measured against itself it could never fail
        low, low_grads = [None] * len(out), [None] * len(out_grads)
    elif isinstance(lowprec, str):
        low, low_grads = _run(fn, args, kwargs, lowprec, grads)
    else:
        low, low_grads = _run(lowprec, args, kwargs, "torch", grads)
    for i, (a, b, c) in enumerate(zip(out, low, oracle, strict=True)):
        assert b is None or a.dtype == b.dtype, f"output {i} is {a.dtype}, expected {b.dtype}"
        assert_close_to_oracle(a, b, c, f"output {i}", dtype) if a.is_floating_point() else torch.testing.assert_close(
            a, c
        )
    for i, (a, b, c) in enumerate(zip(out_grads, low_grads, oracle_grads, strict=True)):
        assert_close_to_oracle(a, b, c, f"gradient {i}", dtype)


def opcheck(op: Any, args: tuple) -> None:
    """torch.library.opcheck on a raw op with explicit ``backend`` as its last argument."""
    torch.library.opcheck(
        op,
        args,
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"),
    )
