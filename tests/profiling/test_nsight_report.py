"""The report, the command lines that make recordings, and `vlmops profile`."""

from __future__ import annotations

import io
import itertools
import json
import stat
import sys

import pytest
from rich.console import Console
from typer.testing import CliRunner

from tests.profiling.test_nsight_ncu import KERNEL
from tests.support.nsight_files import Recording, message, ncu_csv, nested, nvtx_cell, thread_id
from vlmops.cli import app
from vlmops.profiling.nsight import ToolFailedError, ToolMissingError, budgets, commands, names, ncu, nsys, report, show
from vlmops.profiling.nsight.attribution import NOWHERE, Place

A = thread_id(100, 1)
STAGE, OP = message("stage", "prefill"), message("op", "mlp cuda", "8x16 bf16")


@pytest.fixture
def trace(tmp_path):
    """Two launches of one kernel in one place, one of it elsewhere, one of a kernel whose name tells its op, and a copy."""
    made = Recording()
    made.domain(100)
    made.range(1, 100, A, STAGE)
    made.range(10, 40, A, OP)
    made.range(50, 60, A, message("op", "mlp cuda", "9x16 bf16"))
    place = Place("prefill", None, "mlp", None, "cuda")
    for at, ns in ((20, 3_000_000), (55, 1_000_000)):
        made.kernel("few_rows", made.call(at, A), 100, place, ns=ns, registers=96)
    made.kernel("few_rows", made.call(70, A), 100, Place("prefill"), ns=500_000)
    made.kernel("varlen_forward_kernel", made.call(200, A), 100, NOWHERE, ns=1_500_000, registers=1000)
    pid = thread_id(100, 0)
    made.add("CUPTI_ACTIVITY_KIND_MEMCPY", 10**9, 10**9 + 2_000_000, 0, 1, 7, made.call(80, A), pid, 8_000_000, 1, None)
    return nsys.read(made.write(tmp_path / "a.sqlite"))


def test_rows_of_a_trace(trace):
    found = report.of_trace(trace, budgets=budgets.load())
    rows = {(row.kernel, row.op, row.op_from): row for row in found.rows}
    assert len(rows) == len(found.rows) == 4
    top = found.rows[0]
    assert (top.kernel, top.op, top.backend, top.stage, top.count) == ("few_rows", "mlp", "cuda", "prefill", 2)
    assert (top.total_ms, top.share, top.registers) == (4.0, 0.5, 96)
    assert rows["few_rows", None, None].stage == "prefill"
    inferred = rows["varlen_forward_kernel", "varlen_attention", "kernel name"]
    assert inferred.stage is None and inferred.budget == "above" and "1000 registers" in inferred.budget_text
    copy = rows["[memcpy Host-to-Device]", None, None]
    assert copy.gbytes == 4.0 and copy.share == 0.25
    assert found.total_ms == 8.0 and sum(row.share for row in found.rows) == pytest.approx(1)
    assert any(note.startswith("18.8% of the time has its op from") for note in found.notes)


def test_every_part_of_a_place_makes_its_own_row(tmp_path):
    made = Recording()
    made.domain(100)
    kinds = (("op", "linear cuda"), ("op", "mlp triton"), ("stage", "prefill"), ("module", "visual (Tower)"))
    texts = [OP, *(message(kind, name) for kind, name in kinds), "mlp_few_rows_t1"]
    for at, text in enumerate(texts):
        made.range(10 * at + 1, 10 * at + 9, A, text)
        for offset in (2, 5):
            made.kernel("k", made.call(10 * at + offset, A), 100, NOWHERE)
    found = report.of_trace(nsys.read(made.write(tmp_path / "a.sqlite")))
    assert [row.count for row in found.rows] == [2] * len(texts)


def test_sums(trace):
    found = report.of_trace(trace, budgets=budgets.load())
    assert [(s.name, s.count, s.total_ms) for s in found.by("stage")] == [("prefill", 4, 6.5), (None, 1, 1.5)]
    assert [(s.name, s.total_ms) for s in found.by("op")] == [("mlp", 4.0), (None, 2.5), ("varlen_attention", 1.5)]
    for what in ("stage", "op", "module"):
        assert sum(s.total_ms for s in found.by(what)) == pytest.approx(found.total_ms)


def test_counters_join_the_place_they_were_measured_in(trace, tmp_path):
    changed = {**KERNEL, "sm__warps_active.avg.pct_of_peak_sustained_active": "80"}
    cells = nvtx_cell(1, STAGE, OP), nvtx_cell(1, STAGE)
    launches = [
        {**values, "name": "few_rows", "nvtx": cell} for values, cell in zip((KERNEL, changed), cells, strict=True)
    ]
    path = ncu_csv(tmp_path / "a.csv", launches)
    found = report.of_trace(trace, ncu.read(path), peaks=ncu.Peaks(4e12, 1e15))
    mlp, bare = (next(r for r in found.rows if r.kernel == "few_rows" and r.op == op) for op in ("mlp", None))
    assert (mlp.occupancy, mlp.tensor, mlp.gbytes, mlp.stall) == (
        43.25,
        12.5,
        pytest.approx(2000),
        "long_scoreboard 75%",
    )
    assert (mlp.roof, mlp.limit, bare.occupancy) == (pytest.approx(0.5), "memory", 80.0)
    assert next(r for r in found.rows if r.kernel == "varlen_forward_kernel").occupancy is None
    assert any("cover 56.2% of the time" in note for note in found.notes)


def test_counters_of_several_launches_are_weighed_by_time(tmp_path):
    occupancy = "sm__warps_active.avg.pct_of_peak_sustained_active"
    launches = [
        {**KERNEL, "gpu__time_duration.sum": ns, occupancy: pct} for ns, pct in (("3000", "20"), ("1000", "60"))
    ]
    (row,) = report.of_counters(ncu.read(ncu_csv(tmp_path / "a.csv", launches))).rows
    assert (row.count, row.occupancy, row.total_ms) == (2, pytest.approx(30), pytest.approx(0.004))
    assert row.gbytes == pytest.approx((3000 * 25e6 / 3e-6 + 1000 * 25e6 / 1e-6) / 4000 / 1e9)


def test_flops_make_a_compute_roof(trace, tmp_path):
    counters = ncu.read(ncu_csv(tmp_path / "a.csv", [{**KERNEL, "name": "few_rows"}]))
    found = report.of_trace(trace, counters, peaks=ncu.Peaks(1e14, 1e15), flops={"few_rows": 1e12})
    top = found.rows[0]
    assert (top.limit, top.roof) == ("compute", pytest.approx(1e12 / 2e-3 / 1e15))


def test_markdown_and_table_escape_what_is_in_files(tmp_path):
    made = Recording()
    made.kernel("a|b`[red]<img>\x1b[2J", made.call(5, A), 100, NOWHERE)
    found = report.of_trace(nsys.read(made.write(tmp_path / "a.sqlite")))
    text = show.markdown(found)
    assert "a\\|b\\`[red]&lt;img>" in text and "\x1b" not in text
    console = Console(width=240, record=True, file=io.StringIO())
    show.show(found, console)
    assert "a|b`[red]<img>" in console.export_text()


def test_many_rows_are_cut_in_tables_only(tmp_path):
    found = report.of_trace(nsys.read(nested(3, 400).write(tmp_path / "a.sqlite")))
    paths = show.write(found, tmp_path / "new" / "folder")
    data = json.loads(paths[0].read_text())
    assert len(data["rows"]) == len(found.rows) > show.ROWS and data["format"] == report.FORMAT
    text = paths[1].read_text()
    assert f"{len(found.rows) - show.ROWS} more rows" in text
    assert text.count("\n| gemm |") + text.count("\n| softmax |") == show.ROWS


# -- command lines -----------------------------------------------------------------------------------------------------


def test_nsys_command(tmp_path):
    out = tmp_path / "100%p"
    words, result = commands.nsys_command(
        ["python", "x y.py", "--flag"], out, capture=names.nsys_capture("stage", "prefill")
    )
    assert words[:2] == ["nsys", "profile"] and words[-3:] == ["python", "x y.py", "--flag"]
    assert {
        "--trace=cuda,nvtx,osrt",
        "--export=sqlite",
        "--capture-range=nvtx",
        "--nvtx-capture=stage: prefill@vlmops",
    } <= set(words)
    assert f"--output={tmp_path}/100%%p/profile" in words and result == out / "profile.sqlite"
    assert not any("capture" in word for word in commands.nsys_command(["python"], out)[0])


def test_ncu_command(tmp_path):
    words, result = commands.ncu_command(
        ["python", "x.py"], tmp_path, kernel="mlp_.*", include=[names.ncu_include("op", "mlp")], skip=2, count=5
    )
    pairs = list(itertools.pairwise(words))
    assert words[0] == "ncu" and words[-2:] == ["python", "x.py"] and "--csv" in words and "--nvtx" in words
    assert {
        ("--page", "raw"),
        ("--print-units", "base"),
        ("--kernel-name", "regex:mlp_.*"),
        ("--launch-count", "5"),
    } <= set(pairs)
    assert ("--nvtx-include", "regex:vlmops@op: mlp( .*)?/") in pairs and ("--launch-skip", "2") in pairs
    sections = {"SpeedOfLight", "MemoryWorkloadAnalysis", "Occupancy", "WarpStateStats"}
    assert sections <= {b for a, b in pairs if a == "--section"}
    assert ("--log-file", str(tmp_path / "profile.csv")) in pairs and result == tmp_path / "profile.csv"
    metrics = next(b for a, b in pairs if a == "--metrics").split(",")
    assert {ncu.DURATION[0], ncu.TENSOR[0], ncu.OCCUPANCY[0], ncu.REGISTERS[0]} <= set(metrics)


@pytest.mark.parametrize("program", [[], [""], ["-x"], ["a", "b\0"], ["a\nb"]])
def test_programs_that_are_none(tmp_path, program):
    for build in (commands.nsys_command, commands.ncu_command):
        with pytest.raises(ValueError, match="program"):
            build(program, tmp_path)


def test_arguments_that_are_none(tmp_path):
    for options in ({"skip": -1}, {"count": 0}, {"kernel": ""}, {"include": [""]}, {"name": "../x"}):
        with pytest.raises(ValueError):
            commands.ncu_command(["a"], tmp_path, **options)


def test_a_missing_tool_says_what_to_run(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    words, result = commands.nsys_command(["python", "a b.py"], tmp_path / "out")
    with pytest.raises(ToolMissingError) as error:
        commands.record(words, result)
    text = str(error.value)
    assert "nsys profile --trace=cuda,nvtx,osrt" in text and "python 'a b.py'" in text and f"--from {result}" in text
    assert error.value.command == tuple(words) and not (tmp_path / "out").exists()


def fake(folder, name, body):
    """A program of a name that runs some Python with its arguments in ``args``."""
    path = folder / name
    path.write_text(f"#!{sys.executable}\nimport sys\nargs = sys.argv[1:]\n{body}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


def test_recording_runs_the_tool_without_a_shell(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    fake(tmp_path, "ncu", "open(args[args.index('--log-file') + 1], 'w').write('|'.join(args[-2:]))")
    words, result = commands.ncu_command(["program", "$(touch x); `y` 'z'"], tmp_path / "out")
    assert commands.record(words, result).read_text() == "program|$(touch x); `y` 'z'"


@pytest.mark.parametrize(("body", "word"), [("sys.exit(3)", "exit code 3"), ("", "made no")])
def test_a_failing_tool(tmp_path, monkeypatch, body, word):
    monkeypatch.setenv("PATH", str(tmp_path))
    fake(tmp_path, "nsys", body)
    words, result = commands.nsys_command(["program"], tmp_path)
    result.write_text("an older recording")
    with pytest.raises(ToolFailedError, match=word):
        commands.record(words, result)


# -- vlmops profile ----------------------------------------------------------------------------------------------------


@pytest.fixture
def run(monkeypatch, tmp_path):
    monkeypatch.setenv("COLUMNS", "240")
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.chdir(tmp_path)

    def invoke(*args):
        result = CliRunner().invoke(app, ["profile", *map(str, args)])
        assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
        return result.exit_code, result.stdout, result.stderr

    return invoke


def test_from_a_trace_and_counters(run, trace, tmp_path):
    table = ncu_csv(tmp_path / "a.csv", [{**KERNEL, "name": "few_rows"}])
    code, out, err = run("--from", trace.path, "--from", table, "--out", tmp_path / "r", "--json")
    data = json.loads(out)
    assert code == 0 and data["rows"][0]["occupancy"] == 43.25 and "wrote" in err
    assert json.loads((tmp_path / "r" / "nsight.json").read_text()) == data


def test_from_one_file_prints_tables_and_writes_nothing(run, trace, tmp_path):
    before = sorted(tmp_path.rglob("*"))
    code, out, _ = run("--from", trace.path)
    assert code == 0 and "few_rows" in out and "prefill" in out and "varlen_attention*" in out
    assert sorted(tmp_path.rglob("*")) == before
    code, out, _ = run("--from", ncu_csv(tmp_path / "b.csv", [KERNEL]))
    assert code == 0 and "mlp_few_rows" in out and "with locked clocks" in out


def test_files_that_cannot_be_read_exit_with_2(run, trace, tmp_path):
    for name, word in (
        ("a.nsys-rep", "nsys export"),
        ("a.ncu-rep", "--page raw"),
        ("x.sqlite", "no SQLite"),
        ("x.csv", "Kernel Name"),
    ):
        (tmp_path / name).write_bytes(b"no profile at all")
        code, _, err = run("--from", tmp_path / name)
        assert code == 2 and word in err and name in err
    assert run("--from", tmp_path / "nowhere.sqlite")[0] == 2
    assert run("--from", trace.path, "--from", trace.path)[0] == 2


@pytest.mark.parametrize("args", [(), ("--nsys",), ("--nsys", "--from", "x"), ("--from", "x", "program")])
def test_usage_errors(run, args):
    assert run(*args)[0] == 2


def test_recording_where_there_is_no_tool(run, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    code, _, err = run("--nsys", "--out", tmp_path / "o", "--", "python", "x.py", "--flag")
    assert code == 2 and "nsys profile" in err and "python x.py --flag" in err and "vlmops profile --from" in err


def test_recording_with_both_tools(run, trace, tmp_path, monkeypatch):
    table = ncu_csv(tmp_path / "made.csv", [{**KERNEL, "name": "few_rows"}])
    monkeypatch.setenv("PATH", str(tmp_path))
    copy = "import shutil; shutil.copy({!r}, {})"
    target = "[a for a in args if a.startswith('--output=')][0][9:] + '.sqlite'"
    fake(tmp_path, "nsys", copy.format(str(trace.path), target))
    fake(tmp_path, "ncu", copy.format(str(table), "args[args.index('--log-file') + 1]"))
    code, out, _ = run("--nsys", "--ncu", "--json", "--", "program")
    assert code == 0 and json.loads(out)["rows"][0]["occupancy"] == 43.25
    assert (tmp_path / "profile" / "nsight.md").is_file()
