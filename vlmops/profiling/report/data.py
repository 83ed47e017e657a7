"""What a profile holds: plain data, in seconds and bytes, that every form of the report is made of."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

__all__ = ["KINDS", "SCHEMA", "Dot", "Memory", "Peaks", "Piece", "Profile", "Row", "Run", "grouped", "pattern"]

SCHEMA = 1
#: What a moment may belong to -> how the report calls it.
KINDS = {
    "op": "vlmops ops",
    "stock": "PyTorch ops",
    "python": "Python between ops, in a named module",
    "unnamed": "outside any op and module",
}


@dataclass
class Row:
    """One named thing.

    Attributes:
        kind: "stage", "module", "op", "stock", "python" or "unnamed".
        name: "vision", a module's path, "mlp cpu" (op and backend), "aten::addmm".
        detail: a module's class; shapes and dtypes of an op.
        calls: a step.
        seconds: a step, with everything inside.
        own: seconds a step without named things inside; of a stage or module: without inner stages or modules.
        gpu: seconds a step of the GPU kernels that were launched inside.
    """

    kind: str
    name: str
    detail: str = ""
    calls: float = 0.0
    seconds: float = 0.0
    own: float = 0.0
    gpu: float = 0.0

    def add(self, other: Row) -> None:
        """Take another row's figures in."""
        self.calls += other.calls
        self.seconds += other.seconds
        self.own += other.own
        self.gpu += other.gpu


@dataclass
class Piece:
    """Seconds a step of a stage that belong to one outermost named thing. The pieces of a stage do not overlap."""

    stage: str
    module: str
    kind: str
    name: str
    seconds: float


@dataclass
class Memory:
    """Allocated memory through the last step, relative to its begin.

    Attributes:
        points: (seconds since the step began, bytes), at the events that torch's allocator reported.
        peak: largest value, in bytes.
        where: innermost named things at the peak, in words.
        device: "cpu" or "cuda".
    """

    points: list[tuple[float, int]] = field(default_factory=list)
    peak: int = 0
    where: str = ""
    device: str = "cpu"


@dataclass
class Dot:
    """One op on the roofline.

    Attributes:
        name, detail: as in its ``Row``.
        kind: "op" or "stock".
        calls: a step.
        seconds: of one call.
        flops, bytes: of one call, the least that the operation needs.
    """

    name: str
    detail: str
    kind: str
    calls: float
    seconds: float
    flops: float
    bytes: float

    @property
    def intensity(self) -> float:
        """FLOPs a byte."""
        return self.flops / self.bytes if self.bytes else 0.0

    def least(self, peaks: Peaks) -> float:
        """Seconds that one call needs at the measured peaks."""
        return max(self.bytes / peaks.bandwidth, self.flops / peaks.flops)

    def share(self, peaks: Peaks) -> float:
        """``least`` over the measured time: 1 is on the roof; above 1 the data came from caches."""
        return self.least(peaks) / self.seconds if self.seconds else 0.0


@dataclass(frozen=True)
class Peaks:
    """The machine, measured in the same run.

    Attributes:
        bandwidth: bytes/s of a copy, read and written.
        flops: FLOP/s of one large product.
        dtype: of the product.
        copied: bytes of the copied tensor.
    """

    bandwidth: float
    flops: float
    dtype: str
    copied: int


@dataclass
class Run:
    """One model's profile.

    Attributes:
        name: "stock" or "patched".
        steps: how many were profiled.
        seconds: of one profiled step, by its ranges.
        clock: the same by ``time.perf_counter`` around it; 0 where the trace came alone.
        plain: seconds of steps without the profiler.
        stages, modules: what ran, in order of appearance.
        ops: outermost named ops: vlmops ops with all they call, PyTorch ops outside them.
        inner: time of every op of either kind without the ops inside it; detail is the pattern of its module.
        pieces: every moment of every stage, once.
        dots: the ops whose least work is known.
        memory: of the last step.
        kernels: seconds a step in which the GPU worked (sum over kernels); 0 on a CPU.
        clipped: seconds a step in which ranges overlapped without nesting: counted for the outer one.
        other_threads: seconds a step of ops on other threads; they run beside the rest and are in no row.
        trace: gzipped trace file (Chrome, Perfetto).
    """

    name: str
    steps: int
    seconds: float
    clock: float = 0.0
    plain: tuple[float, ...] = ()
    stages: list[Row] = field(default_factory=list)
    modules: list[Row] = field(default_factory=list)
    ops: list[Row] = field(default_factory=list)
    inner: list[Row] = field(default_factory=list)
    pieces: list[Piece] = field(default_factory=list)
    dots: list[Dot] = field(default_factory=list)
    memory: Memory = field(default_factory=Memory)
    kernels: float = 0.0
    clipped: float = 0.0
    other_threads: float = 0.0
    trace: bytes = b""

    def shares(self, stage: str | None = None) -> dict[str, float]:
        """Kind -> share of a stage's own time, or of the whole step by the clock."""
        whole = (self.clock or self.seconds) if stage is None else sum(s.own for s in self.stages if s.name == stage)
        found = dict.fromkeys(KINDS, 0.0)
        for piece in self.pieces:
            if stage is None or piece.stage == stage:
                found[piece.kind] += piece.seconds
        return {kind: seconds / whole if whole else 0.0 for kind, seconds in found.items()}

    def named(self, stage: str | None = None) -> float:
        """Share of the time that lies inside an op with a name."""
        shares = self.shares(stage)
        return shares["op"] + shares["stock"]

    def difference(self, stage: str | None = None) -> float:
        """Sum of the pieces over the time of their stage, or of the step, minus 1: 0 where each moment is counted once."""
        return sum(self.shares(stage).values()) - 1.0


@dataclass
class Profile:
    """Stock and patched, and what they ran on.

    Attributes:
        model: class of the model.
        inputs: name -> shape and dtype.
        dtype, device: of the first parameter.
        generate: new tokens of a step; 0: a step is one forward.
        runs: "stock" and, unless ``patched=False``, "patched".
        peaks: of the machine.
        patch: rows of ``patch_report``; ``notes``: its notes.
        agreement: how outputs were compared, in words.
        facts: machine, versions, date, commit, command.
    """

    model: str
    inputs: dict[str, str]
    dtype: str
    device: str
    generate: int
    runs: dict[str, Run]
    peaks: Peaks
    patch: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    agreement: str = ""
    facts: dict[str, str] = field(default_factory=dict)

    @property
    def last(self) -> Run:
        """The patched run, or the stock one where nothing was patched."""
        return list(self.runs.values())[-1]

    def as_dict(self) -> dict[str, Any]:
        """Everything but the trace files, for JSON; units are seconds and bytes."""
        data = {"schema": SCHEMA, **asdict(self)}
        for name, run in self.runs.items():
            made = data["runs"][name]
            del made["trace"]
            stages = {s.name: {"shares": run.shares(s.name), "difference": run.difference(s.name)} for s in run.stages}
            made["accounting"] = {
                "shares": run.shares(), "named": run.named(), "difference": run.difference(), "stages": stages,
            }  # fmt: skip
            for dot, plain in zip(run.dots, made["dots"], strict=True):
                plain.update(intensity=dot.intensity, share=dot.share(self.peaks))
        return data


def pattern(path: str) -> str:
    """A module's path with its numbers as stars: layers of one kind share it."""
    return re.sub(r"(?<=\.)\d+(?=\.|$)|^\d+(?=\.|$)", "*", path)


def grouped(rows: Iterable[Row], details: bool = True) -> list[Row]:
    """Rows of one kind, pattern (and detail) added up, in order of appearance."""
    found: dict[tuple[str, str, str], Row] = {}
    for row in rows:
        name = pattern(row.name) if row.kind in ("module", "python") else row.name
        key = (row.kind, name, row.detail if details else "")
        found.setdefault(key, Row(*key)).add(row)
    return list(found.values())
