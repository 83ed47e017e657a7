"""Tasks in processes of their own: a kernel that faults or hangs costs its process, and the rest goes on.

After a fault a CUDA context answers every call with that fault. So each worker holds a context, is replaced after one, is killed
past a task's limit, and everything is killed when the time is up.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any

import torch

from vlmops.profiling.gpu_check.tasks import Reason, Result, Task, execute, missed

__all__ = ["LIMIT_S", "run_here", "run_in_processes"]

LIMIT_S = 120.0  # of one task: Triton compiles some kernels for many seconds
START_S = 60.0  # more for a process that has to import torch and make a context first
Execute = Callable[[Task], Result]
Report = Callable[[Result], None]


def _serve(pipe: Connection, execute: Execute) -> None:
    """A worker's life: do what comes until nothing comes or the device has faulted."""
    torch.set_num_threads(1)  # the processes share the cores
    while True:
        try:
            task = pipe.recv()
        except EOFError:
            break
        if task is None:
            break
        result = execute(task)
        pipe.send(result)
        if result.poisoned:
            break
    os._exit(0)  # tearing down a faulted context in order may hang, and nothing is left to be written


@dataclass
class _Worker:
    process: Any
    pipe: Connection
    task: Task | None = None
    until: float = 0.0
    used: bool = False


def _started(execute: Execute, method: str) -> _Worker:
    context: Any = multiprocessing.get_context(method)
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs, execute), daemon=True)
    process.start()
    theirs.close()
    return _Worker(process, ours)


def _ended(worker: _Worker, *, kill: bool) -> None:
    if kill:
        worker.process.kill()
    else:
        try:
            worker.pipe.send(None)
        except OSError:
            worker.process.kill()
    worker.process.join(5)
    if worker.process.is_alive():
        worker.process.kill()
        worker.process.join(5)
    worker.pipe.close()


def run_here(tasks: Iterable[Task], report: Report, deadline: float, execute: Execute = execute) -> None:
    """One after the other in this process, until the deadline (``time.monotonic``)."""
    for task in tasks:
        if time.monotonic() >= deadline:
            report(missed(task, Reason.BUDGET, "no time left"))
        else:
            report(execute(task))


def run_in_processes(
    tasks: Iterable[Task], report: Report, deadline: float, *, count: int, execute: Execute = execute,
    limit: float = LIMIT_S, start: float = START_S, method: str = "spawn",
) -> None:  # fmt: skip
    """Every task in one of ``count`` processes; exactly one result each.

    Args:
        tasks: in order of importance.
        report: gets each result as soon as it is there.
        deadline: ``time.monotonic()`` at which what runs is killed and what waits is given up.
        count: processes.
        execute: a function of a module (it is sent by name).
        limit: seconds of one task.
        start: seconds more for the first task of a process.
        method: how they start; a CUDA context does not survive a fork.
    """
    waiting, workers = deque(tasks), [_started(execute, method) for _ in range(max(1, count))]
    try:
        while waiting or any(w.task for w in workers):
            now = time.monotonic()
            if now >= deadline:
                break
            for i, worker in enumerate(workers):
                if worker.task is None and waiting:
                    worker.task = waiting.popleft()
                    worker.until = now + limit + (0.0 if worker.used else start)
                    worker.used = True
                    try:
                        worker.pipe.send(worker.task)
                    except OSError:  # it died while idle
                        waiting.appendleft(worker.task)
                        _ended(worker, kill=True)
                        workers[i] = _started(execute, method)
            busy = [w for w in workers if w.task]
            until = min([deadline, *(w.until for w in busy)])
            ready = wait([w.pipe for w in busy], timeout=max(0.0, until - time.monotonic()))
            for i, worker in enumerate(workers):
                if worker.task is None:
                    continue
                result = None
                if worker.pipe in ready:
                    try:
                        result = worker.pipe.recv()
                    except (EOFError, OSError):
                        worker.process.join(5)
                        result = missed(
                            worker.task, Reason.CRASHED, f"its process ended ({_fate(worker.process.exitcode)})"
                        )
                        result.poisoned = True
                elif time.monotonic() >= worker.until and worker.until < deadline:
                    result = missed(worker.task, Reason.TIMEOUT, f"killed after {limit:.0f} s")
                    result.poisoned = True
                if result is None:
                    continue
                worker.task = None
                report(result)
                if result.poisoned:
                    _ended(worker, kill=True)
                    workers[i] = _started(execute, method)
    finally:
        for worker in workers:
            _ended(worker, kill=worker.task is not None)
    for task in [*(w.task for w in workers if w.task), *waiting]:
        report(missed(task, Reason.BUDGET, "no time left"))


def _fate(code: int | None) -> str:
    return f"signal {-code}" if code is not None and code < 0 else f"exit code {code}"
