"""varlen_attention against one SDPA a sequence."""

from __future__ import annotations

from functools import lru_cache

import pytest

from vlmops.profiling import bars, workloads

CASES = {case.name: case for case in bars.ATTENTION}


@lru_cache(maxsize=1)
def checked(name, dtype):
    """A case, the outputs of its calls compared once."""
    load = workloads.attention(CASES[name], bars.DTYPES[dtype])
    load.correct({who: call() for who, call in load.calls.items()})
    return load


@pytest.mark.parametrize("who", ["ours", "peer"])
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", bars.DTYPES)
def test_speed(timed, name, dtype, who):
    load = checked(name, dtype)
    peer = next(other for other in load.calls if other != workloads.OURS)
    timed(name, dtype, load.calls[workloads.OURS if who == "ours" else peer], load.work)
