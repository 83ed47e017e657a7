"""The whole check in order, within its time: peaks, parity, compiling, timing."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import torch

from vlmops.backends import triton_runtime
from vlmops.backends.machine import cpu_model
from vlmops.ops._shared.registry import OPS
from vlmops.profiling.gpu_check import cases, loads, workers
from vlmops.profiling.gpu_check.cases.case import Case
from vlmops.profiling.gpu_check.tasks import DTYPES, Reason, Result, Task, backends_here
from vlmops.profiling.gpu_check.workers import Report, run_here, run_in_processes
from vlmops.version import __version__

__all__ = ["Check", "Settings", "check", "machine", "parity_tasks", "timing_tasks"]

#: Wall-clock seconds of a run, and the share of them after which parity stops so that something is timed.
BUDGET_S, QUICK_BUDGET_S = 570.0, 110.0
PARITY_SHARE = 0.6
WORKERS = 8
FEW = 40  # tasks of the interpreter that are not worth a process, which takes seconds to start
WORKER_BYTES = 3 << 30  # of device memory: a context, and the float64 oracle of a case
TIMING_S, QUICK_TIMING_S = 1.5, 0.4


@dataclass(frozen=True)
class Settings:
    """How a run was asked for.

    Args:
        device: "cuda" or "cpu".
        quick: fewer dtypes and shapes, default configurations, under two minutes.
        ops: names; empty: all.
        budget: seconds; 0: by ``quick``.
    """

    device: str = "cuda"
    quick: bool = False
    ops: tuple[str, ...] = ()
    budget: float = 0.0

    @property
    def seconds(self) -> float:
        """Wall-clock seconds the run may take."""
        return self.budget or (QUICK_BUDGET_S if self.quick else BUDGET_S)


class Progress(Protocol):
    """What a run tells about how far it is."""

    def phase(self, name: str, tasks: int) -> None: ...

    def done(self, result: Result) -> None: ...


@dataclass
class Check:
    """Everything found.

    Args:
        machine, settings: plain data.
        peaks: ``Peaks.as_dict()``, or None.
        parity, timings: results, in the order they came.
        seconds: the run took.
    """

    machine: dict[str, Any]
    settings: Settings
    peaks: dict[str, Any] | None = None
    parity: list[Result] = field(default_factory=list)
    timings: list[Result] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def failed(self) -> list[Result]:
        """Results that say a kernel is wrong, died or hung; a timing that could not be made for other reasons is none."""
        wrong = (Reason.WRONG, Reason.CRASHED, Reason.TIMEOUT)
        return [r for r in self.parity if r.status == "failed"] + [r for r in self.timings if r.reason in wrong]

    @property
    def passed(self) -> int:
        """Parity cases that passed."""
        return sum(r.status == "passed" for r in self.parity)

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "format": 1, "machine": self.machine, "settings": {**asdict(self.settings), "budget": self.settings.seconds},
            "seconds": round(self.seconds, 1), "peaks": self.peaks, "parity": [r.as_dict() for r in self.parity],
            "timings": [
                {"rows": r.rows, **r.as_dict()} for r in self.timings
            ],
            "passed": self.passed, "failed": len(self.failed), "skipped": sum(r.status == "skipped" for r in self.parity),
        }  # fmt: skip


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _smi() -> dict[str, str]:
    """Driver, clocks and power limit of the first GPU as nvidia-smi tells; empty without it."""
    names = ("driver_version", "clocks.max.sm", "clocks.max.mem", "power.limit")
    if shutil.which("nvidia-smi") is None:
        return {}
    try:
        done = subprocess.run(
            ["nvidia-smi", f"--query-gpu={','.join(names)}", "--format=csv,noheader"],
            capture_output=True, text=True, timeout=10,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return {}
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        return {}
    return dict(zip(names, (part.strip() for part in lines[0].split(",")), strict=False))


def machine(device: str) -> dict[str, Any]:
    """What the run was made on."""
    facts: dict[str, Any] = {
        "vlmops": __version__, "torch": torch.__version__, "triton": _version("triton"), "python": platform.python_version(),
        "platform": platform.platform(), "cpu": cpu_model(), "cores": os.cpu_count(), "device": device,
        "flash_attn": _version("flash_attn"), "liger_kernel": _version("liger_kernel"),
    }  # fmt: skip
    if device == "cuda":
        p = torch.cuda.get_device_properties(0)
        facts.update(
            gpu=p.name, capability=f"{p.major}.{p.minor}", processors=p.multi_processor_count,
            memory_gib=round(p.total_memory / 2**30, 1), l2_mib=round(getattr(p, "L2_cache_size", 0) / 2**20, 1),
            cuda=torch.version.cuda or torch.version.hip, **_smi(),
        )  # fmt: skip
    return facts


# -- what to do, the most important first ------------------------------------------------------------------------------


def parity_tasks(settings: Settings, among: Sequence[Case] | None = None, dtypes: Sequence[str] = ()) -> list[Task]:
    """One task a case, backend and dtype: core cases of every op first, then the rest dtype by dtype."""
    table = [c for c in (cases.all_cases() if among is None else among) if not settings.ops or c.op in settings.ops]
    tiny = settings.device == "cpu"
    order = list(dtypes) or ["bf16", "fp32", "fp16"]
    if tiny and not dtypes:  # what Triton's interpreter computes rightly
        order = [name for name in ("fp32", "fp16", "bf16") if DTYPES[name] in triton_runtime.INTERPRETED]
    rest = order[:1] if settings.quick else order
    wanted = [(c, d) for d in order for c in table if c.core] + [(c, d) for d in rest for c in table if not c.core]
    return [
        Task("parity", case.name, case.op, dtype, backend, settings.device, tiny)
        for case, dtype in wanted
        for backend in backends_here(case.op, settings.device) or ["triton"]
    ]


def timing_tasks(settings: Settings, kind: str, peaks: Any = None) -> list[Task]:
    """One task a load and dtype ("warm" or "timing"): those of a quick run first."""
    seconds = QUICK_TIMING_S if settings.quick else TIMING_S
    chosen = [load for load in loads.LOADS if not settings.ops or load.op in settings.ops]
    order = [load for load in chosen if load.quick] + [load for load in chosen if not load.quick and not settings.quick]
    most = 1 if settings.quick else None
    return [
        Task(kind, load.name, load.op, dtype, "", settings.device, False, seconds, not settings.quick, peaks)
        for load in order
        for dtype in load.dtypes[:most]
    ]


def _worker_count(device: str) -> int:
    cores = os.cpu_count() or 1
    if device == "cpu":
        return min(WORKERS, cores)
    return max(1, min(WORKERS, cores - 1, torch.cuda.mem_get_info()[0] // WORKER_BYTES))


def check(settings: Settings, progress: Progress, run_tasks: Callable[..., None] | None = None) -> Check:
    """Run everything that is asked for and fits the time.

    Args:
        settings: what.
        progress: told about every result.
        run_tasks: ``run_tasks(tasks, report, deadline, count)``; None: processes, or this one for a few interpreted cases.
    """
    begin = time.monotonic()
    deadline = begin + settings.seconds
    found = Check(machine(settings.device), settings)

    def phase(name: str, tasks: list[Task], into: Callable[[Result], None], until: float, count: int) -> None:
        if not tasks:
            return
        progress.phase(name, len(tasks))

        def report(result: Result) -> None:
            into(result)
            progress.done(result)

        few = settings.device == "cpu" and len(tasks) < FEW
        (run_tasks or (_here if few else _in_processes))(tasks, report, until, count)

    peaks: list[Result] = []
    if settings.device == "cuda":
        phase("measured peak", [Task("peaks", device="cuda")], peaks.append, deadline, 1)
        if peaks and peaks[0].value is not None:
            found.peaks = peaks[0].value.as_dict()
    timed = settings.device == "cuda"
    until = begin + settings.seconds * (PARITY_SHARE if timed else 1.0)
    phase("parity", parity_tasks(settings), found.parity.append, until, _worker_count(settings.device))
    if timed:
        if not settings.quick:
            left = deadline - time.monotonic()
            warm = timing_tasks(settings, "warm")
            phase("compiling for timing", warm, lambda _: None, time.monotonic() + left / 2, _worker_count("cuda"))
        value = peaks[0].value if peaks else None
        phase("timing", timing_tasks(settings, "timing", value), found.timings.append, deadline, 1)
    found.seconds = time.monotonic() - begin
    return found


def _here(tasks: Sequence[Task], report: Report, deadline: float, count: int) -> None:
    run_here(tasks, report, deadline)


def _in_processes(tasks: Sequence[Task], report: Report, deadline: float, count: int) -> None:
    run_in_processes(tasks, report, deadline, count=count, limit=workers.LIMIT_S)


def known_ops() -> tuple[str, ...]:
    """Names that ``--op`` takes."""
    return tuple(sorted(OPS))
