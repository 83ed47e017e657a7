"""Recorded runs with what is in them known: figures, and the files of every kind that `vlmops bench compare` reads."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import random
import statistics

from vlmops.profiling.bars import Row
from vlmops.profiling.bench import as_dict
from vlmops.profiling.run_files import Figure, Recorded
from vlmops.profiling.settings import Settings
from vlmops.profiling.timing import Ratio, bootstrap_ratio

__all__ = [
    "ROUNDS",
    "bad",
    "bench_json",
    "pytest_json",
    "recorded",
    "report_json",
    "rounds",
    "without_rounds",
    "writer",
]

ROUNDS = 9


def rounds(median: float, noise: float, rng: random.Random, count: int = ROUNDS) -> tuple[float, ...]:
    """Times with log-normal noise, and now and then a disturbed one."""
    return tuple(median * math.exp(rng.gauss(0, noise)) * (1.5 if rng.random() < 0.02 else 1) for _ in range(count))


@functools.cache
def recorded(ours: float, noise: float = 0.02, seed: int = 0, drift: float = 0.05, machine: float = 1.0) -> Recorded:
    """A run of one row: a peer of 10 ms, ours of ``ours`` ms, both under a drift that differs from round to round."""
    rng = random.Random(seed)
    slow = [machine * math.exp(rng.gauss(0, drift)) for _ in range(ROUNDS)]
    mine = tuple(x * d for x, d in zip(rounds(ours, noise, rng), slow, strict=True))
    peer = tuple(x * d for x, d in zip(rounds(10.0, noise, rng), slow, strict=True))
    ratio = statistics.median(peer) / statistics.median(mine)
    found = Recorded("run.json", "vlmops bench")
    found.add(Figure("mlp: small, fp32", "vs torch", ratio, numerator=peer, denominator=mine, bound="compute"))
    return found


def without_rounds(run: Recorded) -> Recorded:
    """The same run as a file without rounds gives it."""
    found = Recorded(run.path, run.kind, facts=run.facts)
    for f in run.figures.values():
        ratio = bootstrap_ratio(f.numerator, f.denominator)
        found.add(Figure(f.group, f.what, f.value, f.higher, ratio.low, ratio.high, bound=f.bound))
    return found


def bench_json(ours: float = 5.0, seed: int = 0, **changes) -> dict:
    """What `vlmops bench --json` writes, by the code that writes it."""
    (fig,) = recorded(ours, seed=seed).figures.values()
    fig = dataclasses.replace(fig, low=fig.value * 0.97, high=fig.value * 1.03)
    row = Row("mlp", "small", "fp32", "vs torch", None, 1.4, backend="cpu", gflops=3.0)
    row.add(Ratio(fig.value, fig.low, fig.high, fig.numerator, fig.denominator))
    cost = Row("overhead", "Attention", "fp32", "us per op call", 2.0, 15.0, higher=False)
    cost.add(Ratio(2.0, 1.5, 2.5, (14.0,) * ROUNDS, (7.0,) * ROUNDS))
    return as_dict([row, cost], {"fp32": 100.0}, Settings()) | changes


def report_json(ours: float = 5.0, seed: int = 0, **changes) -> dict:
    """The suites' report.json: each candidate's rounds, and its ratio to each peer."""
    (fig,) = recorded(ours, seed=seed).figures.values()
    group = dict(group="mlp: small, fp32", what="mlp", case="small", dtype="fp32", bound="compute", share_of_peak=0.5)
    ratio = dict(ratio=fig.value, low=fig.value * 0.97, high=fig.value * 1.03)
    rows = [
        group | dict(candidate="vlmops", seconds=list(fig.denominator), peers={"torch": ratio}),
        group | dict(candidate="torch", seconds=list(fig.numerator), peers={"vlmops": dict(ratio=1 / fig.value)}),
        group | dict(group="rotary: x, fp32", candidate="vlmops", seconds=[1.0] * ROUNDS, peers={}, bound="memory"),
    ]
    data = {
        "kind": "vlmops benchmark report", "format": 1, "machine": {"cpu": "CPU", "cores": 2}, "native": "avx2",
        "versions": {"torch": "2.13.0", "openvino": None}, "settings": {"threads": 2, "dtypes": ["fp32"], "device": "cpu"},
        "commit": "abc", "rows": rows, "failed": [],
    }  # fmt: skip
    return data | changes


def pytest_json(report: dict, data: bool = True) -> dict:
    """The same in pytest-benchmark's JSON."""
    benchmarks = []
    for row in report["rows"]:
        stats = {
            "median": statistics.median(row["seconds"]),
            "rounds": ROUNDS,
            **({"data": row["seconds"]} if data else {}),
        }
        extra = {k: v for k, v in row.items() if k != "seconds"}
        name = f"test_speed[{row['candidate']}]"
        benchmarks.append(
            {"name": name, "fullname": f"bench.py::{name}", "group": row["group"], "extra_info": extra, "stats": stats}
        )
    info = {"cpu": {"brand_raw": "CPU", "count": 2}, "python_version": "3.11"}
    commit = {"id": "0123456789abcdef", "dirty": True}
    return {"machine_info": info, "commit_info": commit, "benchmarks": benchmarks, "version": "5.0.0"}


def bad(**row) -> dict:
    """A report whose first row has something else in it."""
    data = report_json()
    data["rows"][0].update(row)
    return data


def writer(folder):
    """write(data, name) puts a file of that text, or of that JSON, into the folder, and gives its path."""

    def make(data, name: str = "a.json"):
        path = folder / name
        path.write_text(data if isinstance(data, str) else json.dumps(data))
        return path

    return make
