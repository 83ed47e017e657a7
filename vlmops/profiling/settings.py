"""How a benchmark run was asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from vlmops.profiling.timing import MIN_ROUNDS, Comparison, compare

__all__ = ["Settings"]


@dataclass(frozen=True)
class Settings:
    """Options of a run.

    Args:
        ops, models, stacks, dtypes: names of ``bars.OPS``, ``bars.MODELS``, ``bars.STACKS``, ``bars.DTYPES``.
        threads: torch threads.
        rounds: timed rounds of each comparison.
        warmup: untimed runs before.
        quick: smaller towers and no long attention: a check that everything runs, not a figure to quote.
        full: whole towers instead of 4 layers.
        peers: extra peers: "compile".
    """

    ops: tuple[str, ...] = ()
    models: tuple[str, ...] = ()
    stacks: tuple[str, ...] = ()
    dtypes: tuple[str, ...] = ("bf16", "fp32")
    threads: int | None = 2
    rounds: int = MIN_ROUNDS
    warmup: int = 2
    quick: bool = False
    full: bool = False
    peers: tuple[str, ...] = ()

    def compare(
        self, calls: Mapping[str, Callable[[], Any]], correct: Callable[[dict[str, Any]], Any] | None
    ) -> Comparison:
        """``timing.compare`` with these rounds, warm-up and threads."""
        return compare(calls, rounds=self.rounds, warmup=self.warmup, threads=self.threads, correct=correct)
