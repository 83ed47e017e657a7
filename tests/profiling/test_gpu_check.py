"""`vlmops gpu-check` without a GPU: parity in the interpreter, wrong kernels, faults, budget, timing by a fake clock, reports."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import html.parser
import json
import os
import re
import signal
import time
import types

import pytest
import torch
from typer.testing import CliRunner

from tests.support import triton_interpreter
from vlmops.cli import app
from vlmops.ops._shared.cost import Cost
from vlmops.ops.norms import OP as NORMS
from vlmops.profiling.gpu_check import cases, loads, measure, parity, peak, report, run, tasks, timing, workers
from vlmops.profiling.gpu_check.cases.case import Case
from vlmops.profiling.gpu_check.peak import Peaks
from vlmops.profiling.gpu_check.tasks import Reason, Result, Task

pytest.importorskip("triton")
triton_interpreter.install()

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


# -- parity ------------------------------------------------------------------------------------------------------------


#: One case an op: the rest runs in tests/ops, by the same functions.
FIRST = {case.op: case.name for case in reversed(cases.all_cases()) if case.core}


@pytest.mark.parametrize("op", sorted(FIRST))
def test_a_case_of_every_op_passes_in_the_interpreter(op):
    result = tasks.execute(parity_task(FIRST[op], "fp16" if op.endswith("attention") else "fp32"))
    if result.reason is Reason.NO_BACKEND:
        pytest.skip(result.note)
    assert result.status == "passed", result.note
    assert result.checks["oracle"] == "ok" and set(result.checks.values()) == {"ok"}
    assert 0 <= result.error_over_bound <= 1


def broken_forward(change):
    from vlmops.ops.norms import triton as kernels

    right = kernels.forward
    return kernels, lambda *args: change(right(*args))


def test_a_wrong_kernel_fails(monkeypatch):
    module, forward = broken_forward(lambda found: (found[0] * 1.01, found[1]))
    monkeypatch.setattr(module, "forward", forward)
    result = tasks.execute(parity_task())
    assert (result.status, result.reason) == ("failed", Reason.WRONG)
    assert "output 0: error" in result.note and result.error_over_bound > 1


def test_a_wrong_gradient_fails(monkeypatch):
    from vlmops.ops.norms import triton as kernels

    right = kernels.backward
    monkeypatch.setattr(kernels, "backward", lambda *args: [None if g is None else 1.1 * g for g in right(*args)])
    result = tasks.execute(parity_task())
    assert result.reason is Reason.WRONG and "gradient" in result.note and "output" not in result.note


def test_a_wrong_shape_and_a_nan_fail(monkeypatch):
    for change in (lambda f: (f[0][:-1], f[1]), lambda f: (f[0] / 0 * 0, f[1])):
        module, forward = broken_forward(change)
        with monkeypatch.context() as patch:
            patch.setattr(module, "forward", forward)
            assert tasks.execute(parity_task()).status == "failed"


def test_other_bits_the_second_time_fail(monkeypatch):
    calls = iter(range(1000))
    module, forward = broken_forward(lambda found: (found[0] + 1e-8 * next(calls), found[1]))
    monkeypatch.setattr(module, "forward", forward)
    result = tasks.execute(parity_task())
    assert result.checks["oracle"] == "ok" and "values differ" in result.checks["same bits twice"]
    assert result.status == "failed"


def test_an_exception_is_a_typed_result(monkeypatch):
    def fails(*args):
        raise RuntimeError("no such tile\nand a long trace")

    monkeypatch.setattr(NORMS.module("triton"), "forward", fails)
    result = tasks.execute(parity_task())
    assert (result.status, result.reason, result.note) == ("failed", Reason.EXCEPTION, "RuntimeError: no such tile")
    assert not result.poisoned

    def faults(*args):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(NORMS.module("triton"), "forward", faults)
    assert tasks.execute(parity_task()).poisoned


def test_no_memory_is_a_skip(monkeypatch):
    def full(*args):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(NORMS.module("triton"), "forward", full)
    assert tasks.execute(parity_task()).reason is Reason.MEMORY
    monkeypatch.undo()
    monkeypatch.setattr(tasks, "no_room", lambda device, needed: "needs about 9.0 GiB, 1.0 GiB are free")
    result = tasks.execute(parity_task())
    assert (result.status, result.reason) == ("skipped", Reason.MEMORY) and "9.0 GiB" in result.note


def test_room_is_asked_of_the_device(monkeypatch):
    gpu = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10 << 30, 80 << 30))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 3 << 30)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 1 << 30)
    assert tasks.no_room(gpu, 10 << 30) == ""
    assert tasks.no_room(gpu, 11 << 30) == "needs about 11.0 GiB, 12.0 GiB are free"
    assert tasks.no_room(torch.device("cpu"), 1 << 50) == ""


def test_what_cannot_run_is_a_skip(monkeypatch):
    monkeypatch.setattr(tasks.triton_runtime, "INTERPRETED", {torch.float32})
    result = tasks.execute(parity_task(dtype="bf16"))
    assert (result.status, result.reason) == ("skipped", Reason.UNSUPPORTED)
    result = tasks.execute(dataclasses.replace(parity_task(), backend="cuda"))
    assert result.reason in (Reason.NO_BACKEND, Reason.UNSUPPORTED) and result.status == "skipped"
    assert {t.dtype for t in run.parity_tasks(run.Settings("cpu"))} == {"fp32"}


def test_the_environment_is_as_before(monkeypatch):
    monkeypatch.setenv("VLMOPS_TUNING", "on")
    precision = torch.get_float32_matmul_precision()
    seen = []
    monkeypatch.setattr(NORMS.module("triton"), "forward", lambda *args: seen.append(os.environ["VLMOPS_TUNING"]))
    tasks.execute(parity_task())
    assert seen[0] == "off" and os.environ["VLMOPS_TUNING"] == "on"
    assert torch.get_float32_matmul_precision() == precision


def test_strides_survive_placing():
    fused = torch.randn(5, 3, 2, 8)
    x = fused[:, 1].requires_grad_()
    placed = parity.place({"x": x}, torch.device("cpu"), torch.bfloat16)["x"]
    assert placed.stride() == x.stride() and placed.dtype == torch.bfloat16 and placed.requires_grad
    assert torch.equal(placed, x.bfloat16())


class FakeGraph:
    """A graph on a CPU: what was captured is run again into the tensors that the capture made, or not at all."""

    works = True

    def __init__(self):
        self.captured = None

    def replay(self):
        if self.captured is not None and self.works:
            again, (outs, grads) = self.captured
            for old, new in zip([*outs, *grads], [t for part in again() for t in part], strict=True):
                old.data.copy_(new.detach())


@pytest.mark.parametrize("works", [True, False])
def test_a_graph_that_replays_nothing_is_found(monkeypatch, works):
    graphs, real = [], parity.run

    @contextlib.contextmanager
    def capture(graph):
        graphs.append(graph)
        yield
        graphs.append(None)

    def recorded(*args):
        found = real(*args)
        if len(graphs) == 1:
            graphs[0].captured = (lambda: real(*args)), found
        return found

    stream = types.SimpleNamespace(wait_stream=lambda other: None)
    for name, value in dict(
        Stream=lambda: stream, current_stream=lambda: stream, stream=lambda s: contextlib.nullcontext(), CUDAGraph=FakeGraph,
        graph=capture, synchronize=lambda: None,
    ).items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(parity, "run", recorded)
    monkeypatch.setattr(FakeGraph, "works", works)
    case = cases.find(PLAIN)
    args, kwargs = case.arguments(True)
    found = parity.graph_equals_eager(case.call, args, kwargs, backend="triton", dtype=torch.float32)
    assert (found is None) is works, found


# -- order, budget, processes ------------------------------------------------------------------------------------------


def test_core_cases_come_first_and_quick_is_less():
    full, quick = (run.parity_tasks(run.Settings("cuda", quick=q)) for q in (False, True))
    core = {case.name for case in cases.all_cases() if case.core}
    last = max(i for i, task in enumerate(full) if task.case in core)
    assert all(task.case in core for task in full[: last + 1])
    assert {task.dtype for task in full} == {"bf16", "fp16", "fp32"} and len(quick) < len(full)
    assert {task.backend for task in full if task.op == "norms"} >= {"torch", "triton"}
    assert {t.op for t in run.parity_tasks(run.Settings("cuda", ops=("rotary",)))} == {"rotary"}
    assert len(run.timing_tasks(run.Settings("cuda", quick=True), "timing")) < len(
        run.timing_tasks(run.Settings("cuda"), "timing")
    )
    assert all(t.tune for t in run.timing_tasks(run.Settings("cuda"), "warm"))


def test_what_the_time_does_not_allow_is_said():
    found: list[Result] = []
    work = [parity_task()] * 3

    def slow(task):
        time.sleep(0.05)
        return Result(task)

    workers.run_here(work, found.append, time.monotonic() + 0.04, slow)
    assert [r.reason for r in found] == [Reason.NONE, Reason.BUDGET, Reason.BUDGET]
    assert [r.status for r in found[1:]] == ["skipped", "skipped"]


def behave(task):
    """What a worker does in the tests below; sent to it by name."""
    if task.case == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if task.case == "hang":
        time.sleep(LONG)
    result = Result(task, note=str(os.getpid()))
    result.poisoned = task.case == "poison"
    return result


def test_a_fault_and_a_hang_cost_one_task_each():
    """One worker does all: after a death, a poisoned context and a hang, another process goes on."""
    found: dict[str, Result] = {}
    work = [Task("parity", name) for name in ("first", "die", "second", "poison", "third", "hang", "fourth")]
    workers.run_in_processes(
        work,
        lambda r: found.__setitem__(r.task.case, r),
        time.monotonic() + LONG * 4,
        count=1,
        execute=behave,
        limit=1.0,
        start=1.0,
        method="fork",
    )
    assert [found[t.case].reason for t in work] == [
        Reason.NONE, Reason.CRASHED, Reason.NONE, Reason.NONE, Reason.NONE, Reason.TIMEOUT, Reason.NONE
    ]  # fmt: skip
    assert found["die"].status == found["hang"].status == "failed"
    assert "signal 9" in found["die"].note
    assert len({found[name].note for name in ("first", "second", "third", "fourth")}) == 4, (
        "a process went on after its fault"
    )
    assert found["second"].note == found["poison"].note


def test_the_deadline_kills():
    found: list[Result] = []
    begin = time.monotonic()
    work = [Task("parity", "hang"), Task("parity", "never")]
    workers.run_in_processes(work, found.append, begin + 1.0, count=1, execute=behave, method="fork")
    assert time.monotonic() - begin < LONG / 2
    assert sorted(r.task.case for r in found) == ["hang", "never"]
    assert {r.reason for r in found} == {Reason.BUDGET}


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


def test_the_phases_of_a_run(monkeypatch):
    found, told, deadlines = pretended(monkeypatch, answered)
    assert told.phases == ["measured peak", "parity", "compiling for timing", "timing"]
    begin = deadlines[0] - run.BUDGET_S
    assert deadlines[1] == pytest.approx(begin + run.BUDGET_S * run.PARITY_SHARE)
    assert deadlines[3] == deadlines[0] >= deadlines[2] and run.BUDGET_S < 600
    assert run.Settings("cuda", quick=True).seconds < 120
    assert found.peaks["bandwidth"] == 3e12 and found.passed == len(found.parity) and not found.failed
    assert all(r.task.peaks.flops["bf16"] == 8e14 for r in found.timings)
    _, quick, _ = pretended(monkeypatch, answered, run.Settings("cuda", quick=True))
    assert quick.phases == ["measured peak", "parity", "timing"]


# -- timing ------------------------------------------------------------------------------------------------------------


def test_candidates_take_turns_and_medians_are_taken():
    clock = FakeClock()
    found, host = timing.interleave(
        {"a": clock.taking("a", 1e-3, 1e-3, 9e-3), "b": clock.taking("b", 2e-3)}, clock, seconds=1e9, most=9
    )
    assert found["a"].median == pytest.approx(1e-3) and found["b"].median == pytest.approx(2e-3)
    assert len(found["a"].seconds) == 9 and found.speedup("a", "b").value == pytest.approx(2.0)
    assert "".join(clock.order[4:]) == "abbaabbaabbaabbaab", "every round starts with another one"
    assert set(host) == {"a", "b"}


def test_a_sample_is_of_a_cold_cache_and_of_the_device_alone(monkeypatch):
    """In order: the cache is overwritten, the stream is held while the host queues, then events around the call alone."""
    log = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            log.append("event")

        def synchronize(self):
            log.append("wait")

        def elapsed_time(self, other):
            return 2.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: log.append(("hold", cycles)))
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda device: types.SimpleNamespace(L2_cache_size=1 << 10)
    )
    clock = timing.CudaClock(torch.device("cpu"))
    assert clock.evict.numel() == 2 << 10
    clock.evict.fill_(7)
    assert clock.seconds(lambda: log.append("call"), 1e-3) == pytest.approx(2e-3)
    assert [entry if isinstance(entry, str) else entry[0] for entry in log] == [
        "hold",
        "event",
        "call",
        "event",
        "wait",
    ]
    assert log[0][1] >= 1e-3 * timing.CYCLES_PER_S and not clock.evict.any()
    clock.seconds(lambda: None, 60.0)
    assert log[5][1] <= timing.LONGEST_LEAD_S * timing.CYCLES_PER_S


def test_rounds_fit_the_time_but_are_never_few():
    clock = FakeClock()
    found, _ = timing.interleave({"a": clock.taking("a", 0.5)}, clock, seconds=1.0)
    assert len(found["a"].seconds) == timing.MIN_ROUNDS
    found, _ = timing.interleave({"a": clock.taking("a", 0.01)}, clock, seconds=0.2)
    assert timing.MIN_ROUNDS < len(found["a"].seconds) <= 20
    with pytest.raises(RuntimeError, match="did not advance"):
        timing.interleave({"a": lambda: None}, FakeClock(), seconds=0.1)
    with pytest.raises(ValueError, match="candidates"):
        timing.interleave({}, clock, seconds=1.0)


def test_arguments_rotate():
    seen = []
    call = timing.rotating(lambda x: seen.append(x), [(1,), (2,), (3,)])
    for _ in range(5):
        call()
    assert seen == [1, 2, 3, 1, 2]


def test_peaks_are_bytes_and_flops_over_time(monkeypatch):
    clock = FakeClock()
    monkeypatch.setattr(clock, "seconds", lambda call, host: call() is not None and 2e-3)
    found = peak.measure(torch.device("cpu"), clock, [torch.float32], copy_bytes=1 << 10, side=8)
    assert found.bandwidth == pytest.approx(2 * 1024 / 2e-3)
    assert found.flops == {"fp32": pytest.approx(2 * 8**3 / 2e-3)}


@pytest.fixture
def one_round(monkeypatch):
    """The interpreter is slow, and its times mean nothing."""
    monkeypatch.setattr(measure, "interleave", functools.partial(timing.interleave, least=1, most=1))


class FixedClock(FakeClock):
    """Every call takes 1 ms."""

    def seconds(self, call, host_seconds):
        call()
        return 1e-3


def timed(name, dtype="fp32", peaks=None):
    load = loads.find(name)
    task = Task("timing", name, load.op, dtype, device="cpu", tiny=True, seconds=0.0, peaks=peaks)
    return measure.timed(task, FixedClock())


def test_a_load_is_checked_then_timed(one_round):
    peaks = Peaks(1e9, {"fp32": 1e12})
    result = timed("norms: rms_norm, Qwen2.5-VL, 4096 x 1280", peaks=peaks)
    assert result.status == "passed", result.note
    forward, both = result.rows
    assert [row["direction"] for row in result.rows] == ["forward", "forward + backward"]
    assert set(forward["times"]) == {"vlmops triton", "vlmops torch", "F.rms_norm"}
    assert forward["ours"] == "vlmops triton" and forward["absent"]["Liger rms_norm"] == "liger_kernel is not installed"
    moved = 2 * 8 * 80 * 4 + 80 * 4  # x and the result, and the weight
    assert forward["bytes"] == moved and forward["gbytes"] == pytest.approx(moved / 1e-3 / 1e9)
    assert forward["share"] == pytest.approx(moved / 1e9 / 1e-3) and forward["limit"] == "memory"
    assert forward["ratios"]["F.rms_norm"]["value"] == pytest.approx(1.0)
    assert forward["oracle"] == "reference, float64" and both["share"] is None


def test_the_share_of_a_product_is_of_the_measured_peak():
    clock = FakeClock()
    found, host = timing.interleave({"vlmops triton": clock.taking("a", 1e-3)}, clock, seconds=0.0, least=1, most=1)
    load, peaks = loads.find("varlen_attention: Qwen2-VL, 4096 patches, head 80"), Peaks(1e12, {"fp32": 1e13})
    cost = Cost(read=3 * 10**8, written=10**8, flops=5 * 10**9)
    forward, both = (
        measure.describe(load, "fp32", way, found, host, cost, peaks) for way in ("forward", "forward + backward")
    )
    assert forward["limit"] == "compute" and forward["share"] == pytest.approx(0.5)
    assert forward["least_ms"] == pytest.approx(0.5) and forward["gflops"] == pytest.approx(5000)
    assert both["flops"] == pytest.approx(3.5 * 5e9) and both["share"] == pytest.approx(1.75)
    slower = dataclasses.replace(peaks, bandwidth=5e11)
    memory = measure.describe(load, "fp32", "forward", found, host, cost, slower)
    assert memory["limit"] == "memory" and memory["share"] == pytest.approx(0.8)
    unknown = measure.describe(load, "bf16", "forward", found, host, cost, peaks)
    assert unknown["share"] is None and unknown["gflops"] > 0, "no peak of this dtype was measured"


def test_a_wrong_kernel_is_not_timed(monkeypatch, one_round):
    module, forward = broken_forward(lambda found: (found[0] * 1.01, found[1]))
    monkeypatch.setattr(module, "forward", forward)
    result = timed("norms: rms_norm, Qwen2.5-VL, 4096 x 1280")
    assert (result.status, result.reason) == ("failed", Reason.WRONG) and "vlmops triton: result 0" in result.note
    assert all("vlmops triton" not in row["times"] for row in result.rows)


def test_a_peer_with_another_result_is_not_compared(monkeypatch, one_round):
    monkeypatch.setattr(loads.F, "rms_norm", lambda *args: torch.zeros_like(args[0]).requires_grad_() * args[2])
    result = timed("norms: rms_norm, Qwen2.5-VL, 4096 x 1280")
    assert result.status == "passed" and all("F.rms_norm" not in row["times"] for row in result.rows)
    assert "another result" in result.rows[0]["absent"]["F.rms_norm"]


def test_no_room_for_any_oracle_is_a_skip(monkeypatch):
    sizes = []
    monkeypatch.setattr(
        measure, "no_room", lambda device, needed: sizes.append(needed) or ("full" if len(sizes) > 1 else "")
    )
    result = timed("norms: rms_norm, Qwen2.5-VL, 4096 x 1280", "bf16")
    assert (result.status, result.reason, result.note) == ("skipped", Reason.MEMORY, "full")
    assert len(sizes) == 3, "float64, then float32"


def test_a_smaller_oracle_is_named(monkeypatch, one_round):
    answers = iter(["", "full", ""])
    monkeypatch.setattr(measure, "no_room", lambda device, needed: next(answers))
    result = timed("norms: rms_norm, Qwen2.5-VL, 4096 x 1280", "bf16")
    assert result.rows[0]["oracle"] == "torch, float32"


# -- reports -----------------------------------------------------------------------------------------------------------


class Page(html.parser.HTMLParser):
    """Tags opened and closed, and every text."""

    VOID = ("meta", "br", "link", "img")

    def __init__(self, text):
        super().__init__()
        self.open, self.texts, self.loads = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        if tag not in self.VOID:
            self.open.append(tag)
        self.loads += [value for name, value in attrs if name in ("src", "href")] + (
            [tag] if tag in ("script", "link") else []
        )

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


def test_the_page_is_whole_escaped_and_alone(monkeypatch, tmp_path):
    found, _, _ = pretended(monkeypatch, answered)
    paths = report.write(found.as_dict(), tmp_path / "new" / "folder")
    data = json.loads(paths[0].read_text())
    assert data["format"] == 1 and len(data["parity"]) == len(found.parity) and data["failed"] == 0
    text = paths[1].read_text()
    parsed = Page(text)
    assert parsed.open == [] and parsed.loads == [] and not re.search(r"url\(|@import|https?:", text)
    assert "Pretended <b>GPU</b> & Co" in parsed.texts and "<b>" not in text
    assert "Qwen2-VL, 4096 patches, head 80" in parsed.texts
    assert any("SDPA flash 2.00x" in t for t in parsed.texts) and "flash-attn: not <installed>" in parsed.texts
    rows = sum(len(r.rows) for r in found.timings)
    assert text.count("SDPA flash 2.00x") == rows > 20


def test_failures_are_in_the_report(monkeypatch, tmp_path):
    def answer(task):
        if task.kind == "parity" and task.case == PLAIN:
            return tasks.missed(task, Reason.CRASHED, "its process ended (signal 11)")
        if task.kind == "parity" and task.op == "rotary":
            return tasks.missed(task, Reason.BUDGET, "no time left")
        return answered(task)

    found, _, _ = pretended(monkeypatch, answer)
    assert len(found.failed) == sum(t.case == PLAIN for t in run.parity_tasks(run.Settings("cuda")))
    data = found.as_dict()
    assert "for want of time" in report.summary(data)
    assert "signal 11" in report.page(data) and "class='failed'" in report.page(data)


def test_a_number_that_json_has_not_is_none():
    result = Result(parity_task(), error_over_bound=float("inf"))
    assert result.as_dict()["error_over_bound"] is None


# -- the command -------------------------------------------------------------------------------------------------------


def command(*options):
    return CliRunner().invoke(app, ["gpu-check", *options])


def test_without_a_gpu_it_says_what_can_be_checked(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = command()
    assert result.exit_code == 2
    assert "TRITON_INTERPRET=1 vlmops gpu-check --device cpu --quick" in " ".join(result.output.split())


def test_a_cpu_needs_the_interpreter(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    result = command("--device", "cpu")
    assert result.exit_code == 2 and "TRITON_INTERPRET=1" in result.output


def test_a_gpu_does_not_want_it(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    result = command()
    assert result.exit_code == 2 and "unset it" in " ".join(result.output.split())


@pytest.mark.parametrize("options", [("--op", "nonsense"), ("--device", "tpu")])
def test_unknown_names_are_refused(options):
    result = command(*options)
    assert result.exit_code == 2 and options[0] in result.output


def test_the_interpreter_half_end_to_end(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    result = command("--device", "cpu", "--quick", "--op", "rotary", "--out", str(tmp_path))
    assert result.exit_code == 0, result.output
    assert "nothing was timed" in result.output and "rotary" in result.output
    data = json.loads((tmp_path / report.JSON_NAME).read_text())
    assert data["timings"] == [] and data["peaks"] is None and data["passed"] >= 7
    assert "nothing was timed" in (tmp_path / report.HTML_NAME).read_text()
    monkeypatch.setattr(run, "parity_tasks", lambda settings: [parity_task()])
    printed = command("--device", "cpu", "--quick", "--op", "rotary", "--out", str(tmp_path), "--json")
    assert json.loads(printed.stdout)["passed"] == 1


def test_a_wrong_kernel_is_exit_code_1(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    module, forward = broken_forward(lambda found: (found[0] * 1.01, found[1]))
    monkeypatch.setattr(module, "forward", forward)
    monkeypatch.setattr(run, "parity_tasks", lambda settings: [parity_task()])
    result = command("--device", "cpu", "--out", str(tmp_path))
    assert result.exit_code == 1 and "FAILED norms" in result.output


def test_nothing_checked_is_no_success(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(run, "parity_tasks", lambda settings: [dataclasses.replace(parity_task(), backend="none")])
    result = command("--device", "cpu", "--out", str(tmp_path))
    assert result.exit_code == 2 and "no kernel was checked" in result.output


def test_a_folder_that_cannot_be_written(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(run, "parity_tasks", lambda settings: [parity_task()])
    (tmp_path / "file").write_text("")
    result = command("--device", "cpu", "--out", str(tmp_path / "file"))
    assert result.exit_code == 2 and "cannot write" in result.output


def test_a_case_of_ones_own():
    """How the table is extended: one Case."""
    from vlmops.ops import rms_norm

    mine = Case("norms", "mine", rms_norm, lambda v: ((v.random(3, 8),), {"eps": 1e-6}))
    assert cases.find("norms: mine", [mine]) is mine
    assert [t.case for t in run.parity_tasks(run.Settings("cpu"), [mine], ["fp32"])] == ["norms: mine"]
