"""`pytest --benchmark` from outside: options, failures, replayed times, JSON, reports. In-process, on a toy group."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import benchmarks as toy
from vlmops.profiling import memory, pytest_plugin, timing  # noqa: F401 - pytester drops what is imported inside of a run
from vlmops.profiling.suite import measure
from vlmops.profiling.timing import Comparison, Timing, Work

pytest_plugins = ["pytester"]
REPO = Path(__file__).resolve().parents[2]
GROUP = "sum: toy, n 8, fp32"


@pytest.fixture
def tree(pytester, monkeypatch):
    """A checkout of one benchmark and one test, under the real root conftest."""
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)  # pytest-benchmark switches itself off under xdist
    monkeypatch.setattr(measure, "_roofs", lambda *_: {
        "peak product": (lambda: sum(range(5000)), Work(1e6)), "peak copy": (lambda: sum(range(5000)), Work(bytes=1e6)),
    })  # fmt: skip
    monkeypatch.setattr(measure, "PAUSE", 0.0)
    monkeypatch.setattr(timing, "RESAMPLES", 50)
    monkeypatch.setattr(memory, "settle", lambda: 0)  # it collects garbage, which is a lot under pytest
    monkeypatch.setattr("pytest_benchmark.plugin.get_cpu_info", dict)
    for table in (toy.WRONG_FROM, toy.RAISES):
        table.clear()
    toy.CALLS.clear()
    pytester.makeconftest((REPO / "conftest.py").read_text())
    pytester.makepyprojecttoml(
        '[tool.pytest.ini_options]\ntestpaths = ["tests"]\n'
        'addopts = "--import-mode=importlib -p no:cacheprovider -p no:hypothesispytest"\n'
    )
    suite = "from tests.support.benchmarks import Toy\nCASES = ({})\ndef test_speed(interleaved):\n    interleaved()\n"
    for folder, name, text in (
        ("benchmarks", "bench_toy.py", suite.format('Toy(), Toy("long")')),
        ("tests", "test_plain.py", "def test_plain():\n    pass\n"),
    ):
        pytester.mkdir(folder).joinpath(name).write_text(text)
    return pytester


def run(tree, *args):
    return tree.runpytest_inprocess("--device=cpu", "--quick", "--benchmark", *args)


def saved(path):
    return {bench["extra_info"]["candidate"]: bench for bench in json.loads(Path(path).read_text())["benchmarks"]}


# -- options -----------------------------------------------------------------------------------------------------------


def test_plain_pytest_runs_tests_only(tree):
    result = tree.runpytest_inprocess("-v")
    result.assert_outcomes(passed=1)
    result.stdout.fnmatch_lines(["*test_plain*"])
    assert tree.runpytest_inprocess(".").parseoutcomes() == {"passed": 1}
    assert toy.CALLS == []


def test_the_root_conftest_imports_nothing_heavy():
    code = "import sys, conftest; print(sorted({'torch', 'vlmops', 'numpy'} & set(sys.modules)))"
    ran = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"


def test_the_option_runs_benchmarks_without_a_path(tree):
    result = run(tree)
    result.assert_outcomes(passed=3, deselected=3)  # the long one is not in a quick run
    assert "test_plain" not in result.stdout.str()


def test_benchmark_is_an_option_of_its_own(tree):
    """No abbreviation of --benchmark-json and its like, and those go on working beside it."""
    result = run(tree, "--benchmark-json=out.json", "--benchmark-autosave", "--benchmark-columns=median")
    result.assert_outcomes(passed=3, deselected=3)
    assert set(saved("out.json")) == {"vlmops", "torch", "compile"}
    assert list(tree.path.glob(".benchmarks/*/0001_*.json"))
    result = tree.runpytest_inprocess("--benchm")
    result.stderr.fnmatch_lines(["*unrecognized arguments: --benchm*"])


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--op=mpl"], "--op: 'mpl' is none of *linear*varlen_attention"),
        (["--model=gpt"], "--model: 'gpt' is none of qwen2_vl*llava"),
        (["--dtype=int8"], "--dtype: 'int8' is none of bf16, fp16, fp32"),
        (["--peers=torch,jax"], "--peers: 'jax' is none of torch, compile, openvino, onnxruntime, flash-attn, liger"),
        (["--backend=cublas"], "--backend: 'cublas' is none of auto, reference, torch, cpu, triton, cuda"),
        (["--device=tpu"], "--device: 'tpu' is none of cpu, cuda"),
        (["--threads=-1"], "--threads: expected at least 1, got -1"),
        (["-n2"], "--benchmark measures*leave -n out"),
    ],
)
def test_what_is_unknown_is_refused(tree, args, message):
    result = tree.runpytest_inprocess("--benchmark", *args)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines([f"ERROR: {message}*"])


def test_options_without_benchmark_are_refused(tree):
    result = tree.runpytest_inprocess("--op=mlp", "--quick")
    result.stderr.fnmatch_lines(["ERROR: --op, --quick: only with --benchmark"])


@pytest.mark.parametrize("path", ["benchmarks", "benchmarks/bench_toy.py", "benchmarks/bench_toy.py::test_speed"])
def test_a_path_without_the_option_says_what_to_pass(tree, path):
    result = tree.runpytest_inprocess(path)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["ERROR: benchmarks/ runs with --benchmark: *"])


def test_one_file_and_a_keyword_choose(tree):
    result = run(tree, "benchmarks/bench_toy.py", "-k", "vlmops or torch", "--benchmark-json=out.json")
    result.assert_outcomes(passed=2, deselected=4)
    assert set(saved("out.json")["vlmops"]["extra_info"]["peers"]) == {"torch"}
    assert "compile" not in toy.CALLS


# -- correctness -------------------------------------------------------------------------------------------------------


def test_a_wrong_output_fails_and_has_no_speed(tree):
    toy.WRONG_FROM["torch"] = 1
    result = run(tree, "--benchmark-json=out.json", "--report=out")
    result.assert_outcomes(passed=2, failed=1, deselected=3)
    result.stdout.fnmatch_lines([f"*{GROUP}: torch: wrong output: 9.0 is not 8*"])
    assert set(saved("out.json")) == {"vlmops", "compile"}
    report = json.loads(Path("out/report.json").read_text())
    assert report["failed"] == [{"group": GROUP, "candidate": "torch", "reason": "wrong output: 9.0 is not 8"}]
    assert [set(row["peers"]) for row in report["rows"]] == [{"compile"}, {"vlmops"}]
    assert toy.CALLS.count("torch") == 1  # it was not timed


def test_an_output_that_turns_wrong_fails_too(tree):
    """The last call before the clock starts is checked as well: a cache or a choice may have changed the answer."""
    toy.WRONG_FROM["vlmops"] = 3
    result = run(tree, "--benchmark-json=out.json")
    result.assert_outcomes(passed=2, failed=1, deselected=3)
    assert set(saved("out.json")["torch"]["extra_info"]["peers"]) == {"compile"}


def test_ours_raising_fails_and_a_peer_raising_is_left_out(tree):
    toy.RAISES.update(vlmops=ValueError("broken"), compile=ValueError("cannot trace"))
    result = run(tree, "-rs")
    result.assert_outcomes(passed=1, failed=1, skipped=1, deselected=3)
    result.stdout.fnmatch_lines(
        ["*vlmops: FAILED, it raised ValueError: broken", "*compile: left out, it raised ValueError: cannot trace"]
    )


def test_what_is_left_out_says_why(tree):
    result = run(tree, "--peers=torch,liger,openvino", "--report=out", "-rs")
    result.assert_outcomes(passed=2, skipped=1, deselected=3)
    result.stdout.fnmatch_lines(["SKIPPED*liger is left out: it needs a GPU"])
    assert json.loads(Path("out/report.json").read_text())["left_out"] == [
        {"group": GROUP, "candidate": "liger", "reason": "it needs a GPU"},
        {"group": "sum", "candidate": "openvino", "reason": "no export is written for it"},
    ]
    text = Path("out/report.md").read_text()
    assert "- liger: left out, it needs a GPU" in text
    assert "- no export is written for it: openvino of sum" in text


def test_a_call_that_takes_too_long_is_left_out(tree, monkeypatch):
    monkeypatch.setitem(toy.SECONDS, "compile", 0.06)
    monkeypatch.setattr("vlmops.profiling.suite.chosen.Chosen.longest_call", 0.05)
    result = run(tree)
    result.stdout.fnmatch_lines(["*compile: left out, one call takes 0.1 s, longer than the 0.05 s of this run"])
    assert toy.CALLS.count("compile") == 2


def test_disabled_checks_without_timing(tree):
    toy.WRONG_FROM["torch"] = 1
    result = run(tree, "--benchmark-disable")
    result.assert_outcomes(passed=2, failed=1, deselected=3)
    result.stdout.fnmatch_lines(["*right, not timed: vlmops, compile"])
    assert toy.CALLS.count("vlmops") == 2


# -- times -------------------------------------------------------------------------------------------------------------


def test_the_rounds_are_interleaved_and_rotate(tree):
    run(tree).assert_outcomes(passed=3, deselected=3)
    order = [name for i, name in enumerate(toy.CALLS) if i == 0 or toy.CALLS[i - 1] != name]
    rounds = "".join(name[0] for name in order)
    assert rounds.startswith("vtc" * 2)  # made ready, then warmed up, one behind the other
    # five calls a round with the two roofs, which are not listed: the first candidate rotates
    assert re.fullmatch("vtc(tcv|ctv|vtc|vct|tvc|cvt|[vtc]){12,}", rounds[6:])
    timed = toy.CALLS[len(toy.CALLS) // 2 :]
    assert {"vlmops", "torch", "compile"} == set(timed)


def test_pytest_benchmark_gets_the_interleaved_times_to_the_last_bit(tree, monkeypatch):
    known = {
        "vlmops": (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7), "torch": (0.3, 0.6, 0.9, 1.2, 1.5, 1.8, 2.1),
        "compile": (0.2,) * 6 + (9.0,), "peak product": (1e-3,) * 7, "peak copy": (1e-3,) * 7,
    }  # fmt: skip
    monkeypatch.setattr(measure, "compare", lambda *_, **__: Comparison({k: Timing(k, v) for k, v in known.items()}, 1))
    run(tree, "--benchmark-json=out.json", "--report=out").assert_outcomes(passed=3, deselected=3)
    found = saved("out.json")
    for name in ("vlmops", "torch", "compile"):
        assert tuple(found[name]["stats"]["data"]) == known[name]
        assert found[name]["group"] == found[name]["extra_info"]["group"] == GROUP
    extra = found["vlmops"]["extra_info"]
    assert extra["peers"]["torch"] == {"ratio": pytest.approx(3), "low": pytest.approx(3), "high": pytest.approx(3)}
    # 8 FLOP in 1e-3 / 1e6 s each are 8e-9 s, 32 bytes 32e-9 s: the memory's roof is nearer
    assert (extra["bound"], extra["intensity"], extra["ridge"]) == ("memory", 0.25, 1.0)
    assert extra["share_of_peak"] == pytest.approx(32e-9 / 0.4)
    assert (extra["gflops"], extra["gbytes"]) == (pytest.approx(20e-9), pytest.approx(80e-9))
    assert (extra["outliers"], found["compile"]["extra_info"]["outliers"]) == (0, 1)
    report = json.loads(Path("out/report.json").read_text())
    assert {row["candidate"]: tuple(row["seconds"]) for row in report["rows"]} == {k: known[k] for k in found}


def test_compare_reads_what_autosave_wrote(tree):
    run(tree, "--benchmark-autosave").assert_outcomes(passed=3, deselected=3)
    result = run(tree, "--benchmark-compare")
    result.assert_outcomes(passed=3, deselected=3)
    for source in ("NOW", "0001_"):  # in either order: the table is sorted by time
        result.stdout.fnmatch_lines([f"test_speed?toy-fp32-vlmops? ({source}*"])


# -- reports -----------------------------------------------------------------------------------------------------------


def test_the_report_says_where_and_what(tree):
    result = run(tree, "--report", "deep/out")
    result.stdout.fnmatch_lines(
        [f"{GROUP} (memory-bound)", "*candidate*ms*times as fast as", "*vlmops: backend toy backend", "3 measured in 1 groups*"]
    )  # fmt: skip
    data = json.loads(Path("deep/out/report.json").read_text())
    assert (data["kind"], data["format"]) == ("vlmops benchmark report", 1)
    assert data["command"] == "pytest --device=cpu --quick --benchmark --report deep/out"
    assert data["machine"]["cpu"] and data["versions"]["torch"] and re.match(r"\d{4}-\d\d-\d\d", data["date"])
    assert data["settings"]["peers"] == ["torch", "compile"] and data["settings"]["rounds"] == 7
    assert all(len(row["seconds"]) == 7 for row in data["rows"])
    text = Path("deep/out/report.md").read_text()
    assert f"## {GROUP} (memory-bound)" in text and "| vlmops |" in text and data["commit"] in text


def test_the_documents_list_every_key_of_the_report(tree):
    run(tree, "--report=out")
    data = json.loads(Path("out/report.json").read_text())
    text = (REPO / "docs" / "profiling.md").read_text()
    listed = set(re.findall(r"`(\w+)`", text[text.index("### report.json") :].split("\n## ")[0]))
    assert set(data) | set(data["rows"][0]) | set(data["rows"][0]["peers"]["torch"]) <= listed


def test_a_report_that_cannot_be_written_is_said(tree):
    tree.path.joinpath("file").write_text("")
    result = run(tree, "--report=file")
    result.assert_outcomes(passed=3, deselected=3)
    result.stderr.fnmatch_lines(["--report: cannot write: *"])


def test_nvtx_puts_a_range_around_each_candidate(tree, monkeypatch):
    opened = []

    class Package:
        class annotate:
            def __init__(self, message, **options):
                self.message = message

            def __enter__(self):
                opened.append(self.message)

            def __exit__(self, *_):
                pass

    monkeypatch.setattr("vlmops.backends.ranges.installed", lambda: Package)
    run(tree, "--nvtx", "--report=out").assert_outcomes(passed=3, deselected=3)
    assert {"module: vlmops (sum) | toy, n 8", "module: torch (sum) | toy, n 8", "op: sum"} <= set(opened)
    assert json.loads(Path("out/report.json").read_text())["settings"]["nvtx"] is True
    opened.clear()
    run(tree).assert_outcomes(passed=3, deselected=3)
    assert opened == []
    monkeypatch.setattr("vlmops.backends.ranges.installed", lambda: None)
    assert run(tree, "--nvtx").ret == pytest.ExitCode.USAGE_ERROR
