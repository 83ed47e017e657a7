"""pytest-benchmark suites: one file an operation, one a model. A wrong output fails before anything is timed.

    pytest benchmarks/                          # everything (minutes)
    pytest benchmarks/bench_mlp.py -k fp32      # one operation
    pytest benchmarks/ --benchmark-json out.json

Figures of one group stand beside each other in the table, ours and the peers. They are timed one after the other; the
bars, which are interleaved, come from `vlmops bench`.
"""

from __future__ import annotations

import pytest
import torch

from vlmops.profiling import bars
from vlmops.profiling.peak import PEAK_WORK, peak_call
from vlmops.profiling.timing import MIN_ROUNDS

THREADS = 2


def pytest_configure(config):
    config.addinivalue_line("python_files", "bench_*.py")


@pytest.fixture(scope="session", autouse=True)
def threads():
    before = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.inference_mode():
        yield


@pytest.fixture(scope="session")
def peak_seconds():
    """Best time of the product that is called G, by dtype; measured once a session."""
    import time

    found = {}
    for name, dtype in bars.DTYPES.items():
        call, times = peak_call(dtype), []
        for _ in range(MIN_ROUNDS + 2):
            begin = time.perf_counter()
            call()
            times.append(time.perf_counter() - begin)
        found[name] = sorted(times)[len(times) // 2]
    return found


@pytest.fixture
def timed(benchmark, peak_seconds):
    """timed(group, dtype, call, work): run a call under pytest-benchmark and note its rate and share of G."""

    def run(group, dtype, call, work):
        benchmark.group = f"{group} {dtype}"
        benchmark.pedantic(call, rounds=MIN_ROUNDS, warmup_rounds=1)
        if benchmark.stats is None:  # --benchmark-disable
            return
        seconds = benchmark.stats.stats.median
        if work.flops:
            benchmark.extra_info["gflops"] = work.flops / seconds / 1e9
        benchmark.extra_info["gbytes"] = work.bytes / seconds / 1e9
        if work.flops:
            rate, peak = work.flops / seconds, PEAK_WORK.flops / peak_seconds[dtype]
            benchmark.extra_info["share_of_peak"] = rate / peak

    return run
