"""What the report says in words: when it says it, with which figure, and when it keeps quiet."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from vlmops.profiling.report.data import Dot, Memory, Peaks, Piece, Profile, Row, Run
from vlmops.profiling.report.opportunities import MOST, Opportunity, find

MIB = 2**20


def run(name: str = "patched", **more: Any) -> Run:
    """A step of 100 ms, all of it in the tower."""
    return Run(name, 1, 0.1, stages=[Row("stage", "vision", "", 1, 0.1, 0.1)], **more)


def profile(patched: Run, stock: Run | None = None, patch: list[dict[str, Any]] | None = None) -> Profile:
    runs = {"stock": stock or run("stock"), "patched": patched}
    return Profile("Model", {}, "fp32", "cpu", 0, runs, Peaks(1e10, 1e11, "fp32", MIB), patch or [])


def row(module: str, status: str, why: str = "", cls: str = "Linear", operation: str = "linear") -> dict[str, Any]:
    return dict(module=module, cls=cls, operation=operation, backend="auto", status=status, why=why, error=None)


def one(found: list[Opportunity], kind: str) -> Opportunity:
    (only,) = [o for o in found if o.kind == kind]
    return only


def test_an_op_far_from_the_roof() -> None:
    dots = [
        Dot("mlp cpu", "4x3 fp32", "op", 2, 0.02, 2e8, 1e6),  # 2 ms by arithmetic, 0.1 ms by memory: 10%
        Dot("norms cpu", "4 fp32", "op", 1, 0.01, 0, 2e7),  # 2 ms by memory: 20%
        Dot("linear cpu", "4x9 fp32", "op", 1, 0.01, 6e8, 1e6),  # 60%: near enough
        Dot("aten::mm", "4x9", "stock", 1, 0.01, 1e6, 1e6),  # not ours: said as an op
    ]
    found = [o for o in find(profile(run(dots=dots))) if o.kind == "roofline"]
    assert [o.what for o in found] == [
        "mlp on backend cpu (4x3 fp32) runs at 10% of the arithmetic roof: 40 ms a step (40.0%), 4 ms at the measured peak",
        "norms on backend cpu (4 fp32) runs at 20% of the memory roof: 10 ms a step (10.0%), 2 ms at the measured peak",
    ]
    assert [o.seconds for o in found] == pytest.approx([0.036, 0.008])


def test_modules_that_were_left_alone_with_the_reason() -> None:
    modules = [Row("module", f"blocks.{i}.proj", "Linear", 1, 0.01, 0.01) for i in range(3)]
    modules.append(Row("module", "head", "Linear", 1, 0.005, 0.005))
    patch = [row(m.name, "skipped", "it has a hook") for m in modules[:3]] + [row("head", "patched")]
    found = one(find(profile(run(modules=modules), patch=patch)), "not patched")
    assert found.seconds == pytest.approx(0.03)
    assert "3 modules of class Linear (blocks.*.proj)" in found.what and "30 ms a step (30.0%)" in found.what
    assert found.what.endswith("linear would replace it, but: it has a hook")


def test_a_module_that_got_slower() -> None:
    before = run("stock", modules=[Row("module", "a", "Mlp", 1, 0.01, 0), Row("module", "b", "Mlp", 1, 0.01, 0)])
    after = run(modules=[Row("module", "a", "Mlp", 1, 0.03, 0), Row("module", "b", "Mlp", 1, 0.03, 0)])
    patch = [row("a", "patched", operation="mlp")]
    found = one(find(profile(after, before, patch)), "slower")
    assert found.what == "a took 30 ms a step patched and 10 ms stock" and "mlp out of ops=" in found.todo
    assert found.seconds == pytest.approx(0.02)


def test_python_in_modules_and_outside() -> None:
    pieces = [Piece("vision", f"blocks.{i}", "python", f"blocks.{i}", 0.004) for i in range(3)]
    pieces += [Piece("vision", "", "unnamed", "vision", 0.02), Piece("vision", "norm", "python", "norm", 0.0001)]
    found = [o for o in find(profile(run(pieces=pieces))) if o.kind == "python"]
    assert [o.seconds for o in found] == pytest.approx([0.02, 0.012])
    assert "stage vision lie outside any op and module" in found[0].what
    assert "the ops of blocks.* takes 12 ms a step (12.0%)" in found[1].what


def test_copies_and_where_they_are() -> None:
    inner = [
        Row("stock", "aten::copy_", "blocks.*.attn", 5, 0.02, 0.02), Row("stock", "aten::cat", "embed", 2, 0.01, 0.01),
        Row("stock", "aten::mm", "blocks.*.attn", 1, 0.05, 0.05),
    ]  # fmt: skip
    found = one(find(profile(run(inner=inner))), "copies")
    assert found.seconds == pytest.approx(0.03)
    assert "(5 aten::copy_, 2 aten::cat a step) take 30 ms" in found.what
    assert found.what.endswith("most in blocks.*.attn (20 ms) and embed (10 ms)")


def test_plain_ops_say_why_they_are_plain() -> None:
    pieces = [
        Piece("vision", "blocks.0", "stock", "aten::add", 0.01), Piece("vision", "blocks.1", "stock", "aten::add", 0.01),
        Piece("vision", "head", "stock", "aten::linear", 0.03), Piece("vision", "skipped", "stock", "aten::linear", 0.03),
        Piece("vision", "blocks.0", "stock", "aten::reshape", 0.03),
    ]  # fmt: skip
    patch = [row("head", "patched"), row("skipped", "skipped", "it has a hook")]
    found = [o for o in find(profile(run(pieces=pieces), patch=patch)) if o.kind == "op"]
    assert [(o.what, o.seconds) for o in found] == [
        ("aten::linear in head is plain PyTorch and takes 30 ms a step (30.0%)", pytest.approx(0.03)),
        ("aten::add in blocks.* is plain PyTorch and takes 20 ms a step (20.0%)", pytest.approx(0.02)),
    ]
    assert "its original forward was chosen" in found[0].todo and "no vlmops op covers it" in found[1].todo


def test_a_gpu_that_waits() -> None:
    assert one(find(profile(run(kernels=0.04))), "idle").seconds == pytest.approx(0.06)
    assert not [o for o in find(profile(run(kernels=0.099999))) if o.kind == "idle"]
    assert not [o for o in find(profile(run())) if o.kind == "idle"]


def test_stage_and_memory_close_the_list() -> None:
    stock = replace(run("stock"), stages=[Row("stage", "vision", "", 1, 0.3, 0.3)])
    found = find(profile(run(memory=Memory([(0, 0)], 3 * MIB, "mlp cpu in a, stage vision")), stock))
    assert [o.kind for o in found] == ["stage", "memory"]
    assert found[0].what == "stage vision is 100% of a step: 100 ms, 300 ms in the stock model"
    assert "3.0 MiB" in found[1].what and "mlp cpu in a" in found[1].what


def test_at_most_ten_by_the_time_at_stake() -> None:
    pieces = [Piece("vision", f"m{i}", "python", f"m{i}x", 0.001 * (i + 1)) for i in range(15)]
    found = find(profile(run(pieces=pieces, memory=Memory([(0, 0)], MIB, "x"))))
    assert len(found) == MOST and [o.kind for o in found[-2:]] == ["stage", "memory"]
    times = [o.seconds for o in found[:-2]]
    assert times == sorted(times, reverse=True) and times[0] == pytest.approx(0.015)


def test_a_hundredth_is_not_worth_a_word() -> None:
    assert [o.kind for o in find(profile(run(pieces=[Piece("vision", "m", "python", "m", 0.0009)])))] == ["stage"]
    assert find(profile(Run("patched", 1, 0.1))) == []
