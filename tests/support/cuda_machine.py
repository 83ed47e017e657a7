"""CUDA kernels on the host SIMT machine: parity under every schedule, and counters, for the tests of every op."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import vlmops
from tests.support.ops import check_op
from vlmops.backends import build, cuda_simt

__all__ = ["DTYPES", "check_on_machine", "counted", "simt"]

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def simt(monkeypatch):
    """``use_backend("cuda")`` runs on the machine. Import it into a test module to use it there."""
    monkeypatch.setenv("VLMOPS_CUDA_EXECUTOR", "simt")
    reason = cuda_simt.why_not(torch.device("cpu"))
    if reason is not None:
        pytest.skip(f"the SIMT machine cannot be built: {reason}")


def check_on_machine(fn: Callable[..., Any], args: tuple, kwargs: dict, dtype: torch.dtype) -> None:
    """``check_op`` under the machine's three schedules; any report of the machine raises."""
    for name in cuda_simt.SCHEDULES:
        with cuda_simt.schedule(name, seed=3):
            check_op(fn, args, kwargs, backend="cuda", dtype=dtype)


@contextlib.contextmanager
def counted() -> Iterator[cuda_simt.Count]:
    """Backend "cuda" on the machine, with its counters. A build for AddressSanitizer has no hooks, which count: skipped there."""
    if build.sanitizers():
        pytest.skip("a sanitized build does not count accesses")
    with cuda_simt.count() as seen, vlmops.use_backend("cuda"):
        yield seen
