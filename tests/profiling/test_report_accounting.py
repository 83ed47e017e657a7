"""Traces with a known answer: whose each moment is, and what is done with traces that do not nest."""

from __future__ import annotations

from typing import Any

import pytest

from vlmops.profiling.report.accounting import ROOT, TraceError, account
from vlmops.profiling.report.data import Row, Run, grouped, pattern

MS = 1e3  # a trace is in microseconds


def event(
    name: str, begin: float, end: float, cat: str = "user_annotation", tid: int = 1, **args: Any
) -> dict[str, Any]:
    """A complete event; milliseconds."""
    return dict(ph="X", cat=cat, name=name, tid=tid, pid=1, ts=begin * MS, dur=(end - begin) * MS, args=args)


def op(name: str, begin: float, end: float, **args: Any) -> dict[str, Any]:
    return event(name, begin, end, "cpu_op", **args)


def memory(at: float, size: int, device: int = 0) -> dict[str, Any]:
    args = {"Bytes": size, "Device Type": device, "Total Allocated": 0}
    return dict(ph="i", cat="cpu_instant_event", name="[memory]", tid=1, ts=at * MS, args=args)


def step(at: float = 0.0) -> list[dict[str, Any]]:
    """100 ms: 10 outside any module, 60 of vlmops mlp, 20 of addmm with a copy inside, the rest Python of the tower."""
    return [
        event("stage: vision", at, at + 100),
        event("module: visual.blocks.0 (Block)", at + 10, at + 100),
        event("op: mlp cpu | 4x3 fp32", at + 12, at + 72),
        op("vlmops::mlp", at + 13, at + 71, **{"Input Dims": [[4, 3]]}),
        op("mkldnn::linear", at + 20, at + 60),
        op("aten::addmm", at + 75, at + 95, **{"Input Dims": [[5], [4, 3], [3, 5], [], [[1], [2]]]}),
        op("aten::copy_", at + 80, at + 86),
    ]


def run_of(events: list[dict[str, Any]], steps: int = 1, device: str = "cpu") -> Run:
    return account({"traceEvents": events}, "stock", steps, device)[0]


def ms(rows: list[Row], name: str) -> tuple[float, float, float]:
    (row,) = [r for r in rows if r.name == name]
    return row.calls, pytest.approx(row.seconds * 1e3), pytest.approx(row.own * 1e3)


@pytest.mark.parametrize("steps", [1, 3])
def test_every_moment_belongs_to_one(steps: int) -> None:
    run = run_of([e for i in range(steps) for e in step(200.0 * i)], steps)
    assert run.seconds == pytest.approx(0.1)
    assert run.shares() == pytest.approx({"op": 0.6, "stock": 0.2, "python": 0.1, "unnamed": 0.1})
    assert run.named() == pytest.approx(0.8)
    assert run.difference() == pytest.approx(0, abs=1e-9) == run.difference("vision")
    assert ms(run.ops, "mlp cpu") == (1, 60, 2)
    assert ms(run.ops, "aten::addmm") == (1, 20, 14)
    assert ms(run.inner, "mkldnn::linear") == (1, 40, 40)
    assert ms(run.inner, "vlmops::mlp") == (1, 58, 18)
    assert ms(run.inner, "aten::copy_") == (1, 6, 6)
    assert ms(run.modules, "visual.blocks.0") == (1, 90, 90)
    assert {row.name for row in run.ops} == {"mlp cpu", "aten::addmm"}
    (row,) = [r for r in run.ops if r.kind == "op"]
    assert row.detail == "4x3 fp32"
    assert [r.detail for r in run.inner if r.name == "aten::copy_"] == ["visual.blocks.*"]


def test_the_order_of_events_in_the_file_does_not_matter() -> None:
    assert run_of(step()[::-1]).pieces == run_of(step()).pieces


def test_shapes_of_calls_outside_our_ops() -> None:
    _, shaped = account({"traceEvents": [*step(), *step(200)]}, "stock", 2)
    assert shaped == {("aten::addmm", ((5,), (4, 3), (3, 5))): pytest.approx((1, 0.02, 0))}


def test_a_stage_inside_a_stage_counts_once() -> None:
    events = [
        *step(), event("stage: connector", 96, 99), event("module: visual.blocks.0.merger (Merger)", 96.5, 98.5),
        op("aten::mm", 97, 98), event("module: other (Block)", 99, 99.5),
    ]  # fmt: skip
    run = run_of(events)
    assert ms(run.stages, "vision") == (1, 100, 97)
    assert ms(run.stages, "connector") == (1, 3, 3)
    assert ms(run.modules, "visual.blocks.0") == (1, 90, 87.5)
    assert run.shares("connector") == pytest.approx({"op": 0, "stock": 1 / 3, "python": 1 / 3, "unnamed": 1 / 3})
    assert run.difference("vision") == pytest.approx(0, abs=1e-9)


def test_the_clock_is_the_judge_of_a_step() -> None:
    run = run_of(step())
    run.clock = 0.125  # a quarter of the step went by outside all ranges
    assert run.named() == pytest.approx(0.64)
    assert run.difference() == pytest.approx(-0.2)


def test_ranges_that_overlap_are_said() -> None:
    run = run_of([*step(), op("aten::late", 95.5, 103)])
    assert run.clipped == pytest.approx(0.003)
    assert ms(run.ops, "aten::late") == (1, 4.5, 4.5)
    assert run.seconds == pytest.approx(0.1)
    assert run.difference() == pytest.approx(0, abs=1e-9)


def test_what_lies_outside_a_stage_or_on_another_thread_is_in_no_row() -> None:
    run = run_of(
        [
            op("aten::early", -50, -10),
            *step(),
            event("aten::else", 10, 40, "cpu_op", tid=2),
            op("aten::after", 101, 110),
        ]
    )
    assert run.seconds == pytest.approx(0.1)
    assert {"aten::early", "aten::else", "aten::after"}.isdisjoint(r.name for r in run.inner)
    assert run.other_threads == pytest.approx(0.03)


def test_ranges_of_others_are_transparent() -> None:
    run = run_of([*step(), event("ProfilerStep#1", 11, 99), event("note: mine (x)", 97, 98)])
    assert run.shares() == pytest.approx({"op": 0.6, "stock": 0.2, "python": 0.1, "unnamed": 0.1})


def test_kernels_go_to_who_launched_them() -> None:
    events = [
        *step(), event("cudaLaunchKernel", 30, 31, "cuda_runtime", correlation=7),
        event("gemm", 300, 340, "kernel", 9, correlation=7),
        event("cudaLaunchKernel", 77, 78, "cuda_runtime", correlation=8),
        event("copy", 340, 345, "gpu_memcpy", 9, correlation=8),
        event("stray", 345, 346, "kernel", 9, correlation=99),
    ]  # fmt: skip
    run = run_of(events)
    assert run.kernels == pytest.approx(0.046)
    gpu = {r.name: r.gpu for r in [*run.ops, *run.stages, *run.modules]}
    assert gpu == pytest.approx({"mlp cpu": 0.04, "aten::addmm": 0.005, "vision": 0.045, "visual.blocks.0": 0.045})
    assert run.shares()["op"] == pytest.approx(0.6)  # the launch is part of the op, the kernel is no processor time


def test_memory_is_that_of_the_last_step() -> None:
    first = [memory(20, 999999), memory(90, -999999)]
    last = [
        memory(215, 100),
        memory(220, 50),
        memory(240, -150),
        memory(221, 7000, device=1),
        memory(290, 20),
        memory(500, 10**6),
    ]
    found = run_of([*step(), *first, *step(200), *last], 2).memory
    assert found.peak == 150
    assert [size for _, size in found.points] == [0, 100, 150, 0, 20, 20]
    assert found.points[1][0] == pytest.approx(0.015) and found.points[-1][0] == pytest.approx(0.1)
    assert found.where == "mlp cpu in visual.blocks.0, stage vision"
    assert run_of([*step(), *step(200), *last], 2, "cuda").memory.peak == 7000


def test_a_long_memory_timeline_keeps_its_peak() -> None:
    many = [memory(i * 0.01, 10 if i % 2 else -9) for i in range(9000)]
    found = run_of([*step(), *many, memory(50.001, 10**6), memory(50.002, -(10**6))]).memory
    assert len(found.points) <= 2001
    assert max(size for _, size in found.points) == found.peak > 10**6


def test_a_trace_without_a_stage_is_refused() -> None:
    with pytest.raises(TraceError, match="stage"):
        run_of([op("aten::mm", 0, 1)])


@pytest.mark.parametrize(
    ("path", "want"),
    [
        ("visual.blocks.12.mlp", "visual.blocks.*.mlp"),
        ("0.1", "*.*"),
        ("conv2d.x1", "conv2d.x1"),
        (ROOT, ROOT),
        ("", ""),
    ],
)
def test_layers_of_one_kind_share_a_pattern(path: str, want: str) -> None:
    assert pattern(path) == want


def test_rows_of_one_kind_add_up() -> None:
    rows = [Row("module", "a.0", "X", 1, 2, 1), Row("module", "a.1", "X", 1, 3, 2), Row("module", "a.1", "Y", 1, 9, 9)]
    assert grouped(rows) == [Row("module", "a.*", "X", 2, 5, 3), Row("module", "a.*", "Y", 1, 9, 9)]
    assert [r.seconds for r in grouped(rows, details=False)] == [14]
