"""What is reported of one candidate of one group."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from vlmops.profiling.timing import Comparison, Timing, Work

__all__ = ["COMPUTE", "COPY", "Row", "describe"]

#: The machine's roofs, timed in the same rounds as the candidates.
COMPUTE, COPY = "peak product", "peak copy"


@dataclass
class Row:
    """A measured candidate.

    Args:
        group: op or model, case, dtype; the candidates of one group do the same work in the same rounds.
        what, case, dtype: the parts of the group.
        kind: "op" or "model".
        candidate: who.
        seconds: of one call, one value a round, in the order of the rounds.
        flops, bytes: least work of a call, by the op's cost function; 0 where none is stated.
        bound: "compute" or "memory": which of the two roofs is nearer to this work.
        intensity, ridge: FLOP a byte, of the work and of the machine.
        share_of_peak: the roof's time over the measured one.
        peers: name -> {"ratio", "low", "high"}: how many times as fast as that peer, and its 95% interval.
        backend: of ours.
        precision: where it is not the dtype.
        note: what else there is to say.
        prepare_seconds: making it ready took (compiling, converting); not timed.
        peak_memory: bytes by which one call makes the resident set grow at most; on a GPU the allocator's.
        process_peak_memory: the same for two calls in a process of its own, packed weights included.
    """

    group: str
    what: str
    case: str
    dtype: str
    kind: str
    candidate: str
    device: str
    seconds: tuple[float, ...]
    flops: float = 0.0
    bytes: float = 0.0
    bound: str = "memory"
    intensity: float | None = None
    ridge: float | None = None
    share_of_peak: float | None = None
    peers: dict[str, dict[str, float]] = field(default_factory=dict)
    backend: str = ""
    precision: str = ""
    note: str = ""
    prepare_seconds: float = 0.0
    peak_memory: int | None = None
    process_peak_memory: int | None = None

    @property
    def timing(self) -> Timing:
        """Its times."""
        return Timing(self.candidate, self.seconds)

    @property
    def outliers(self) -> int:
        """Rounds further than 1.5 interquartile ranges from the middle half (Tukey)."""
        return outliers(self.seconds)

    def extra(self) -> dict[str, Any]:
        """What stands beside the times in pytest-benchmark's JSON."""
        timing, work = self.timing, Work(self.flops, self.bytes)
        return {
            "group": self.group, "what": self.what, "case": self.case, "dtype": self.dtype, "kind": self.kind,
            "candidate": self.candidate, "device": self.device, "bound": self.bound, "peers": self.peers,
            "spread": timing.spread, "outliers": self.outliers,
            "gflops": timing.gflops(work) if work.flops else None, "gbytes": timing.gbytes(work) if work.bytes else None,
            "intensity": self.intensity, "ridge": self.ridge, "share_of_peak": self.share_of_peak,
            "peak_memory": self.peak_memory, "process_peak_memory": self.process_peak_memory, "backend": self.backend,
            "precision": self.precision or self.dtype, "note": self.note, "prepare_seconds": self.prepare_seconds,
        }  # fmt: skip

    def as_dict(self) -> dict[str, Any]:
        """Plain data for report.json."""
        return {**self.extra(), "ms": self.timing.median * 1e3, "seconds": list(self.seconds)}


def outliers(seconds: Sequence[float]) -> int:
    """Values beyond 1.5 interquartile ranges from the quartiles."""
    if len(seconds) < 4:
        return 0
    first, _, third = statistics.quantiles(seconds, n=4, method="inclusive")
    reach = 1.5 * (third - first)
    return sum(not first - reach <= s <= third + reach for s in seconds)


def describe(row: Row, found: Comparison, work: Work, roofs: dict[str, Work]) -> Row:
    """Fill in rates, roofs and ratios from the rounds of the whole group.

    Args:
        row: with its names.
        found: the group's times, the roofs' among them.
        work: of one call.
        roofs: work of the candidates ``COMPUTE`` and ``COPY``.
    """
    flop_rate = roofs[COMPUTE].flops / found[COMPUTE].median
    byte_rate = roofs[COPY].bytes / found[COPY].median
    compute, moving = work.flops / flop_rate, work.bytes / byte_rate
    row.flops, row.bytes, row.ridge = work.flops, work.bytes, flop_rate / byte_rate
    row.bound = "compute" if compute > moving else "memory"
    row.intensity = work.flops / work.bytes if work.bytes else None
    if compute or moving:
        row.share_of_peak = max(compute, moving) / found[row.candidate].median
    for peer in found.timings:
        if peer not in (row.candidate, COMPUTE, COPY):
            ratio = found.speedup(row.candidate, peer)
            row.peers[peer] = {"ratio": ratio.value, "low": ratio.low, "high": ratio.high}
    return row
