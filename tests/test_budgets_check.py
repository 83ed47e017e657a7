"""scripts/budgets_check.py: one table and one exit code for all guards without clocks."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
from rich.console import Console

from tests.support.scripts import load_script

KEY = "rotary | d64 | rotary_kernel"


@pytest.fixture(scope="module")
def tool():
    return load_script("budgets_check")


@pytest.fixture
def scripts(tool, monkeypatch, tmp_path):
    """The scripts' answers are given: exit code, what was counted or None, stdout, stderr; budgets are in tmp_path."""
    monkeypatch.setattr(tool, "BUDGETS", tmp_path)
    answers: dict = {}

    def run(words):
        name = Path(words[1]).stem.partition("_")[0]
        name = "counters" if words[1] == "-m" else name
        code, rows, out, err = answers[name]
        answers[f"{name} words"] = words
        if rows is not None:
            Path(words[words.index("--json") + 1]).write_text(json.dumps(rows))
        return subprocess.CompletedProcess(words, code, out, err)

    monkeypatch.setattr(tool, "_run", run)
    return answers


def keep(folder, name, data):
    (folder / f"{name}.json").write_text(json.dumps(data))


def test_numbers_of_a_row(tool):
    row = {"registers": 32, "mma": {"HMMA": 4}, "error": "x", "occupancy": 0.5}
    assert dict(tool.leaves({"sm_80": row})) == {"sm_80.registers": 32, "sm_80.mma.HMMA": 4, "sm_80.occupancy": 0.5}


def test_figures_beside_their_budget(tool):
    want = {KEY: {"a": 100, "b": 0}, "norms | x | k": {"a": 1}, "rotary | old | k": {"a": 5}}
    have = {KEY: {"a": 102, "b": 3}, "rotary | new | k": {"a": 7}}
    found = {(f.kernel, f.figure): f for f in tool.figures(have, want, ["rotary"], tolerance=0.02)}
    assert len(found) == 4
    assert not found[KEY, "a"].differs and found[KEY, "a"].change == pytest.approx(0.02)
    assert found[KEY, "b"].differs and found[KEY, "b"].change is None
    assert found["rotary | new | k", "a"].budget is None and found["rotary | old | k", "a"].now is None
    assert all(f.differs for key, f in found.items() if key != (KEY, "a"))
    # of a part that was counted, what was not looked at is not gone
    assert {f.kernel for f in tool.figures(have, want, ["rotary"], whole=False)} == {KEY, "rotary | new | k"}


def test_all_hold(tool, scripts, tmp_path, capsys):
    keep(tmp_path, "cpu", {"compilers": {"GCC 12": {KEY: {"generic": 1000, "neon": 7}}}})
    keep(tmp_path, "triton", {"triton": "3.9", "kernels": {KEY: {"sm_80": {"registers": 32}}}})
    keep(tmp_path, "cuda", {"nvcc": {"13": {KEY: {"sm_80": {"registers": 40}}}}, "counters": {KEY: {"barriers": 2}}})
    scripts["cpu"] = (0, {"compiler": "GCC 12", "kernels": {KEY: {"generic": 1010}}}, "1 cases, 1 counted in 2 s", "")
    scripts["triton"] = (0, {"triton": "3.9", "kernels": {KEY: {"sm_80": {"registers": 32}}}}, "1 compiled in 2 s", "")
    scripts["cuda"] = (
        0,
        {"nvcc": "13", "kernels": {KEY: {"sm_80": {"registers": 40}}}, "counters": {KEY: {"barriers": 2}}},
        "",
        "",
    )
    scripts["counters"] = (0, None, "3 passed in 1 s\n", "")
    assert tool.main(["--op", "rotary"]) == 0
    out = capsys.readouterr().out
    assert out.count("holds") == 4 and "+1.0% rotary | d64" in out and "not as budgeted" not in out
    assert "3 passed" in out
    assert tool.main(["--op", "rotary", "--all", "--only", "triton", "--only", "cuda", "--quick"]) == 0
    out = capsys.readouterr().out
    assert "sm_80.registers" in out and "barriers" in out
    assert "--quick" in scripts["cuda words"] and "--quick" not in scripts["triton words"]


def test_a_broken_guard_names_kernel_figure_budget_and_change(tool, scripts, tmp_path, capsys):
    keep(tmp_path, "cpu", {"compilers": {"GCC 12": {KEY: {"generic": 1000}}}})
    said = f"{KEY} by generic: was 1000, is 1200 instructions, +20.0%\ncsrc/cpu/x.h declares y, and no case calls it\n"
    scripts["cpu"] = (1, {"compiler": "GCC 12", "kernels": {KEY: {"generic": 1200}}}, "1 counted in 2 s", said)
    assert tool.main(["--only", "cpu", "--op", "rotary"]) == 1
    out = capsys.readouterr().out
    for word in ("BROKEN", "rotary | d64 | rotary_kernel", "generic", "1,000", "1,200", "+20.0%", "declares y"):
        assert word in out
    assert "was 1000" not in out


@pytest.mark.parametrize(
    ("answer", "status", "word"),
    [
        ((2, None, "", "valgrind is not installed"), 2, "valgrind is not installed"),
        ((1, None, "", "Traceback\nBuildError: no nvcc"), 2, "no nvcc"),
        (
            (0, {"compiler": "GCC 13", "kernels": {}}, "the budget is for GCC 12, this is GCC 13", ""),
            2,
            "this is GCC 13",
        ),
        ((0, {"compiler": "GCC 13", "kernels": {}}, "", ""), 2, "no budget for this compiler"),
        ((1, {"compiler": "GCC 13", "kernels": {}}, "", "something is wrong"), 1, "something is wrong"),
    ],
)
def test_what_was_not_checked_is_no_success(tool, scripts, capsys, answer, status, word):
    scripts["cpu"] = answer
    assert tool.main(["--only", "cpu", "--op", "rotary"]) == status
    out = capsys.readouterr().out
    assert word in out and ("NOT ALL CHECKED" in out) is (status == 2)


def test_another_nvcc_still_compares_the_counters(tool, scripts, tmp_path, capsys):
    keep(tmp_path, "cuda", {"nvcc": {"12": {}}, "counters": {KEY: {"barriers": 2}}})
    rows = {"nvcc": "13", "kernels": {KEY: {"sm_80": {"registers": 40}}}, "counters": {KEY: {"barriers": 3}}}
    scripts["cuda"] = (
        1,
        rows,
        "the budget is for nvcc 12, this is 13: compiled, nothing to compare",
        f"{KEY}: was 2, is 3",
    )
    assert tool.main(["--only", "cuda", "--op", "rotary"]) == 1
    out = capsys.readouterr().out
    assert "barriers" in out and "+50.0%" in out and "nvcc 12" in out and "registers" not in out


@pytest.mark.parametrize(("code", "status"), [(0, 0), (1, 1), (2, 2), (5, 2)])
def test_tests_of_the_counters(tool, scripts, capsys, code, status):
    failed = "FAILED tests/ops/test_x.py::test_traffic - assert\n1 failed in 2 s\n"
    scripts["counters"] = (code, None, failed if code else "3 passed in 2 s\n", "")
    assert tool.main(["--only", "counters"]) == status
    out = capsys.readouterr().out
    assert ("FAILED tests/ops/test_x.py" in out) is (code == 1)
    assert scripts["counters words"][-1] == "test_counters or traffic"


def test_the_worst_state_decides(tool):
    def outcomes(*states):
        return [tool.Outcome("cpu", state, "") for state in states]

    assert tool.code(outcomes(tool.HOLDS)) == 0
    assert tool.code(outcomes(tool.HOLDS, tool.UNCHECKED)) == 2
    assert tool.code(outcomes(tool.UNCHECKED, tool.BROKEN)) == 1


def test_usage(tool, scripts):
    for words in (["--op", "nothing"], ["--only", "triton", "--op", "epilogue"], ["--only", "clock"]):
        with pytest.raises(SystemExit):
            tool.main(words)


def test_every_script_takes_what_it_is_given():
    """The scripts know the options that are passed on."""
    for name, words in (("cpu", ()), ("triton", ()), ("cuda", ("--quick",))):
        source = (Path(__file__).resolve().parents[1] / "scripts" / f"{name}_budget.py").read_text()
        assert all(f'"{word}"' in source for word in ("--check", "--json", "--op", "--jobs", *words))


def test_ops_of_a_guard(tool):
    assert {"epilogue", "norms"} <= set(tool.known_ops("cpu")) and "epilogue" not in tool.known_ops("triton")
    assert "fp8_attention" in tool.known_ops("triton") and "_shared" not in tool.known_ops("counters")


def test_nothing_to_show_is_no_table(tool):
    console = Console(record=True, width=120)
    tool.show([tool.Outcome("cpu", tool.UNCHECKED, "could not run", lines=["[red]why"])], console)
    text = console.export_text()
    assert "not as budgeted" not in text and "cpu: [red]why" in text
