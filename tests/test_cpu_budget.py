"""Instructions of the CPU kernels under callgrind are as benchmarks/budgets/cpu.json says (`make budgets`)."""

from __future__ import annotations

import json
import shutil

import pytest

from tests.support.scripts import ROOT, load_script
from vlmops.backends import build

FILE = ROOT / "benchmarks" / "budgets" / "cpu.json"
QUICK = ("epilogue", "rotary")  # compiled in seconds; `make budgets-check` counts all


@pytest.fixture(scope="module")
def tool():
    return load_script("cpu_budget")


@pytest.fixture(scope="module")
def budget():
    if not FILE.exists():
        pytest.skip("benchmarks/budgets/cpu.json has not been written: python scripts/cpu_budget.py")
    return json.loads(FILE.read_text())


@pytest.fixture(scope="module")
def plan(tool):
    if tool.valgrind() is None:
        pytest.skip(tool.INSTALL)
    if build.sanitizers():
        pytest.skip("a build with sanitizers is not the one that is counted")
    try:
        return build.plan(tool.CSRC)
    except build.BuildError as err:
        pytest.skip(str(err))


@pytest.fixture(scope="module")
def isas(tool, plan):
    return [isa for isa in tool.ISAS if isa in plan.isas and tool.runs_here(isa)]


@pytest.fixture(scope="module")
def counted(tool, plan, isas):
    return tool.collect(QUICK, isas, plan, jobs=1)


def test_counts_are_as_budgeted(tool, plan, isas, counted, budget):
    version = tool.compiler(build.compiler_version(plan.cxx))
    if version not in budget["compilers"]:
        pytest.skip(f"the budget is for {', '.join(budget['compilers'])}, this is {version}")
    assert [str(d) for d in tool.compare(counted, budget["compilers"][version], QUICK, isas)] == []


def test_every_case_is_counted_by_every_set(counted, isas):
    assert {key.split(" | ")[0] for key in counted} == set(QUICK)
    assert all(sorted(row) == sorted(isas) and min(row.values()) > 1000 for row in counted.values())
    if "avx2" in isas:  # 8 lanes and a fused multiply-add against 4 and none: it is the set that was asked for
        assert all(row["avx2"] * 1.5 < row["generic"] for row in counted.values())


@pytest.fixture
def changed(tmp_path):
    """A copy of the sources that may be changed: ``changed(old, new)`` of rotary's kernel gives its folder."""
    for part in ("cpu", "budget"):
        shutil.copytree(build.csrc_dir() / part, tmp_path / part)

    def change(old, new, path="cpu/kernels/rotary.cpp"):
        source = tmp_path / path
        assert old in source.read_text()
        source.write_text(source.read_text().replace(old, new))
        return tmp_path

    return change


def count_rotary(tool, csrc, isa, tmp_path):
    folder = tmp_path / "made"
    folder.mkdir()
    return {key: {isa: n} for key, n in tool.count("rotary", isa, build.plan(csrc), csrc, folder).items()}


def test_an_unchanged_kernel_counts_the_same_elsewhere(tool, counted, isas, changed, tmp_path):
    csrc = changed("// x * cos", "// x  *  cos")
    again = count_rotary(tool, csrc, isas[-1], tmp_path)
    assert again == {key: {isas[-1]: row[isas[-1]]} for key, row in counted.items() if key.startswith("rotary")}


def test_a_slower_kernel_is_found(tool, counted, isas, changed, tmp_path):
    """The last vector of a half goes the masked way: the answers are right, and no clock would show it."""
    csrc = changed("for (; i + kLanes <= half; i += kLanes) {", "for (; i + 2 * kLanes <= half; i += kLanes) {")
    csrc = changed(
        "  if (i < half) {\n    const int n = static_cast<int>(half - i);",
        "  for (; i < half; i += kLanes) {\n    const int n = static_cast<int>(half - i < kLanes ? half - i : kLanes);",
    )
    found = tool.compare(count_rotary(tool, csrc, isas[-1], tmp_path), counted, ["rotary"], isas[-1:])
    slower = {d.key for d in found if d.now > 1.02 * d.was}
    assert {key for key in counted if "rotary | hal" in key} <= slower


def test_a_kernel_called_twice_is_found(tool, counted, isas, changed, tmp_path):
    csrc = changed(
        "[&] { kernels::rotary_tokens(a, 0, kTokens); }",
        "[&] { for (int i = 0; i < 2; ++i) kernels::rotary_tokens(a, 0, kTokens); }", "budget/rotary.cpp",
    )  # fmt: skip
    found = tool.compare(count_rotary(tool, csrc, isas[0], tmp_path), counted, ["rotary"], isas[:1])
    assert len(found) == sum(key.startswith("rotary") for key in counted)
    assert all(1.95 < d.now / d.was < 2.05 for d in found)


def test_a_kernel_that_does_nothing_is_no_saving(tool, changed, tmp_path, isas):
    csrc = changed("  switch (a.dtype) {", "  if (first < last) return;\n  switch (a.dtype) {")
    with pytest.raises(tool.CountError, match="not finite, or all of it is 0"):
        count_rotary(tool, csrc, isas[0], tmp_path)


def test_what_does_not_compile_is_said(tool, changed, tmp_path, isas):
    csrc = changed("  switch (a.dtype) {", "  switch (a.no_such_member) {")
    with pytest.raises(tool.CountError, match=r"(?s)compiling rotary\.cpp failed.*no_such_member"):
        count_rotary(tool, csrc, isas[0], tmp_path)


# -- without counting --------------------------------------------------------------------------------------------------


def test_differences(tool):
    want = {"a | x | k": {"generic": 1000, "avx2": 100}, "b | x | k": {"generic": 5}}
    assert tool.compare({"a | x | k": {"generic": 1020, "avx2": 98}}, want, ["a"], ["generic", "avx2"]) == []
    have = {"a | x | k": {"generic": 1021, "avx2": 97}, "a | y | k": {"generic": 7}}
    found = tool.compare(have, want, ["a"], ["generic", "avx2"])
    assert [str(d) for d in found] == [
        "a | x | k by generic: was 1000, is 1021 instructions, +2.1%",
        "a | x | k by avx2: was 100, is 97 instructions, -3.0%",
        "not in the budget: a | y | k by generic, 7 instructions",
    ]
    gone = tool.compare({}, want, ["a", "b"], ["generic"])
    assert [str(d).split(" |")[0] for d in gone] == ["gone: a", "gone: b"]
    assert tool.compare({}, want, ["a", "b"], ["neon"]) == []  # not a set of this machine
    assert tool.compare(have, want, ["a"], ["generic"], tolerance=0.03)[0].was is None


def test_every_kernel_has_a_case_in_the_budget(tool, budget):
    assert tool.without_cases() == []
    declared = tool.kernels()
    assert {"norm_forward", "norm_backward", "rotary_tokens", "patch_rows", "varlen_attention_run"} <= set(declared)
    for version, rows in budget["compilers"].items():
        assert tool.uncounted(rows, tool.ops()) == [], version
        assert {key.split(" | ")[0] for key in rows} == set(tool.ops()), version
        assert all(n > 0 for row in rows.values() for n in row.values()), version


def test_a_kernel_without_a_case_is_said(tool, tmp_path):
    shutil.copytree(build.csrc_dir() / "budget", tmp_path / "budget")
    shutil.copytree(build.csrc_dir() / "cpu", tmp_path / "cpu")
    (tmp_path / "cpu" / "fresh.h").write_text("VLMOPS_DECLARE(void, fresh_rows, const Fresh& a, long long first)\n")
    with open(tmp_path / "cpu" / "rotary.h", "a") as file:
        file.write("VLMOPS_DECLARE(void, rotary_more,\n               const Rotary& a)\n")
    assert tool.without_cases(tmp_path) == ["csrc/cpu/fresh.h has kernels, and there is no csrc/budget/fresh.cpp"]
    (line,) = tool.uncounted({"rotary | x | rotary_tokens": {"generic": 1}}, ["rotary"], tmp_path)
    assert "rotary_more" in line


def test_parts_of_a_callgrind_file(tool):
    trigger = f"desc: Trigger: --dump-after={tool.ENTRY}\n"
    text = f"part: 1\n{trigger}summary: 7\ntotals: 7\npart: 2\n{trigger}totals: 9\npart: 3\ndesc: Trigger: Program termination\n"
    assert tool.parts("version: 1\n" + text + "totals: 0\n") == [7, 9]
    assert tool.parts("") == []


def test_without_valgrind_the_check_says_so(tool, monkeypatch, capsys):
    monkeypatch.setattr(tool, "valgrind", lambda: None)
    assert tool.main(["--check"]) == 2
    assert "valgrind is not installed" in capsys.readouterr().err


@pytest.fixture
def canned(tool, monkeypatch):
    """The command with counts that are given."""
    rows = {}
    if tool.valgrind() is None:
        monkeypatch.setattr(tool, "valgrind", lambda: "valgrind")
    monkeypatch.setattr(tool, "collect", lambda *args: dict(rows))
    monkeypatch.setattr(tool, "uncounted", lambda *args: [])
    return rows


def test_the_command_writes_and_compares(tool, canned, tmp_path, capsys):
    file, found = tmp_path / "cpu.json", tmp_path / "found.json"
    canned["rotary | x | rotary_tokens"] = {"generic": 1000}
    assert tool.main(["--file", str(file)]) == 0
    stored = json.loads(file.read_text())
    (rows,) = stored["compilers"].values()
    assert rows == canned and '"rotary | x | rotary_tokens": {"generic": 1000}' in file.read_text()
    assert tool.main(["--check", "--file", str(file), "--json", str(found)]) == 0
    assert json.loads(found.read_text())["kernels"] == canned
    (rows,) = stored["compilers"].values()
    rows["rotary | x | rotary_tokens"]["generic"] = 900  # somebody's hand
    file.write_text(json.dumps(stored))
    capsys.readouterr()
    assert tool.main(["--check", "--file", str(file)]) == 1
    assert "was 900, is 1000 instructions, +11.1%" in capsys.readouterr().err
    assert tool.main(["--check", "--file", str(file), "--tolerance", "0.2"]) == 0
    file.write_text(json.dumps({"format": 1, "compilers": {"GCC 1.0": {}}}))
    assert tool.main(["--check", "--file", str(file)]) == 0
    assert "the budget is for GCC 1.0" in capsys.readouterr().out
    file.write_text(json.dumps({"format": 9}))
    assert tool.main(["--check", "--file", str(file)]) == 1


def test_one_op_is_written_beside_the_others(tool, canned, tmp_path):
    file = tmp_path / "cpu.json"
    canned.update({"norms | x | norm_forward": {"generic": 1}, "rotary | x | rotary_tokens": {"generic": 2, "avx2": 1}})
    tool.main(["--file", str(file)])
    canned.clear()
    canned["rotary | y | rotary_tokens"] = {"generic": 3}
    tool.main(["--file", str(file), "--op", "rotary", "--isa", "generic"])
    (rows,) = json.loads(file.read_text())["compilers"].values()
    assert rows == {"norms | x | norm_forward": {"generic": 1}, "rotary | y | rotary_tokens": {"generic": 3}}


def test_the_name_a_compiler_is_called_by_does_not_matter(tool):
    assert tool.compiler("c++ (Debian 12.2.0-14) 12.2.0") == tool.compiler("g++-12 (Debian 12.2.0-14) 12.2.0")
    assert tool.compiler("Debian clang version 14.0.6") == "Debian clang version 14.0.6"
