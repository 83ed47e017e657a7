"""One op on one backend against the float64 oracle: outputs, gradients, the same bits twice, the same bits from a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

import vlmops
from vlmops.profiling.tolerance import Judgement, judge

__all__ = ["against_oracle", "graph_equals_eager", "place", "same_bits", "to_dtype"]

Call = Callable[..., Any]
#: What a case's dtype stands for; 8-bit floats are data of their own format and stay.
_WIDE = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def map_tensors(args: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(args, Tensor):
        return change(args)
    if isinstance(args, dict):
        return {k: map_tensors(v, change) for k, v in args.items()}
    if isinstance(args, (list, tuple)):
        return type(args)(map_tensors(v, change) for v in args)
    return args


def to_dtype(args: Any, dtype: torch.dtype) -> Any:
    """Floating tensors of nested arguments in another dtype (new leaves that keep requires_grad); the rest as it is."""
    return map_tensors(
        args,
        lambda x: x.detach().to(dtype).requires_grad_(x.requires_grad) if x.dtype in _WIDE else x,
    )


def place(args: Any, device: torch.device, dtype: torch.dtype) -> Any:
    """``to_dtype`` on another device, with the strides as they are: a view of a wider tensor stays one."""
    if isinstance(args, dict):
        return {k: place(v, device, dtype) for k, v in args.items()}
    if isinstance(args, (list, tuple)):
        return type(args)(place(v, device, dtype) for v in args)
    if isinstance(args, Tensor):
        return _placed(args, device, dtype if args.dtype in _WIDE else args.dtype)
    return args.to(device) if hasattr(args, "to") else args  # a quantised weight keeps its format


def _placed(x: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    inner = x.detach()
    if x.is_contiguous() or x.numel() == 0:
        return inner.to(device, dtype).requires_grad_(x.requires_grad)
    span = sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True)) + 1
    buffer = torch.as_strided(inner, (span,), (1,)).to(device, dtype)
    return torch.as_strided(buffer, x.shape, x.stride()).requires_grad_(x.requires_grad)


def leaves(args: Any) -> list[Tensor]:
    """Tensors of nested arguments that want a gradient."""
    found: list[Tensor] = []
    map_tensors(args, lambda x: found.append(x) or x if x.requires_grad else x)  # type: ignore[func-returns-value]
    return found


def tensors(out: Any) -> list[Tensor]:
    """The tensors of an output, a tuple or one."""
    return [o for o in (out if isinstance(out, (tuple, list)) else (out,)) if isinstance(o, Tensor)]


def run(
    fn: Call, args: Any, kwargs: Any, backend: str, grads: Sequence[Tensor] | None
) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs of ``fn`` on a backend, and the gradients of every tensor that wants one (zeros where there is none).

    Args:
        grads: float64 gradients of the outputs, in their order.
    """
    with vlmops.use_backend(backend):
        outs = tensors(fn(*args, **kwargs))
    wanted = leaves((args, kwargs))
    if not wanted:
        return outs, []
    pairs = [(o, g.to(o.dtype)) for o, g in zip([o for o in outs if o.requires_grad], grads or [], strict=False)]
    found = torch.autograd.grad([o for o, _ in pairs], wanted, [g for _, g in pairs], allow_unused=True)
    return outs, [torch.zeros_like(x) if g is None else g for x, g in zip(wanted, found, strict=True)]


def output_gradients(outs: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Seeded float64 gradients of outputs, rounded to ``dtype``: 0 where an output is not finite (an lse of -inf)."""
    rng = torch.Generator().manual_seed(1)
    return [
        torch.randn(o.shape, generator=rng, dtype=torch.float64).to(dtype).double().to(o.device) * o.isfinite()
        for o in outs
        if o.is_floating_point()
    ]


def against_oracle(
    fn: Call, args: Any, kwargs: Any, *, backend: str, dtype: torch.dtype, lowprec: str | Call = "torch"
) -> list[Judgement]:
    """Every output and gradient of ``backend`` at ``dtype`` against the reference in float64, by the tolerance rule.

    Args:
        fn: public face of the op.
        args, kwargs: arguments; floating tensors are rounded to ``dtype`` first, so that both sides see the same
            numbers. Tensors with ``requires_grad`` get their gradients compared too.
        backend: what is judged.
        lowprec: backend that stands for torch's own error at this precision, or a function like ``fn`` in plain torch
            (needed where ``backend`` is "torch": compared with itself it could not fail, so a fixed bound holds).
    """
    args, kwargs = to_dtype(args, dtype), to_dtype(kwargs, dtype)
    args64, kwargs64 = to_dtype(args, torch.float64), to_dtype(kwargs, torch.float64)
    with vlmops.use_backend("reference"), torch.no_grad():
        grads = output_gradients(tensors(fn(*args64, **kwargs64)), dtype)
    oracle, oracle_grads = run(fn, args64, kwargs64, "reference", grads)
    out, out_grads = run(fn, args, kwargs, backend, grads)
    low: Sequence[Tensor | None]
    low_grads: Sequence[Tensor | None]
    if lowprec == backend:
        low, low_grads = [None] * len(out), [None] * len(out_grads)
    elif isinstance(lowprec, str):
        low, low_grads = run(fn, args, kwargs, lowprec, grads)
    else:
        low, low_grads = run(lowprec, args, kwargs, "torch", grads)
    found = []
    for i, (a, b, c) in enumerate(zip(out, low, oracle, strict=True)):
        what = f"output {i}"
        if b is not None and a.dtype != b.dtype:
            found.append(_wrong(what, f"it is {a.dtype}, expected {b.dtype}"))
        elif a.is_floating_point():
            found.append(judge(a, b, c, what, dtype))
        else:
            same = torch.equal(a, c)
            found.append(Judgement(what, 0.0, 0.0, 0.0, 1.0) if same else _wrong(what, "values differ"))
    for i, (a, b, c) in enumerate(zip(out_grads, low_grads, oracle_grads, strict=True)):
        found.append(judge(a, b, c, f"gradient {i}", dtype))
    return found


def _wrong(what: str, note: str) -> Judgement:
    return Judgement(what, float("inf"), 0.0, 0.0, 1.0, note)


def _bits_differ(first: Sequence[Tensor], second: Sequence[Tensor]) -> str | None:
    """Which tensor differs, in words; NaN equals NaN."""
    for i, (a, b) in enumerate(zip(first, second, strict=True)):
        differing = int(((a != b) & ~(a.isnan() & b.isnan())).sum())
        if differing:
            return f"tensor {i}: {differing} of {a.numel()} values differ"
    return None


def _results(fn: Call, args: Any, kwargs: Any, backend: str, grads: Sequence[Tensor]) -> list[Tensor]:
    outs, found = run(fn, args, kwargs, backend, grads)
    return [*(o.detach().clone() for o in outs), *(g.clone() for g in found)]


def same_bits(fn: Call, args: Any, kwargs: Any, *, backend: str, dtype: torch.dtype) -> str | None:
    """What differs between two runs, outputs and gradients, bit by bit; None if nothing does."""
    args, kwargs = to_dtype(args, dtype), to_dtype(kwargs, dtype)
    with vlmops.use_backend(backend), torch.no_grad():
        grads = output_gradients(tensors(fn(*args, **kwargs)), dtype)
    first = _results(fn, args, kwargs, backend, grads)
    return _bits_differ(first, _results(fn, args, kwargs, backend, grads))


def graph_equals_eager(fn: Call, args: Any, kwargs: Any, *, backend: str, dtype: torch.dtype) -> str | None:
    """What differs between an eager call and the replay of its CUDA graph on other values; None if nothing does.

    Forward and backward are captured. The floating arguments are halved between capture and replay, so that a replay
    which did nothing, or read something that was copied at capture, shows.
    """
    args, kwargs = to_dtype(args, dtype), to_dtype(kwargs, dtype)
    with vlmops.use_backend(backend), torch.no_grad():
        grads = output_gradients(tensors(fn(*args, **kwargs)), dtype)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # compiles and fills the allocator's pools: no capture may do that
        for _ in range(2):
            run(fn, args, kwargs, backend, grads)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outs, found = run(fn, args, kwargs, backend, grads)
    with torch.no_grad():
        map_tensors((args, kwargs), lambda x: x.mul_(0.5) if x.dtype in _WIDE else x)
    graph.replay()
    torch.cuda.synchronize()
    replayed = [*(o.detach().clone() for o in outs), *(g.clone() for g in found)]
    return _bits_differ(replayed, _results(fn, args, kwargs, backend, grads))
