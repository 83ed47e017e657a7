"""Recorded runs read back: every kind of file, and everything that is none."""

from __future__ import annotations

import json
import math
import statistics

import pytest
from typer.testing import CliRunner

from tests.support.recorded_runs import ROUNDS, bad, bench_json, pytest_json, report_json, writer
from vlmops.cli import app
from vlmops.profiling import bench_ops, run_files
from vlmops.profiling.bars import Row
from vlmops.profiling.compare_runs import compare
from vlmops.profiling.run_files import RunFileError


@pytest.fixture
def write(tmp_path):
    return writer(tmp_path)


def test_a_run_of_bench(write):
    found = run_files.read(write(bench_json()))
    fig = found.figures["mlp: small, fp32", "vs torch"]
    assert fig.value == pytest.approx(statistics.median(fig.numerator) / statistics.median(fig.denominator))
    assert (len(fig.numerator), fig.bound, fig.raw) == (ROUNDS, "compute", False)
    cost = found.figures["overhead: Attention, fp32", "us per op call"]
    assert cost.raw and not cost.higher
    assert {"machine", "torch", "threads", "dtypes"} <= set(found.facts)


def test_a_run_of_bench_before_it_kept_rounds(write):
    data = bench_json()
    for row in data["rows"]:
        for name in ("numerator", "denominator", "scale"):
            del row[name]
    (row, _) = compare(run_files.read(write(data)), run_files.read(write(data))).rows
    assert row.basis == "intervals" and row.speed == 1.0


def test_what_bench_measures_can_be_compared(monkeypatch, write):
    """A real comparison's rows carry the rounds they were made of."""

    def rows(settings):
        row = Row("mlp", "tiny", "fp32", "vs peer", None, 1.0)
        found = settings.compare({"vlmops": lambda: sum(range(300)), "peer": lambda: sum(range(400))}, None)
        yield row.add(found.speedup("vlmops", "peer"), found["vlmops"])

    monkeypatch.setattr(bench_ops, "mlp_rows", rows)
    out = write("", "out.json")
    result = CliRunner().invoke(app, ["bench", "--op", "mlp", "--dtype", "fp32", "--json", str(out)])
    assert result.exit_code == 0, result.output
    (row,) = json.loads(out.read_text())["rows"]
    assert len(row["numerator"]) == len(row["denominator"]) == 7
    ratio = statistics.median(row["numerator"]) / statistics.median(row["denominator"])
    assert row["scale"] * ratio == pytest.approx(row["measured"])
    (change,) = compare(run_files.read(out), run_files.read(out)).rows
    assert change.basis == "rounds" and change.speed == pytest.approx(1)


def test_a_report_of_the_suites(write):
    found = run_files.read(write(report_json()))
    fig = found.figures["mlp: small, fp32", "vs torch"]
    assert (len(fig.numerator), fig.bound, fig.higher) == (ROUNDS, "compute", True)
    assert statistics.median(fig.numerator) / statistics.median(fig.denominator) == pytest.approx(fig.value)
    assert ("mlp: small, fp32", "torch vs vlmops") not in found.figures  # a peer is not what is judged
    assert found.figures["rotary: x, fp32", "share of the peak"].value == 0.5
    assert found.commit == "abc" and found.facts["torch"] == "2.13.0" and "openvino" not in found.facts


@pytest.mark.parametrize("data", [True, False])
def test_pytest_benchmark(write, data):
    report = report_json()
    found = run_files.read(write(pytest_json(report, data)))
    same = run_files.read(write(report))
    assert {k: f.value for k, f in found.figures.items()} == {k: f.value for k, f in same.figures.items()}
    fig = found.figures["mlp: small, fp32", "vs torch"]
    assert len(fig.numerator) == (ROUNDS if data else 0) and fig.low is not None
    assert found.commit == "0123456789ab-dirty" and found.facts["machine"] == "CPU"


def test_a_suite_that_is_not_ours_is_compared_by_seconds(write):
    rows = [
        {
            "name": "test_a",
            "fullname": "b.py::test_a",
            "stats": {"data": [1.0 + i / 100 for i in range(ROUNDS)], "median": 1.04},
        }
    ]
    (row,) = compare(*(run_files.read(write({"benchmarks": rows})) for _ in range(2))).rows
    assert row.group == "b.py::test_a" and row.what == "seconds" and row.verdict == "same"


def test_two_kinds_of_files_of_the_same_suites(write):
    found = compare(
        run_files.read(write(report_json(5.0, 1))), run_files.read(write(pytest_json(report_json(6.2, 2)), "b.json"))
    )
    assert [(row.what, row.verdict) for row in found.rows] == [("vs torch", "slower"), ("share of the peak", "same")]


def test_a_figure_that_is_there_twice(write):
    data = bench_json()
    data["rows"].append(data["rows"][0])
    found = run_files.read(write(data))
    assert len(found.figures) == 2 and "twice in the file" in found.notes[0]


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ("", "no JSON"),
        ("hello", "no JSON"),
        (json.dumps(report_json())[:-200], "the file ends in the middle|no JSON"),
        ("[1, 2]", "a JSON list"),
        ("{}", "expected the JSON of vlmops bench"),
        ({"rows": [], "peak_gflops": {}}, "without a single figure"),
        ({"format": 1, "kernels": {"a": 1}}, "no recorded run"),
        ("[" * 100000, "nested too deeply|no JSON"),
        ("9" * 5000, "no recorded run"),
        ({"benchmarks": [3]}, r"benchmarks\[0\]: expected an object"),
        ({"benchmarks": [{"name": "x", "stats": {}}]}, "neither data nor a median"),
        (bad(seconds=[0.0]), r"rows\[0\]: seconds: expected finite, positive numbers"),
        (bad(seconds=[1.0, math.nan]), "positive numbers"),
        (bad(seconds="fast"), "positive numbers"),
        (bad(peers={"torch": {"ratio": "2x"}}), "ratio: expected a finite number"),
        (bad(peers={"torch": {}}), "ratio: expected a number"),
        (bad(peers={"torch": 3}), "expected an object"),
        (bad(group=None), "group: expected a string"),
        (report_json(failed={"a": 1}), "failed: expected a list"),
        (report_json(settings=[1]), "settings: expected an object"),
        ({**bench_json(), "rows": [{"group": "g"}]}, "case: expected a string"),
        ({**bench_json(), "rows": [{**bench_json()["rows"][0], "measured": 10**400}]}, "measured: expected a finite"),
    ],
)
def test_files_that_are_no_run(write, data, words):
    with pytest.raises(RunFileError, match=words) as error:
        run_files.read(write(data))
    assert "a.json" in str(error.value)


def test_files_that_cannot_be_read(tmp_path, write, monkeypatch):
    with pytest.raises(RunFileError, match="cannot be read: No such file"):
        run_files.read(tmp_path / "nowhere.json")
    (tmp_path / "b.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RunFileError, match="no text"):
        run_files.read(tmp_path / "b.json")
    monkeypatch.setattr(run_files, "MAX_BYTES", 10)
    with pytest.raises(RunFileError, match="more than"):
        run_files.read(write(report_json()))
