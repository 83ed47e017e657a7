"""Device time of calls: events around one call with cold caches, candidates interleaved, medians.

Before each sample a buffer twice as large as the L2 cache is written, and a spinning kernel holds the stream until the host has
queued the whole call: what is timed is the GPU's work, not Python. The host's own time is reported beside it.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch

from vlmops.profiling.timing import MIN_ROUNDS, Comparison, Timing

__all__ = ["Clock", "CudaClock", "interleave", "rotating"]

MOST_ROUNDS = 51
LONGEST_LEAD_S = 0.02
CYCLES_PER_S = 2.5e9  # no GPU clocks higher: the lead is at least as long as asked for
Run = Callable[[], Any]


class Clock(Protocol):
    """What ``interleave`` needs of a device."""

    def now(self) -> float:
        """Host seconds."""

    def synchronize(self) -> None:
        """Wait for the device."""

    def seconds(self, run: Run, host_seconds: float) -> float:
        """Device seconds of one call, of which queueing takes the host ``host_seconds``."""


class CudaClock:
    """CUDA events on the current stream of a device."""

    def __init__(self, device: torch.device) -> None:
        cache = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0) or (64 << 20)
        self.cache_bytes = int(cache)
        self.evict = torch.empty(2 * self.cache_bytes, dtype=torch.uint8, device=device)
        self.start, self.end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def now(self) -> float:
        return time.perf_counter()

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    def seconds(self, run: Run, host_seconds: float) -> float:
        self.evict.zero_()
        torch.cuda._sleep(int(CYCLES_PER_S * min(LONGEST_LEAD_S, 1.5 * host_seconds + 2e-5)))
        self.start.record()
        run()
        self.end.record()
        self.end.synchronize()
        return float(self.start.elapsed_time(self.end)) * 1e-3


def rotating(run: Callable[..., Any], copies: Sequence[tuple[Any, ...]]) -> Run:
    """``run`` on the next copy of its arguments at every call, so that no call finds what the last one left."""

    def turns() -> Iterator[tuple[Any, ...]]:
        while True:
            yield from copies

    following = turns()
    return lambda: run(*next(following))


def interleave(
    candidates: Mapping[str, Run], clock: Clock, *, seconds: float, least: int = MIN_ROUNDS, most: int = MOST_ROUNDS
) -> tuple[Comparison, dict[str, float]]:
    """Times of the candidates in rounds, each round in another order, and the host's seconds of each.

    Args:
        candidates: name -> call, their outputs checked before.
        clock: of the device.
        seconds: about how long all rounds together may take; at least ``least`` rounds run.
        least, most: rounds.

    Raises:
        ValueError: no candidates. RuntimeError: the clock did not advance.
    """
    if not candidates:
        raise ValueError("candidates: expected at least one")
    names, host = list(candidates), {}
    for name in names:
        candidates[name]()
        clock.synchronize()
        begin = clock.now()
        candidates[name]()
        host[name] = clock.now() - begin
        clock.synchronize()
    times: dict[str, list[float]] = {name: [] for name in names}
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        begin, rounds, done = clock.now(), most, 0
        while done < rounds:
            first = done % len(names)
            for name in names[first:] + names[:first]:
                times[name].append(clock.seconds(candidates[name], host[name]))
            done += 1
            spent = max(clock.now() - begin, 1e-9)
            rounds = min(most, max(least, int(seconds / (spent / done))))
    finally:
        if collecting:
            gc.enable()
    for name, found in times.items():
        if min(found) <= 0:
            raise RuntimeError(f"{name}: the clock did not advance; a time of 0 is no measurement")
    return Comparison({name: Timing(name, tuple(found)) for name, found in times.items()}), host
