"""One piece of work, done in this process: a parity case, the peaks, a load to time. Never raises."""

from __future__ import annotations

import contextlib
import importlib.util
import math
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import torch
from torch import Tensor

from vlmops.backends import BackendError, choice, triton_runtime
from vlmops.ops._shared.registry import OPS
from vlmops.profiling.gpu_check import cases, parity

__all__ = ["DTYPES", "Reason", "Result", "Task", "execute"]

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
#: Device memory a parity case may need over the bytes of its arguments: the float64 oracle, its graph and its gradients.
ORACLE_FACTOR, ORACLE_FLOOR = 64, 512 << 20


class Reason(str, Enum):
    """Why something did not pass."""

    NONE = ""
    WRONG = "wrong"  # an output or a gradient out of tolerance, other bits the second time or from a graph
    EXCEPTION = "exception"
    CRASHED = "crashed"  # the process died
    TIMEOUT = "timeout"  # killed after its limit
    UNSUPPORTED = "unsupported"  # the backend says it cannot run these arguments
    NO_BACKEND = "no backend"  # the op has no such backend
    MEMORY = "memory"
    BUDGET = "budget"  # no time left


SKIPS = (Reason.UNSUPPORTED, Reason.NO_BACKEND, Reason.MEMORY, Reason.BUDGET)


@dataclass(frozen=True)
class Task:
    """What to do.

    Args:
        kind: "parity", "peaks", "warm" (compile what a load needs) or "timing".
        case: name of a case or a load.
        op: its op.
        dtype: a name of ``DTYPES``.
        backend: of a parity case.
        device: "cuda" or "cpu".
        tiny: the interpreter's sizes.
        seconds: how long timing may take; also scales the limit after which it is killed.
        tune: measure the configurations of a kernel instead of taking the default.
        peaks: measured limits, for the shares of a timing.
    """

    kind: str
    case: str = ""
    op: str = ""
    dtype: str = ""
    backend: str = ""
    device: str = "cuda"
    tiny: bool = False
    seconds: float = 2.0
    tune: bool = False
    peaks: Any = None


@dataclass
class Result:
    """What came out.

    Args:
        task: of what.
        status: "passed", "failed" or "skipped".
        reason: why not passed.
        note: in words.
        checks: check -> "ok" or what is wrong.
        error_over_bound: the worst tensor's error as a share of what it may be.
        rows: timings, plain data.
        value: what else a task returns (peaks).
        seconds: it took.
        poisoned: the device faulted: this process can do no more.
    """

    task: Task
    status: str = "passed"
    reason: Reason = Reason.NONE
    note: str = ""
    checks: dict[str, str] = field(default_factory=dict)
    error_over_bound: float | None = None
    rows: list[dict[str, Any]] = field(default_factory=list)
    value: Any = None
    seconds: float = 0.0
    poisoned: bool = False

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        task = self.task
        worst = self.error_over_bound
        return {
            "op": task.op, "case": task.case.removeprefix(f"{task.op}: "), "backend": task.backend, "dtype": task.dtype,
            "status": self.status, "reason": self.reason.value, "note": self.note, "checks": self.checks,
            "error_over_bound": worst if worst is None or math.isfinite(worst) else None, "seconds": round(self.seconds, 3),
        }  # fmt: skip


def missed(task: Task, reason: Reason, note: str) -> Result:
    """A result without a pass: a skip, or a failure."""
    return Result(task, "skipped" if reason in SKIPS else "failed", reason, note)


def execute(task: Task) -> Result:
    """Do it; whatever happens is in the result."""
    begin = time.perf_counter()
    try:
        with _surroundings(task):
            result = _KINDS[task.kind](task)
    except torch.OutOfMemoryError as err:
        result = missed(task, Reason.MEMORY, first_line(err))
    except Exception as err:
        result = missed(task, Reason.EXCEPTION, f"{type(err).__name__}: {first_line(err)}")
        result.poisoned = _faulted(err)
    if task.device == "cuda" and not result.poisoned and task.kind != "parity":
        with contextlib.suppress(Exception):
            torch.cuda.empty_cache()
    result.seconds = time.perf_counter() - begin
    return result


@contextlib.contextmanager
def _surroundings(task: Task) -> Iterator[None]:
    """Tuning on or off, float32 products in float32; the user's settings afterwards."""
    changed = {"VLMOPS_TUNING": "on" if task.tune else "off"}
    with contextlib.ExitStack() as stack:
        if task.kind == "warm":  # several processes share the GPU: what they measure must not be remembered
            changed["VLMOPS_CACHE_DIR"] = stack.enter_context(tempfile.TemporaryDirectory())
        before = {name: os.environ.get(name) for name in changed}
        precision = torch.get_float32_matmul_precision()
        try:
            os.environ.update(changed)
            torch.set_float32_matmul_precision("highest")
            if task.kind == "warm":
                choice.forget()
            yield
        finally:
            torch.set_float32_matmul_precision(precision)
            for name, value in before.items():
                if value is None:
                    os.environ.pop(name, None)
                else:
                    os.environ[name] = value
            if task.kind == "warm":
                choice.forget()


def first_line(err: BaseException) -> str:
    text = str(err).strip()
    return (text.splitlines()[0] if text else type(err).__name__)[:400]


def _faulted(err: BaseException) -> bool:
    """An error after which a CUDA context answers nothing but that error."""
    return "CUDA error" in str(err) or isinstance(err, getattr(torch, "AcceleratorError", ()))


def argument_bytes(args: Any) -> int:
    found = 0

    def add(x: Tensor) -> Tensor:
        nonlocal found
        found += x.numel() * x.element_size()
        return x

    parity.map_tensors(args, add)
    return found


def no_room(device: torch.device, needed: int) -> str:
    """Why this many bytes do not fit now; empty if they do."""
    if device.type != "cuda":
        return ""
    free, _ = torch.cuda.mem_get_info(device)
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if needed <= 0.9 * (free + cached):
        return ""
    return f"needs about {needed / 2**30:.1f} GiB, {(free + cached) / 2**30:.1f} GiB are free"


# -- parity ------------------------------------------------------------------------------------------------------------


def _check(task: Task) -> Result:
    """The oracle, the same bits twice, and on a GPU the same bits from a graph."""
    case, device, dtype = cases.find(task.case), torch.device(task.device), DTYPES[task.dtype]
    if task.backend not in OPS[case.op].backends:
        return missed(task, Reason.NO_BACKEND, f"{case.op} has no backend {task.backend!r}")
    if device.type == "cpu" and task.backend == "triton" and dtype not in triton_runtime.INTERPRETED:
        return missed(task, Reason.UNSUPPORTED, f"Triton's interpreter computes {task.dtype} wrongly")
    args, kwargs = parity.place(case.arguments(task.tiny), device, dtype)
    short = no_room(device, ORACLE_FLOOR + ORACLE_FACTOR * argument_bytes((args, kwargs)))
    if short:
        return missed(task, Reason.MEMORY, short)
    result = Result(task)
    options: dict[str, Any] = {"backend": task.backend, "dtype": dtype}
    try:
        found = parity.against_oracle(case.call, args, kwargs, **options)
    except BackendError as err:
        return missed(task, Reason.UNSUPPORTED, first_line(err))
    result.error_over_bound = max(
        (j.error / j.bound if j.bound else float(not j.ok) * math.inf for j in found), default=0.0
    )
    result.checks["oracle"] = "; ".join(str(j) for j in found if not j.ok) or "ok"
    more: dict[str, Callable[..., str | None]] = {}
    kernels = (
        task.backend != "torch"
    )  # SDPA's gradients use atomics, and its split by sequence reads the lengths on the host
    # The interpreter runs one program after the other: it can hardly differ, and asking takes three times the case.
    if kernels and case.same_bits and (device.type == "cuda" or (case.core and task.dtype == "fp32")):
        more["same bits twice"] = parity.same_bits
    if kernels and device.type == "cuda" and case.captured:
        more["CUDA graph"] = parity.graph_equals_eager
    for name, check in more.items():
        try:
            result.checks[name] = check(case.call, args, kwargs, **options) or "ok"
        except Exception as err:
            result.checks[name] = f"{type(err).__name__}: {first_line(err)}"
            result.poisoned = result.poisoned or _faulted(err)
            if result.poisoned:
                break
    wrong = [f"{name}: {text}" for name, text in result.checks.items() if text != "ok"]
    if wrong:
        result.status, result.reason, result.note = "failed", Reason.WRONG, " | ".join(wrong)
    return result


# -- timing ------------------------------------------------------------------------------------------------------------


def _peaks(task: Task) -> Result:
    from vlmops.profiling.gpu_check import peak
    from vlmops.profiling.gpu_check.timing import CudaClock

    device = torch.device(task.device)
    free, _ = torch.cuda.mem_get_info(device)
    size = min(peak.COPY_BYTES, free // 8)
    value = peak.measure(device, CudaClock(device), tuple(DTYPES.values()), copy_bytes=size)
    return Result(task, value=value)


def _warm(task: Task) -> Result:
    from vlmops.profiling.gpu_check.measure import warm

    return warm(task)


def _time(task: Task) -> Result:
    from vlmops.profiling.gpu_check.measure import timed
    from vlmops.profiling.gpu_check.timing import CudaClock

    return timed(task, CudaClock(torch.device(task.device)))


_KINDS: dict[str, Callable[[Task], Result]] = {"parity": _check, "peaks": _peaks, "warm": _warm, "timing": _time}


def backends_here(op: str, device: str) -> list[str]:
    """Backends of an op that this check is about, on a kind of device: GPU kernels, and torch's composition on a GPU."""
    wanted = ("torch", "triton", "cuda") if device == "cuda" else ("triton",)
    have = OPS[op].backends
    if device == "cuda" and importlib.util.find_spec("triton") is None:
        have = tuple(name for name in have if name != "triton")
    return [name for name in wanted if name in have]
