"""Nsight Compute's raw page as CSV: one row a launch, a metric a column, the units in the second row.

``ncu --csv --page raw`` (or ``ncu --import FILE.ncu-rep --csv --page raw``). Metrics are those of the sections in
``commands.SECTIONS``; a metric that a file lacks, or that a GPU does not have ("n/a"), is None.
"""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from vlmops.profiling.nsight import names
from vlmops.profiling.nsight.attribution import NOWHERE, Place
from vlmops.profiling.nsight.errors import ProfileFileError

__all__ = ["Counters", "Peaks", "Roof", "kernel_counters", "read", "roofline"]

HINT = "the raw page of Nsight Compute is expected: ncu --import FILE.ncu-rep --csv --page raw --print-units base"
MAX_BYTES = 256 << 20
KERNEL, NVTX = "Kernel Name", "Push/Pop_Range"
#: What a figure is read from: the first of these columns that has a value.
DURATION = ("gpu__time_duration.sum", "gpu__time_duration.avg")
DRAM_RATE = ("dram__bytes.sum.per_second",)
DRAM_BYTES = ("dram__bytes.sum",)
DRAM_READ, DRAM_WRITE = ("dram__bytes_read.sum",), ("dram__bytes_write.sum",)
DRAM_SHARE = (
    "gpu__dram_throughput.avg.pct_of_peak_sustained_elapsed", "dram__throughput.avg.pct_of_peak_sustained_elapsed",
)  # fmt: skip
TENSOR = (
    "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_active",
    "sm__pipe_tensor_op_hmma_cycles_active.avg.pct_of_peak_sustained_active",
    "sm__inst_executed_pipe_tensor.avg.pct_of_peak_sustained_active",
)
OCCUPANCY = ("sm__warps_active.avg.pct_of_peak_sustained_active",)
REGISTERS = ("launch__registers_per_thread",)
STATIC, DYNAMIC = ("launch__shared_mem_per_block_static",), ("launch__shared_mem_per_block_dynamic",)
#: Cycles between two instructions of a warp, by what it waited for. "selected" is no wait.
STALL = re.compile(r"smsp__average_warps?_(?:latency_)?issue_stalled_([a-z_]+?)(?:_per_issue_active)?\.(?:ratio|pct)")
NO_STALL = {"selected"}
#: Factor of a unit's prefix and of its base, to ns, bytes and plain numbers.
PREFIX = {"": 1.0, "n": 1e-9, "u": 1e-6, "m": 1e-3, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}
SECONDS, BYTES = {"second": 1e9, "s": 1e9}, {"byte": 1.0, "B": 1.0}
PLAIN = re.compile(r"[-+]?\d+(\.\d+)?([eE][-+]?\d+)?|[-+]?\d{1,3}(,\d{3})+(\.\d+)?")
NUMBER = re.compile(r"[-+]?[\d.,]+([eE][-+]?\d+)?")


@dataclass(frozen=True)
class Counters:
    """What was measured of one launch.

    Args:
        name: with templates and parameters, as far as ncu was told to print them; short: without.
        place: the push/pop ranges it ran under.
        capability: "9.0".
        ns: duration, with the clocks ncu locked.
        dram_bytes: read and written; dram_rate: bytes/s; dram_share, tensor, occupancy: % of the GPU's own peak.
        registers: of a thread; shared: bytes of static and dynamic shared memory of a block.
        stalls: cycles a warp waits between two instructions, by reason.
    """

    name: str
    short: str
    place: Place = NOWHERE
    capability: str | None = None
    ns: float | None = None
    dram_bytes: float | None = None
    dram_rate: float | None = None
    dram_share: float | None = None
    tensor: float | None = None
    occupancy: float | None = None
    registers: int | None = None
    shared: int | None = None
    stalls: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Peaks:
    """What a GPU can do: of ``vlmops gpu-check`` (measured) or a data sheet.

    Args:
        bandwidth: bytes/s.
        flops: FLOP/s; None: unknown.
    """

    bandwidth: float
    flops: float | None = None


@dataclass(frozen=True)
class Roof:
    """Where a launch stands under the roofline.

    Args:
        limit: "memory" or "compute", whichever it is nearer to.
        share: of that peak, 0 to 1; above 1 the peak was set too low.
        source: what the peak is: "given" or "ncu".
    """

    limit: str
    share: float
    source: str


def roofline(found: Counters, peaks: Peaks | None = None, flops: float | None = None) -> Roof | None:
    """Share of the nearer peak; None where the file has neither bandwidth nor tensor pipes.

    Args:
        found: a launch.
        peaks: None: the shares of the GPU's own peaks that ncu states.
        flops: FLOPs of the launch; None: compute is judged by how busy the tensor pipes are.
    """
    memory = None if found.dram_share is None else found.dram_share / 100
    compute = None if found.tensor is None else found.tensor / 100
    if peaks is not None:
        memory = None if found.dram_rate is None else found.dram_rate / peaks.bandwidth
        if flops is not None and found.ns and peaks.flops:
            compute = flops / (found.ns * 1e-9) / peaks.flops
    if memory is None and compute is None:
        return None
    limit = "memory" if compute is None or (memory is not None and memory >= compute) else "compute"
    return Roof(limit, float(memory if limit == "memory" else compute or 0.0), "ncu" if peaks is None else "given")


def read(path: Path | str) -> tuple[Counters, ...]:
    """Launches of a file, in its order.

    Args:
        path: FILE.csv.

    Raises:
        ProfileFileError: no raw page, truncated, or with numbers that cannot be told.
        OSError: it cannot be opened.
    """
    path = Path(path)
    if path.stat().st_size > MAX_BYTES:
        raise ProfileFileError(path, f"more than {MAX_BYTES >> 20} MiB: record fewer launches")
    data = path.read_bytes()
    encoding = "utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"  # PowerShell's > writes the first
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as err:
        raise ProfileFileError(path, f"no text: {HINT}") from err
    if "\0" in text:
        raise ProfileFileError(path, f"no text: {HINT}")
    try:
        return tuple(kernel_counters(path, list(csv.reader(io.StringIO(text)))))
    except csv.Error as err:
        raise ProfileFileError(path, f"no CSV ({err}): {HINT}") from err


def kernel_counters(path: Path, rows: Sequence[Sequence[str]]) -> list[Counters]:
    """``read`` of rows that were split already: what the program printed, header, units, launches."""
    at = next((i for i, row in enumerate(rows) if "ID" in row[:1] and KERNEL in row), None)
    if at is None:
        raise ProfileFileError(path, f"no column {KERNEL!r}: {HINT}")
    header = list(rows[at])
    if "Metric Name" in header:
        raise ProfileFileError(path, f"the details page, a metric a row: {HINT}")
    if len(set(header)) < len(header):
        raise ProfileFileError(path, "two columns have the same name")
    if len(rows) <= at + 1 or len(rows[at + 1]) != len(header) or rows[at + 1][0].strip():
        raise ProfileFileError(path, f"no row of units below the header: {HINT}")
    table = _Table(path, header, list(rows[at + 1]))
    found = []
    for number, row in enumerate(rows[at + 2 :], at + 3):
        if not row or row[0].startswith("=="):  # ncu's own messages
            continue
        if len(row) != len(header):
            raise ProfileFileError(path, f"truncated: row {number} has {len(row)} of {len(header)} columns")
        found.append(table.counters(row))
    if not found:
        raise ProfileFileError(path, "no kernel was measured: did a launch match --kernel-name and --nvtx-include?")
    return found


class _Table:
    """Reads rows by a header and its units."""

    def __init__(self, path: Path, header: list[str], units: list[str]) -> None:
        self.path, self.units = path, units
        self.columns = {name: i for i, name in enumerate(header)}
        self.stalls = {i: found[1] for i, name in enumerate(header) if (found := STALL.fullmatch(name)) is not None}
        self.nvtx = [i for i, name in enumerate(header) if NVTX in name]

    def number(self, row: Sequence[str], column: int) -> float | None:
        """A cell's number without its unit; None where there is none ("n/a", "no data")."""
        text = row[column].strip()
        if PLAIN.fullmatch(text):
            found = float(text.replace(",", ""))
            if not math.isfinite(found):
                raise ProfileFileError(self.path, f"{text!r} is too large a number")
            return found
        if NUMBER.fullmatch(text):
            raise ProfileFileError(self.path, f"{text!r} has a decimal comma: run ncu with LC_ALL=C")
        return None

    def value(
        self, row: Sequence[str], metrics: Sequence[str], bases: Mapping[str, float] | None = None
    ) -> float | None:
        """The first of several metrics that has a value, in ns, bytes or bytes/s where ``bases`` says so."""
        for metric in metrics:
            column = self.columns.get(metric)
            found = None if column is None else self.number(row, column)
            if column is not None and found is not None:
                return found if bases is None else found * self.factor(metric, self.units[column], bases)
        return None

    def factor(self, metric: str, unit: str, bases: Mapping[str, float]) -> float:
        """Of "usecond", "Gbyte/second", "Kbyte/block" and the like."""
        base = unit.strip().partition("/")[0]
        for name, factor in bases.items():
            if base.endswith(name) and base[: -len(name)] in PREFIX:
                return PREFIX[base[: -len(name)]] * factor
        raise ProfileFileError(self.path, f"{metric}: the unit {unit!r} is not known")

    def counters(self, row: Sequence[str]) -> Counters:
        """One launch."""
        name = names.clean(row[self.columns[KERNEL]])
        ns = self.value(row, DURATION, SECONDS)
        size = self.value(row, DRAM_BYTES, BYTES)
        if size is None:
            parts = [self.value(row, which, BYTES) for which in (DRAM_READ, DRAM_WRITE)]
            size = None if None in parts else sum(p for p in parts if p is not None)
        rate = self.value(row, DRAM_RATE, BYTES)
        if rate is None and size is not None and ns:
            rate = size / (ns * 1e-9)
        registers, blocks = self.value(row, REGISTERS), [self.value(row, which, BYTES) for which in (STATIC, DYNAMIC)]
        stalls = {reason: self.number(row, i) for i, reason in self.stalls.items() if reason not in NO_STALL}
        capability = row[self.columns["CC"]].strip() if "CC" in self.columns else ""
        return Counters(
            name, names.base_name(name), self.place(row), capability or None, ns, size, rate,
            self.value(row, DRAM_SHARE), self.value(row, TENSOR), self.value(row, OCCUPANCY),
            None if registers is None else int(registers),
            None if None in blocks else int(sum(b for b in blocks if b is not None)),
            {reason: n for reason, n in stalls.items() if n is not None},
        )  # fmt: skip

    def place(self, row: Sequence[str]) -> Place:
        """Of the ranges "domain:message:..." of the launching thread, each in quotes, the outermost first."""
        ours: dict[str, names.Range] = {}
        innermost = None
        for column in self.nvtx:
            for entry in re.findall(r'"([^"]*)"', row[column]):
                domain, _, rest = entry.partition(":")
                kind, colon, tail = rest.partition(": ")
                # behind the message come payload, colour and the message once more, each with a colon
                text = f"{kind}: {tail.partition(':')[0]}" if colon and kind in names.KINDS else rest.partition(":")[0]
                innermost = names.clean(text)
                mine = names.parse(innermost, domain)
                if mine is not None:
                    ours[mine.kind] = mine
        op = ours.get("op")
        return Place(
            **{kind: ours[kind].name if kind in ours else None for kind in ("stage", "module", "op", "kernel")},
            backend=(op.extra or None) if op else None, range=innermost,
        )  # fmt: skip
