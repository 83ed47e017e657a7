"""`vlmops bench compare`: what is planted is found, what is noise is not called a regression."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest
from typer.testing import CliRunner

from tests.support.recorded_runs import ROUNDS, bad, bench_json, recorded, report_json, rounds, without_rounds, writer
from vlmops.cli import app
from vlmops.profiling import compare_runs
from vlmops.profiling.compare_runs import compare
from vlmops.profiling.run_files import Figure, Recorded


def verdict(a: Recorded, b: Recorded, **options) -> str:
    (row,) = compare(a, b, **options).rows
    return row.verdict


# -- verdicts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("strip", "repeats"), [(False, 100), (True, 20)])
def test_a_planted_regression_is_found(strip, repeats):
    """20% slower, on a machine half as fast: in 9 of 10 repeats at least, and never taken for anything else."""
    seen = []
    for seed in range(repeats):
        a, b = recorded(5.0, seed=2 * seed), recorded(6.0, seed=2 * seed + 1, machine=2.0)
        seen.append(verdict(*map(without_rounds, (a, b))) if strip else verdict(a, b))
    assert seen.count("slower") >= 0.9 * repeats and set(seen) <= {"slower", "unclear"}
    assert verdict(recorded(6.0, seed=1), recorded(5.0, seed=2)) == "faster"


@pytest.mark.parametrize(
    ("strip", "noise", "repeats"), [(False, 0.01, 200), (False, 0.04, 200), (False, 0.15, 200), (True, 0.04, 40)]
)
def test_noise_is_no_regression(strip, noise, repeats):
    """Of repeats of one code at most 1 in 20 may be called slower, and as many faster, whatever the noise."""
    seen = []
    for seed in range(repeats):
        a, b = (recorded(5.0, noise=noise, seed=1000 + 2 * seed + i) for i in range(2))
        seen.append(verdict(*map(without_rounds, (a, b))) if strip else verdict(a, b))
    assert seen.count("slower") <= repeats / 20 and seen.count("faster") <= repeats / 20
    if noise == 0.01:
        assert seen.count("same") >= 0.8 * repeats  # and a quiet machine is believed


def test_intervals_cover_the_truth():
    """A change of 10% lies inside 95% intervals in 9 of 10 repeats at least: medians of 9 rounds are a coarse sample."""
    inside = 0
    for seed in range(200):
        a, b = recorded(5.0, noise=0.05, seed=2 * seed), recorded(5.5, noise=0.05, seed=2 * seed + 1)
        (row,) = compare(a, b).rows
        assert row.low <= row.speed <= row.high and row.basis == "rounds"
        inside += row.low <= 1 / 1.1 <= row.high
    assert inside >= 180


def test_drift_inside_a_run_does_not_widen_a_change():
    """Each round has its own ratio: a machine that halves its speed for a while hits both of its times alike."""
    (calm,) = compare(recorded(5.0, drift=0.0, seed=1), recorded(5.0, drift=0.0, seed=2)).rows
    (stormy,) = compare(recorded(5.0, drift=0.5, seed=1), recorded(5.0, drift=0.5, seed=2)).rows
    assert stormy.high - stormy.low < 1.5 * (calm.high - calm.low)


def test_the_change_is_that_of_the_rounds():
    """Known by hand: a ratio of 4 in every round, then one of 2 with a factor that only this file has."""
    ones = (1.0,) * ROUNDS
    a, b = (figure(4.0, numerator=(x,) * ROUNDS, denominator=ones, scale=s) for x, s in ((4.0, 1.0), (2.0, 1.5)))
    (row,) = compare(a, b).rows
    assert (row.speed, row.low, row.high) == (pytest.approx(0.75),) * 3 and row.verdict == "slower"


def figure(value: float, low: float | None = None, high: float | None = None, **more) -> Recorded:
    run = Recorded("run.json", "vlmops bench")
    run.add(Figure("g", more.pop("what", "vs torch"), value, low=low, high=high, **more))
    return run


@pytest.mark.parametrize(
    ("low", "value", "high", "want"),
    [
        (1.94, 2.0, 2.06, "same"),
        (1.5, 1.6, 1.7, "slower"),
        (2.4, 2.5, 2.6, "faster"),
        (1.0, 2.0, 4.0, "unclear"),
        (1.84, 1.88, 1.92, "unclear"),  # below the old figure, and perhaps by less than the tolerance
    ],
)
def test_verdicts_by_where_the_interval_lies(low, value, high, want):
    (row,) = compare(figure(2.0, 1.999, 2.001), figure(value, low, high)).rows
    assert row.verdict == want and row.basis == "intervals"
    assert row.low == pytest.approx(low / 2, rel=2e-3) and row.high == pytest.approx(high / 2, rel=2e-3)
    assert ("slower, by less or by more" in row.note) is (value == 1.88)


def test_where_less_is_better_the_change_turns():
    a, b = (figure(v, v * 0.99, v * 1.01, what="time / budget", higher=False) for v in (1.0, 1.3))
    (row,) = compare(a, b).rows
    assert row.verdict == "slower" and row.speed == pytest.approx(1 / 1.3)
    assert row.low < row.speed < row.high < 0.8
    assert compare(b, a).rows[0].verdict == "faster"


def test_the_tolerance_decides_what_matters():
    a, b = figure(2.0, 1.999, 2.001), figure(1.88, 1.87, 1.89)
    assert [verdict(a, b, tolerance=t) for t in (0.0, 0.05, 0.1)] == ["slower", "slower", "same"]
    with pytest.raises(ValueError, match="tolerance"):
        compare(a, b, tolerance=1.5)


def test_figures_without_an_interval_are_never_a_regression():
    (row,) = compare(figure(1.0), figure(0.5)).rows
    assert (row.verdict, row.low, row.basis) == ("unclear", None, "nothing") and "no interval" in row.note
    assert verdict(figure(1.0), figure(1.03)) == "same"
    assert verdict(figure(-0.1), figure(0.1)) == "unclear"  # a cost that noise made negative
    few = dict(numerator=(1.0, 1.1), denominator=(1.0, 1.0))
    assert compare(figure(1.0, **few), figure(2.0, **few)).rows[0].basis == "nothing"


def test_rounds_of_one_run_and_the_interval_of_the_other():
    a = recorded(5.0, seed=1)
    (row,) = compare(a, without_rounds(recorded(8.0, seed=2))).rows
    assert row.basis == "intervals" and row.verdict == "slower"


def test_seconds_of_another_machine_say_nothing():
    def seconds(median: float, cpu: str) -> Recorded:
        times = rounds(median, 0.01, random.Random(3))
        run = figure(median, what="seconds", higher=False, raw=True, numerator=times, denominator=(1.0,) * ROUNDS)
        run.facts["machine"] = cpu
        return run

    (row,) = compare(seconds(1.0, "x"), seconds(1.5, "x")).rows
    assert row.verdict == "slower" and "how fast the machine was" in row.note
    (row,) = compare(seconds(1.0, "x"), seconds(1.5, "y")).rows
    assert row.verdict == "unclear" and "another machine" in row.note


def test_rows_of_one_run_only():
    a, b = figure(1.0), figure(1.0)
    a.add(Figure("gone", "vs torch", 1.0))
    b.add(Figure("new", "vs torch", 1.0))
    found = compare(a, b)
    assert (found.only_a, found.only_b, len(found.rows)) == ([("gone", "vs torch")], [("new", "vs torch")], 1)


# -- repeatability -----------------------------------------------------------------------------------------------------


def test_repeatability():
    a, b = Recorded("a", "x"), Recorded("b", "x")
    for i in range(10):
        a.add(Figure(f"c{i}", "vs torch", 1.0, bound="compute"))
        b.add(Figure(f"c{i}", "vs torch", 1.09 if i < 9 else 0.8, bound="compute"))
    a.add(Figure("m", "vs torch", 1.0, low=0.5, high=2.0, bound="memory"))
    b.add(Figure("m", "vs torch", 1.8, low=1.0, high=3.0, bound="memory"))
    a.add(Figure("u", "vs torch", 1.0))
    b.add(Figure("u", "vs torch", 1.0))
    data = compare_runs.repeatability(compare(a, b))
    assert (data["rows"], data["within"], data["met"]) == (10, pytest.approx(0.9), True)
    assert [row["group"] for row in data["beyond"]] == ["c9"]
    assert [(row["group"], row["low"] is None) for row in data["not_compute"]] == [("m", False), ("u", True)]
    b.figures["c0", "vs torch"] = Figure("c0", "vs torch", 1.0 / 1.11, bound="compute")
    assert compare_runs.repeatability(compare(a, b))["met"] is False
    assert compare_runs.repeatability(compare(figure(1.0), figure(1.0)))["met"] is None


# -- the command -------------------------------------------------------------------------------------------------------


@pytest.fixture
def write(tmp_path):
    return writer(tmp_path)


@pytest.fixture
def run(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("NO_COLOR", "1")

    def invoke(*args):
        result = CliRunner().invoke(app, ["bench", *map(str, args)])
        assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
        return result.exit_code, result.stdout, result.stderr

    return invoke


def test_strict_exits_1_for_a_slower_row_alone(run, write):
    a, slow, noise = (
        write(report_json(5.0, 1)),
        write(report_json(6.2, 2), "s.json"),
        write(report_json(5.0, 3), "n.json"),
    )
    code, out, _ = run("compare", a, slow)
    assert code == 0 and "slower" in out and "1 slower" in out and "95% interval" in out
    assert run("compare", a, slow, "--strict")[0] == 1
    assert run("compare", a, slow, "--strict", "--tolerance", "0.5")[0] == 0
    assert run("compare", slow, a, "--strict")[0] == 0
    code, out, _ = run("compare", a, noise, "--strict")
    assert code == 0 and "0 slower" in out


def test_what_differs_between_the_runs_is_told_loudly(run, write):
    b = report_json(
        machine={"cpu": "Other", "cores": 64}, versions={"torch": "2.12.0"}, settings={"threads": 8, "dtypes": ["bf16"]}
    )
    code, out, _ = run("compare", write(report_json()), write(b, "b.json"))
    assert code == 0 and "NOT OF THE SAME CONDITIONS" in out
    for line in ("machine: CPU  |  Other", "threads: 2  |  8", "dtypes: fp32  |  bf16", "torch: 2.13.0  |  2.12.0"):
        assert line in out
    assert "CONDITIONS" not in run("compare", write(report_json()), write(report_json(), "b.json"))[1]


def test_json_and_rows_of_one_run_only(run, write, tmp_path):
    b = report_json()
    b["rows"][2]["group"] = "norms: y, fp32"
    a, b = write(report_json()), write(b, "b.json")
    code, out, _ = run("compare", a, b, "--json", "-")
    data = json.loads(out)
    assert code == 0 and data["only_a"] == [["rotary: x, fp32", "share of the peak"]]
    assert data["only_b"] == [["norms: y, fp32", "share of the peak"]]
    (row,) = data["rows"]
    assert row["verdict"] == "same" and row["basis"] == "rounds" and row["low"] <= row["speed"] <= row["high"]
    code, out, _ = run("compare", a, b, "--json", tmp_path / "c.json")
    assert json.loads((tmp_path / "c.json").read_text()) == data and "only in A: rotary" in out
    assert run("compare", a, b, "--json", tmp_path / "no" / "c.json")[0] == 2


def test_an_output_that_became_wrong_is_a_regression(run, write):
    b = report_json(failed=[{"group": "rotary: x, fp32", "candidate": "vlmops", "reason": "off by 3"}])
    a, b = write(report_json()), write(b, "b.json")
    code, out, _ = run("compare", a, b, "--strict")
    assert code == 1 and "WRONG OUTPUT in B: rotary: x, fp32, vlmops: off by 3" in out
    assert run("compare", b, b, "--strict")[0] == 0  # it was wrong before


def test_the_repeatability_command(run, write):
    a, b = write(report_json(5.0, 1)), write(report_json(6.2, 2, commit="def"), "b.json")
    code, out, _ = run("compare", a, b, "--repeatability", "--strict")
    assert code == 1 and "0% of 1 compute-bound rows" in out and "MISSED" in out and "differs by" in out
    assert "commit: abc  |  def" in out and "not compute-bound" in out
    code, out, _ = run("compare", a, a, "--repeatability", "--strict", "--json", "-")
    assert code == 0 and json.loads(out)["repeatability"]["met"] is True


def test_usage(run, write):
    a = write(report_json())
    assert run("compare", a)[0] == 2
    assert run("compare", a, a, "--tolerance", "1")[0] == 2
    code, _, err = run("compare", a, write("{", "t.json"))
    assert code == 2 and "t.json: no JSON" in err
    assert run("compare", a, write(bench_json(), "b.json"))[0] == 0  # "mlp: small, fp32, vs torch" is in both
    other = report_json()
    for row in other["rows"]:
        row["group"] = f"other {row['group']}"
    code, _, err = run("compare", a, write(other, "o.json"))
    assert code == 2 and "no row in common" in err
    code, _, err = run("--op", "mlp", "compare", a, a)
    assert code == 2 and "--op" in err and "behind 'compare'" in err


def test_names_in_files_do_not_reach_the_terminal_raw(run, write):
    data = bad(peers={"a\x1b[2J[red]x": {"ratio": 2.0}})
    path = write(data)
    out = run("compare", path, path)[1]
    assert "\x1b[2J" not in out and "[red]x" in out


def test_the_same_files_give_the_same_answer():
    a, b = recorded(5.0, seed=1), recorded(5.3, seed=2)
    assert compare(a, b).rows == compare(a, b).rows
    before = np.random.get_state()[1].copy()
    compare(a, b)
    assert (np.random.get_state()[1] == before).all()
