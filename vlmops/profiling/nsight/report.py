"""The report of a recording: which kernel took how long, for which op, module and stage, and how near to the GPU's limits."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from vlmops.profiling.nsight.attribution import Place
from vlmops.profiling.nsight.budgets import Budgets
from vlmops.profiling.nsight.ncu import Counters, Peaks, roofline
from vlmops.profiling.nsight.nsys import Trace

__all__ = ["FORMAT", "Report", "Row", "Sum", "of_counters", "of_trace"]

FORMAT = 1
INFERRED = "kernel name"


@dataclass(frozen=True)
class Row:
    """Launches of one kernel in one place.

    Args:
        kernel: without template arguments and parameters.
        op, module, stage: where it was launched; None: under no such range.
        backend: of the op.
        op_from: "range", or "kernel name" where no op's range was open but only one op has such a kernel.
        count: launches.
        total_ms: their durations added up.
        share: of the durations of all rows, 0 to 1.
        gbytes: achieved GB/s, of DRAM for a kernel, of the copy for a copy.
        tensor, occupancy: %, averaged by time.
        stall: what warps waited for most, and its share of all waiting.
        registers: of a thread; shared: bytes of shared memory of a block; the most of all launches.
        roof: share of the nearer peak, 0 to 1; limit: "memory" or "compute".
        budget: "within", "above", "below" or "none"; budget_text: the same in words.
    """

    kernel: str
    op: str | None
    module: str | None
    stage: str | None
    backend: str | None
    op_from: str | None
    count: int
    total_ms: float
    share: float
    gbytes: float | None = None
    tensor: float | None = None
    occupancy: float | None = None
    stall: str | None = None
    registers: int | None = None
    shared: int | None = None
    roof: float | None = None
    limit: str | None = None
    budget: str = "none"
    budget_text: str = ""


@dataclass(frozen=True)
class Sum:
    """Rows of one stage, op or module: its name (None: launched under none), launches, ms, share of all."""

    name: str | None
    count: int
    total_ms: float
    share: float


@dataclass(frozen=True)
class Report:
    """Rows, the longest first.

    Args:
        source: what was read, in words.
        rows: every kernel and place.
        notes: what was not there to be read.
    """

    source: str
    rows: tuple[Row, ...]
    notes: tuple[str, ...] = ()

    @property
    def total_ms(self) -> float:
        """Durations of all launches; launches that ran beside each other count twice."""
        return sum(row.total_ms for row in self.rows)

    def by(self, what: str) -> list[Sum]:
        """Sums by "stage", "module" or "op", the longest first."""
        groups: dict[str | None, list[Row]] = {}
        for row in self.rows:
            groups.setdefault(getattr(row, what), []).append(row)
        sums = [
            Sum(name, sum(r.count for r in rows), sum(r.total_ms for r in rows), sum(r.share for r in rows))
            for name, rows in groups.items()
        ]
        return sorted(sums, key=lambda s: (-s.total_ms, s.name or ""))

    def as_dict(self) -> dict[str, Any]:
        """Plain data."""
        sums = {f"by_{what}": [asdict(s) for s in self.by(what)] for what in ("stage", "op", "module")}
        return {
            "format": FORMAT, "source": self.source, "total_ms": self.total_ms, "notes": list(self.notes), **sums,
            "rows": [asdict(row) for row in self.rows],
        }  # fmt: skip


@dataclass(frozen=True)
class _Piece:
    """A launch, from either tool."""

    kernel: str
    place: Place
    ns: float
    bytes: float | None = None
    registers: int | None = None
    shared: int | None = None
    counters: Counters | None = None


def _average(pieces: Iterable[_Piece], of: Callable[[Counters], float | None]) -> float | None:
    """Mean weighted by time of what was measured."""
    seen = [(of(p.counters), p.ns) for p in pieces if p.counters is not None]
    known = [(value, ns) for value, ns in seen if value is not None]
    weight = sum(ns for _, ns in known)
    if not known:
        return None
    return sum(v * ns for v, ns in known) / weight if weight else sum(v for v, _ in known) / len(known)


def _stall(pieces: Sequence[_Piece]) -> str | None:
    reasons = {reason for p in pieces if p.counters is not None for reason in p.counters.stalls}
    means = {reason: _average(pieces, lambda c, reason=reason: c.stalls.get(reason)) or 0.0 for reason in reasons}  # type: ignore[misc]
    total = sum(means.values())
    if not total:
        return None
    worst = max(means, key=lambda reason: (means[reason], reason))
    return f"{worst} {means[worst] / total:.0%}"


def _rate(pieces: Sequence[_Piece]) -> float | None:
    """GB/s: bytes of a copy over its time, else DRAM traffic by time."""
    moved = [(p.bytes, p.ns) for p in pieces if p.bytes is not None]
    if moved:
        ns = sum(n for _, n in moved)
        return sum(b for b, _ in moved) / ns if ns else None
    rate = _average(pieces, lambda c: c.dram_rate)
    return None if rate is None else rate / 1e9


def _most(values: Iterable[int | None]) -> int | None:
    return max((v for v in values if v is not None), default=None)


def _row(
    kernel: str, place: Place, pieces: Sequence[_Piece], total: float, capability: str | None, budgets: Budgets,
    peaks: Peaks | None, flops: float | None,
) -> Row:  # fmt: skip
    ns = sum(p.ns for p in pieces)
    op, op_from = place.op, "range" if place.op else None
    if op is None:
        op = budgets.op(place.kernel or "") or budgets.op(kernel)
        op_from = INFERRED if op else None
    registers, shared = _most(p.registers for p in pieces), _most(p.shared for p in pieces)
    counters = next((p.counters for p in pieces if p.counters is not None), None)
    roof = None
    if counters is not None:
        mean = replace(
            counters, ns=ns / len(pieces), dram_rate=_average(pieces, lambda c: c.dram_rate),
            dram_share=_average(pieces, lambda c: c.dram_share), tensor=_average(pieces, lambda c: c.tensor),
        )  # fmt: skip
        roof = roofline(mean, peaks, flops)
    verdict = budgets.compare(kernel, capability or (counters and counters.capability), registers, shared)
    return Row(
        kernel, op, place.module, place.stage, place.backend, op_from, len(pieces), ns / 1e6, ns / total if total else 0.0,
        _rate(pieces), _average(pieces, lambda c: c.tensor), _average(pieces, lambda c: c.occupancy), _stall(pieces),
        registers, shared, None if roof is None else roof.share, None if roof is None else roof.limit, verdict.status,
        verdict.text,
    )  # fmt: skip


def _rows(
    pieces: Iterable[_Piece], capability: str | None, budgets: Budgets, peaks: Peaks | None, flops: Mapping[str, float]
) -> tuple[Row, ...]:
    groups: dict[tuple[Any, ...], list[_Piece]] = {}
    total = 0.0
    for piece in pieces:
        p = piece.place  # but for the range's text, which differs from call to call
        groups.setdefault((piece.kernel, p.stage, p.module, p.op, p.backend, p.kernel), []).append(piece)
        total += piece.ns
    rows = [
        _row(kernel, group[0].place, group, total, capability, budgets, peaks, flops.get(kernel))
        for (kernel, *_), group in groups.items()
    ]
    return tuple(sorted(rows, key=lambda r: (-r.total_ms, r.kernel, r.stage or "", r.module or "", r.op or "")))


def _inferred(rows: Sequence[Row]) -> list[str]:
    share = sum(row.share for row in rows if row.op_from == INFERRED)
    return [f"{share:.1%} of the time has its op from the kernel's name, not from a range"] if share else []


def of_trace(
    trace: Trace, counters: Sequence[Counters] = (), *, budgets: Budgets | None = None, peaks: Peaks | None = None,
    flops: Mapping[str, float] | None = None,
) -> Report:  # fmt: skip
    """The report of an Nsight Systems recording, with Nsight Compute's counters of the same kernels where there are any.

    Args:
        trace: times and places.
        counters: a launch's counters are those measured of the same kernel under the same op, stage and module, else under the
            same op, else anywhere.
        budgets: of the checkout; None: none.
        peaks: of the GPU; None: shares are those that ncu states.
        flops: kernel -> FLOPs of one launch, e.g. of the op's ``cost``.
    """
    index: dict[tuple[Any, ...], list[Counters]] = {}
    for c in counters:
        for key in _keys(c.short, c.place):
            index.setdefault(key, []).append(c)
    merged: dict[tuple[str, Place], Counters | None] = {}
    pieces = []
    for launch in trace.launches:
        at = (launch.short, launch.place)
        if at not in merged:
            seen = next((index[key] for key in _keys(*at) if key in index), None)
            merged[at] = None if seen is None else _merged(seen)
        pieces.append(
            _Piece(
                launch.short, launch.place, float(launch.ns), launch.bytes, launch.registers, launch.shared, merged[at]
            )
        )
    rows = _rows(pieces, trace.capability, budgets or Budgets({}), peaks, flops or {})
    notes = [*trace.notes, *_inferred(rows)]
    if counters:
        known = sum(p.ns for p in pieces if p.counters is not None) / (sum(p.ns for p in pieces) or 1.0)
        notes.append(f"counters of Nsight Compute cover {known:.1%} of the time; times are those of Nsight Systems")
    gpus = f", {', '.join(dict.fromkeys(trace.gpus))}" if trace.gpus else ""
    product = f"Nsight Systems {trace.product}".strip()
    return Report(f"{trace.path.name}: {product}, export schema {trace.schema}{gpus}", rows, tuple(notes))


def of_counters(
    counters: Sequence[Counters], source: str = "ncu", *, budgets: Budgets | None = None, peaks: Peaks | None = None,
    flops: Mapping[str, float] | None = None,
) -> Report:  # fmt: skip
    """The report of an Nsight Compute recording alone; arguments as in ``of_trace``.

    Times are of kernels that ncu replayed one by one with locked clocks: shares among them, not the program's own.
    """
    pieces = [_Piece(c.short, c.place, c.ns or 0.0, None, c.registers, c.shared, c) for c in counters]
    rows = _rows(pieces, None, budgets or Budgets({}), peaks, flops or {})
    notes = ["times were measured by Nsight Compute, a kernel at a time, with locked clocks"]
    if not any(c.place.range for c in counters):
        notes.append("no NVTX range was recorded: nothing is known of modules and stages (ncu --nvtx)")
    return Report(f"{source}: Nsight Compute", rows, (*notes, *_inferred(rows)))


def _keys(kernel: str, place: Place) -> list[tuple[Any, ...]]:
    """Where counters of a kernel are looked for, the closest first."""
    return [(kernel, place.op, place.stage, place.module), (kernel, place.op), (kernel,)]


def _merged(seen: Sequence[Counters]) -> Counters:
    """One launch's counters out of several launches', weighted by time."""
    if len(seen) == 1:
        return seen[0]
    pieces = [_Piece(c.short, c.place, c.ns or 0.0, counters=c) for c in seen]
    reasons = dict.fromkeys(reason for c in seen for reason in c.stalls)
    return replace(
        seen[0], ns=sum(p.ns for p in pieces) / len(pieces), dram_bytes=_average(pieces, lambda c: c.dram_bytes),
        dram_rate=_average(pieces, lambda c: c.dram_rate), dram_share=_average(pieces, lambda c: c.dram_share),
        tensor=_average(pieces, lambda c: c.tensor), occupancy=_average(pieces, lambda c: c.occupancy),
        stalls={r: _average(pieces, lambda c, r=r: c.stalls.get(r)) or 0.0 for r in reasons},  # type: ignore[misc]
    )  # fmt: skip
