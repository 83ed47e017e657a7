"""What the tests of `vlmops gpu-check` share: tasks, a clock the calls move, broken kernels, a pretended machine."""

from __future__ import annotations

import functools

from vlmops.profiling.gpu_check import loads, measure, run, timing
from vlmops.profiling.gpu_check.peak import Peaks
from vlmops.profiling.gpu_check.tasks import Result, Task

PLAIN = "norms: rms_norm, plain"
LONG = 60.0


def parity_task(case=PLAIN, dtype="fp32", **options):
    return Task("parity", case, case.split(":")[0], dtype, "triton", "cpu", True, **options)


class FakeClock:
    """A clock that the calls themselves move."""

    def __init__(self):
        self.time, self.host, self.order = 1.0, 0.0, []

    def now(self):
        self.host += 1e-4
        return self.time + self.host

    def synchronize(self):
        pass

    def seconds(self, call, host_seconds):
        begin = self.time
        call()
        return self.time - begin

    def taking(self, name, *seconds):
        """A call that takes these times in turn."""
        turns = iter(seconds * 1000)

        def call(*_args, **_kwargs):
            self.order.append(name)
            self.time += next(turns)

        return call


def broken_forward(change):
    from vlmops.ops.norms import triton as kernels

    right = kernels.forward
    return kernels, lambda *args: change(right(*args))


class Told:
    def __init__(self):
        self.phases, self.results = [], []

    def phase(self, name, count):
        self.phases.append(name)

    def done(self, result):
        self.results.append(result)


def pretended(monkeypatch, answer, settings=None):
    """``run.check`` on a machine that has a GPU, as far as the flow goes."""
    monkeypatch.setattr(
        run, "machine", lambda device: {"gpu": "Pretended <b>GPU</b> & Co", "device": device, "torch": "2"}
    )
    monkeypatch.setattr(run, "_worker_count", lambda device: 2)
    told, deadlines = Told(), []

    def go(work, report_one, deadline, count):
        deadlines.append(deadline)
        for task in work:
            report_one(answer(task))

    found = run.check(settings or run.Settings("cuda"), told, go)
    return found, told, deadlines


@functools.lru_cache(maxsize=1)
def twice_as_fast():
    clock = FakeClock()
    calls = {"vlmops triton": clock.taking("a", 1e-3), "SDPA flash": clock.taking("b", 2e-3)}
    return timing.interleave(calls, clock, seconds=1.0, least=1, most=1)


def answered(task):
    if task.kind == "peaks":
        return Result(task, value=Peaks(3e12, {"bf16": 8e14, "fp16": 8e14, "fp32": 5e13}))
    result = Result(task, checks={"oracle": "ok"}, error_over_bound=0.25)
    if task.kind == "timing":
        row = measure.describe(loads.find(task.case), task.dtype, "forward", *twice_as_fast(), None, task.peaks)
        result.rows = [
            {**row, "oracle": "reference, float64", "absent": {"flash-attn": "not <installed>"}, "tuned": True}
        ]
    return result


class FixedClock(FakeClock):
    """Every call takes 1 ms."""

    def seconds(self, call, host_seconds):
        call()
        return 1e-3


def timed(name, dtype="fp32", peaks=None):
    load = loads.find(name)
    task = Task("timing", name, load.op, dtype, device="cpu", tiny=True, seconds=0.0, peaks=peaks)
    return measure.timed(task, FixedClock())
