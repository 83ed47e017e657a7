"""`pytest --benchmark`: loaded by the checkout's conftest.py, and only then.

A group of peers is timed in common rounds when the first of its tests runs; each test then hands its own rounds to
pytest-benchmark by a clock that repeats them. So that package's table, JSON, comparison and storage hold interleaved times.
"""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vlmops.backends import ranges
from vlmops.profiling.suite import measure as measuring
from vlmops.profiling.suite import report
from vlmops.profiling.suite.cases import Case
from vlmops.profiling.suite.chosen import Chosen
from vlmops.profiling.suite.group import first_line
from vlmops.profiling.suite.measure import Measured
from vlmops.profiling.suite.models import Model

__all__ = ["Rounds"]

SECONDS = 3600  # a group's first test makes everybody ready and times them
STATE = pytest.StashKey["State"]()
CLOCK = pytest.StashKey["Rounds"]()


class Rounds:
    """A clock that shows recorded times: ``reset`` before a round, ``advance`` instead of the work."""

    def __init__(self) -> None:
        self.seconds: tuple[float, ...] = ()
        self.done, self.shown = 0, 0.0

    def __call__(self) -> float:
        return self.shown

    def reset(self) -> None:
        """Back to 0, so that a round's difference is its time to the last bit."""
        self.shown = 0.0

    def advance(self) -> None:
        """By the time of the next round."""
        self.shown = self.seconds[self.done]
        self.done += 1


class State:
    """What one session has chosen and measured."""

    def __init__(self, config: pytest.Config) -> None:
        get = config.getoption
        try:
            self.chosen = Chosen.of(
                op=get("op"), model=get("model"), dtype=get("dtype"), peers=get("peers"), backend=get("backend"),
                device=get("device"), threads=get("threads"), quick=get("quick"), nvtx=get("nvtx"),
                timed=not (get("benchmark_disable") and not get("benchmark_enable")),
            )  # fmt: skip
        except ValueError as err:
            raise pytest.UsageError(str(err)) from err
        if self.chosen.nvtx and ranges.installed() is None:
            raise pytest.UsageError("--nvtx: the package is not installed: pip install nvtx")
        args = [str(arg) for arg in config.invocation_params.args]
        self.run = report.Run(self.chosen, shlex.join(["pytest", *args]))
        self.folder = Path(get("report")) if get("report") else None
        self.begin = time.perf_counter()
        self.measured: dict[str, Measured] = {}
        self.names: dict[str, list[str]] = {}
        self.written: list[Path] = []

    def of(self, case: Case | Model, dtype: str) -> Measured:
        """The group's results: measured when they are first asked for."""
        group = measuring.group_name(case, dtype, self.chosen)
        if group not in self.measured:
            try:
                found = measuring.measure(case, dtype, self.names[group], self.chosen)
            except Exception as err:  # this test shows the traceback; the group's others need not try again
                self._keep(Measured(group, failed=dict.fromkeys(self.names[group], f"it raised {first_line(err)}")))
                raise
            self._keep(found)
        return self.measured[group]

    def _keep(self, found: Measured) -> None:
        self.measured[found.group] = found
        self.run.groups.append(found)


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("numprocesses", None) or hasattr(config, "workerinput"):
        raise pytest.UsageError("--benchmark measures, which several processes at once would spoil: leave -n out")
    if not config.pluginmanager.hasplugin("benchmark"):
        raise pytest.UsageError("--benchmark needs pytest-benchmark: pip install pytest-benchmark")
    config.addinivalue_line("python_files", "bench_*.py")
    config.stash[STATE] = State(config)
    if config.args_source in (pytest.Config.ArgsSource.TESTPATHS, pytest.Config.ArgsSource.INVOCATION_DIR):
        config.args[:] = [str(config.rootpath / "benchmarks")]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One test a candidate, the candidates of a group behind each other."""
    if "interleaved" not in metafunc.fixturenames:
        return
    chosen = metafunc.config.stash[STATE].chosen
    values, ids = [], []
    for case in metafunc.module.CASES:
        for dtype in chosen.dtypes:
            for name in case.names(chosen):
                values.append((case, dtype, name))
                ids.append(f"{case.key}-{dtype}-{name}")
    metafunc.parametrize("interleaved", values, ids=ids, indirect=True)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect what was not asked for; give each benchmark its group and its clock."""
    state, keep, drop = config.stash[STATE], [], []
    for item in items:
        found = _parameters(item)
        if found is None:
            keep.append(item)
            continue
        case, dtype, _ = found
        if not case.chosen(state.chosen):
            drop.append(item)
            continue
        keep.append(item)
        clock = item.stash[CLOCK] = Rounds()
        group = measuring.group_name(case, dtype, state.chosen)
        item.add_marker(pytest.mark.benchmark(timer=clock, group=group))
        if config.pluginmanager.hasplugin("timeout"):
            item.add_marker(pytest.mark.timeout(SECONDS))
        what = case.what if case.kind == "op" else f"{case.what} ({case.key})"
        state.run.absent.update({(what, peer): case.absent(peer) for peer in state.chosen.peers if case.absent(peer)})
    if drop:
        config.hook.pytest_deselected(items=drop)
        items[:] = keep


def pytest_collection_finish(session: pytest.Session) -> None:
    """Who is left in each group, after -k and the like."""
    state = session.config.stash[STATE]
    for item in session.items:
        found = _parameters(item)
        if found is not None:
            case, dtype, name = found
            state.names.setdefault(measuring.group_name(case, dtype, state.chosen), []).append(name)


def _parameters(item: pytest.Item) -> tuple[Case | Model, str, str] | None:
    call = getattr(item, "callspec", None)
    return None if call is None else call.params.get("interleaved")


@pytest.fixture
def interleaved(request: pytest.FixtureRequest, benchmark: Any) -> Callable[[], None]:
    """Check and time this test's group, if no test before did, and report this test's candidate.

    Fails for a wrong output, skips what is left out, with the reason.
    """
    case, dtype, name = request.param
    state, clock = request.config.stash[STATE], request.node.stash[CLOCK]

    def run() -> None:
        found = state.of(case, dtype)
        if name in found.failed:
            benchmark.has_error = True
            pytest.fail(f"{found.group}: {name}: {found.failed[name]}", pytrace=False)
        if name in found.left_out:
            pytest.skip(f"{name} is left out: {found.left_out[name]}")
        if not state.chosen.timed:
            benchmark.pedantic(lambda: None)
            return
        row = found.rows[name]
        clock.seconds = row.seconds
        benchmark.extra_info.update(row.extra())
        benchmark.pedantic(clock.advance, setup=clock.reset, rounds=len(row.seconds))

    return run


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    state = session.config.stash[STATE]
    state.run.seconds = time.perf_counter() - state.begin
    if state.folder is not None and state.run.groups:
        try:
            state.written = report.write(state.run, state.folder)
        except OSError as err:
            print(f"--report: cannot write: {err}", file=sys.stderr)


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    state = config.stash[STATE]
    if not state.run.groups:
        return
    terminalreporter.section("vlmops: peers in common rounds, medians; ratios with 95% intervals")
    for line in report.lines(state.run):
        terminalreporter.write_line(line)
    for path in state.written:
        terminalreporter.write_line(f"written: {path}")
