"""Which CUDA kernels the ops declare: what is compiled ahead of time, checked and counted (``<op>/cuda_budget.py``)."""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
from collections.abc import Callable, Iterator
from typing import Any

import vlmops.ops
from vlmops.backends import cuda_runtime
from vlmops.backends.cuda_runtime import Plan

__all__ = ["cases", "default_plans", "ops_with_kernels", "plans"]

ROWS = 4096


def ops_with_kernels() -> list[str]:
    """Names of the ops that have a cuda_budget module."""
    return sorted(
        m.name for m in pkgutil.iter_modules(vlmops.ops.__path__)
        if m.ispkg and importlib.util.find_spec(f"vlmops.ops.{m.name}.cuda_budget") is not None
    )  # fmt: skip


def cases(op: str) -> Iterator[tuple[str, Callable[[str, int], Any]]]:
    """(label, run) of an op; ``run(device, rows)`` calls its launch code."""
    found: Iterator[tuple[str, Callable[[str, int], Any]]] = importlib.import_module(
        f"vlmops.ops.{op}.cuda_budget"
    ).cases()
    return found


def plans(op: str, arch: str, only: str | None = None) -> list[Plan]:
    """What an op's cases would launch on a GPU: each kernel once, with the most shared memory.

    Args:
        op: name of the op.
        arch: one of ``cuda_runtime.TARGETS``, e.g. "sm_80".
        only: take the cases whose label contains this.
    """
    with cuda_runtime.record(cuda_runtime.TARGETS[arch]) as recorded:
        for label, run in cases(op):
            if not only or only in label:
                run("meta", ROWS)
    kernels = {plan.name: plan for plan in sorted(recorded, key=lambda p: p.shared)}
    return [p for p in kernels.values() if p.arch == "sm80" or p.arch.replace("sm", "sm_") == arch]


def default_plans() -> list[Plan]:
    """Every op's declared kernels: what a library built ahead of time holds (``cuda_library.build_default``)."""
    found = {p.name: p for op in ops_with_kernels() for arch in cuda_runtime.TARGETS for p in plans(op, arch)}
    return [p for p in found.values() if p.arch == "sm80"]
