"""The work of a call by the cost functions of the ops it runs: one roofline for benchmarks, reports and tests."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Sequence
from typing import Any

import torch

from vlmops.ops._shared.cost import Cost
from vlmops.profiling.recorder import OpRecorder
from vlmops.profiling.timing import Work

__all__ = ["attention_flops", "cost_of", "stated", "work_of"]


def stated(op: str) -> Callable[..., Cost] | None:
    """``cost`` of ``vlmops/ops/<op>/cost.py``; None where the op states none."""
    if importlib.util.find_spec(f"vlmops.ops.{op}.cost") is None:
        return None
    found: Callable[..., Cost] = importlib.import_module(f"vlmops.ops.{op}.cost").cost
    return found


def cost_of(run: Callable[[], Any]) -> Cost | None:
    """Least bytes and FLOPs of the ops that one call runs, forward; None if one of them states no cost, or none runs.

    The call is made once. Costs read cu_seqlens on the host: not for a hot path.
    """
    with OpRecorder() as seen, torch.no_grad():
        run()
    total = None
    for func, args in seen.calls:
        cost = stated(func._schema.name.split("::")[1])
        if cost is None:
            return None
        one = cost(*args[:-1])  # without the backend
        total = one if total is None else total + one
    return total


def work_of(run: Callable[[], Any]) -> Work:
    """``cost_of`` for the timing functions; nothing where no cost is stated."""
    cost = cost_of(run)
    return Work() if cost is None else Work(float(cost.flops), float(cost.bytes))


def attention_flops(lengths: Sequence[int], heads: int, head_dim: int) -> int:
    """FLOPs of bidirectional attention inside sequences of these lengths, by ``varlen_attention``'s own cost."""
    from vlmops.ops.varlen_attention.cost import cost

    q = torch.empty(sum(lengths), heads, head_dim, device="meta")
    borders = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    return cost(
        q, q, q, borders, borders, -1, -1, 1.0, False, -1, -1, None, 0.0, None, None, None, None, False
    ).flops  # fmt: skip
