"""`vlmops gpu-check`: parity in the interpreter, wrong kernels, skips, graph capture."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import types

import pytest
import torch

from tests.support import triton_interpreter
from tests.support.gpu_check import (
    PLAIN,
    broken_forward,
    parity_task,
)
from vlmops.ops.norms import OP as NORMS
from vlmops.profiling.gpu_check import cases, parity, run, tasks
from vlmops.profiling.gpu_check.tasks import Reason

pytest.importorskip("triton")
triton_interpreter.install()


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
