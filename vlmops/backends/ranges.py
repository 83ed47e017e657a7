"""Named ranges around stages, modules and ops: NVTX for Nsight, ``record_function`` for torch.profiler.

    with ranges.recording():
        with ranges.stage("prefill"):
            model(...)

A range is called by its kind and name, with what it works on behind: "stage: prefill", "module: visual.blocks.0 (Block)",
"op: mlp cpu | 1024x1280 bf16, ...". Off, an op pays for one look at ``ACTIVE``.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

__all__ = ["ACTIVE", "COLOURS", "DOMAIN", "Ranges", "describe", "installed", "recording", "stage"]

DOMAIN = "vlmops"
#: Kind of a range -> its colour in Nsight Systems.
COLOURS = {"stage": "orange", "module": "green", "op": "blue", "kernel": "purple"}
SEPARATOR = " | "
SHORT = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.float64: "fp64"}


@lru_cache(maxsize=1)
def installed() -> Any:
    """The ``nvtx`` package, or None."""
    try:
        return importlib.import_module("nvtx")
    except ImportError:
        return None


def describe(args: Sequence[Any]) -> str:
    """Shapes and dtypes of the tensors among an op's arguments: "1024x1280 bf16, 5 int32"."""
    found = []
    for x in args:
        if isinstance(x, Tensor):
            found.append(f"{'x'.join(map(str, x.shape)) or 'scalar'} {SHORT.get(x.dtype, str(x.dtype)[6:])}")
    return ", ".join(found)


class Ranges:
    """What opens ranges while ``recording``.

    Args:
        nvtx: the ``nvtx`` package; None: no NVTX.
        record: whether torch.profiler sees the ranges as well.
    """

    def __init__(self, nvtx: Any, record: bool) -> None:
        self.nvtx, self.record = nvtx, record

    @contextlib.contextmanager
    def range(self, kind: str, name: str, detail: str = "") -> Iterator[None]:
        """A range of a kind of ``COLOURS``; nested ranges close before it."""
        message = f"{kind}: {name}{SEPARATOR if detail else ''}{detail}"
        with contextlib.ExitStack() as stack:
            if self.nvtx is not None:
                options = dict(color=COLOURS[kind], domain=DOMAIN, category=kind)
                stack.enter_context(self.nvtx.annotate(message, **options))
            if self.record:
                stack.enter_context(torch.profiler.record_function(message))
            yield


#: Who records now; None: nobody. Ops look at it in every call.
ACTIVE: Ranges | None = None


@contextlib.contextmanager
def recording(nvtx: bool | None = None, record: bool = True) -> Iterator[Ranges]:
    """Ranges inside the block, of all threads.

    Args:
        nvtx: whether NVTX gets them; None: where the package is installed.
        record: whether torch.profiler does.

    Raises:
        ImportError: ``nvtx=True`` and the package is not installed.
    """
    global ACTIVE
    package = installed() if nvtx is not False else None
    if nvtx and package is None:
        raise ImportError("nvtx: the package is not installed: pip install nvtx")
    before, ACTIVE = ACTIVE, Ranges(package, record)
    try:
        yield ACTIVE
    finally:
        ACTIVE = before


def stage(name: str) -> contextlib.AbstractContextManager[None]:
    """A range of a stage ("preprocess", "vision", "connector", "prefill", "decode") where ranges are recorded, else nothing."""
    return contextlib.nullcontext() if ACTIVE is None else ACTIVE.range("stage", name)
