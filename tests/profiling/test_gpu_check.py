"""`vlmops gpu-check`: order, budget and faults of its tasks, reports, the command."""

from __future__ import annotations

import dataclasses
import html.parser
import json
import os
import re
import signal
import time

import pytest
import torch
from typer.testing import CliRunner

from tests.support import triton_interpreter
from tests.support.gpu_check import (
    LONG,
    PLAIN,
    answered,
    broken_forward,
    parity_task,
    pretended,
)
from vlmops.cli import app
from vlmops.profiling.gpu_check import cases, report, run, tasks, workers
from vlmops.profiling.gpu_check.cases.case import Case
from vlmops.profiling.gpu_check.tasks import Reason, Result, Task

pytest.importorskip("triton")
triton_interpreter.install()


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
