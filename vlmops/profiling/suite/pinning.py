"""Threads of everybody on the same few cores, one hardware thread of each."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from vlmops.profiling.timing import num_threads

__all__ = ["cores", "pinned"]

TOPOLOGY = Path("/sys/devices/system/cpu")


def cores(allowed: set[int], wanted: int, topology: Path = TOPOLOGY) -> set[int]:
    """The lowest ``wanted`` processors of those allowed, no two on one core while there are cores left.

    Args:
        allowed: numbers of the processors this process may use.
        wanted: how many, at least 1.
        topology: where Linux lists the processors.
    """
    firsts: list[int] = []
    seconds: list[int] = []
    seen: set[str] = set()
    for cpu in sorted(allowed):
        try:
            core = (topology / f"cpu{cpu}" / "topology" / "thread_siblings_list").read_text().strip()
        except OSError:
            core = str(cpu)
        (seconds if core in seen else firsts).append(cpu)
        seen.add(core)
    return set((firsts + seconds)[:wanted])


def _affinities() -> dict[int, set[int]]:
    found = {}
    for name in os.listdir("/proc/self/task"):
        with contextlib.suppress(OSError):  # a thread may end meanwhile
            found[int(name)] = os.sched_getaffinity(int(name))
    return found


@contextlib.contextmanager
def pinned(threads: int) -> Iterator[set[int]]:
    """``threads`` torch threads, and every thread of this process kept on as many cores; yields them, none where that fails.

    The scheduler may still move a thread between these cores.
    """
    before: dict[int, set[int]] = {}
    chosen: set[int] = set()
    with num_threads(threads):
        with contextlib.suppress(OSError, AttributeError):  # not Linux, or not allowed
            before = _affinities()
            chosen = cores(os.sched_getaffinity(0), threads)
            for thread in before:
                with contextlib.suppress(OSError):
                    os.sched_setaffinity(thread, chosen)
        try:
            yield chosen
        finally:
            main = before.get(os.getpid())
            for thread in _affinities() if before else ():  # those that were started inside too
                with contextlib.suppress(OSError):
                    os.sched_setaffinity(thread, before.get(thread, main or chosen))
