"""Recordings as Nsight Systems and Nsight Compute would write them, with the right attribution known while they are made.

Tables and columns follow the "SQLite Schema Reference" of Nsight Systems 2026.4 (export schema 3.28.1), those that the reader
looks at and some that it must not stumble over.
"""

from __future__ import annotations

import contextlib
import csv
import random
import sqlite3
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vlmops.backends import ranges
from vlmops.profiling.nsight.attribution import Place

SCHEMA = """
CREATE TABLE StringIds (id INTEGER NOT NULL PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE META_DATA_EXPORT (name TEXT NOT NULL, value TEXT);
CREATE TABLE TARGET_INFO_GPU (vmId INTEGER NOT NULL, id INTEGER NOT NULL, name TEXT, computeMajor INTEGER, computeMinor INTEGER);
CREATE TABLE ENUM_NSYS_EVENT_TYPE (id INTEGER NOT NULL PRIMARY KEY, name TEXT, label TEXT);
CREATE TABLE ENUM_CUDA_MEMCPY_OPER (id INTEGER NOT NULL PRIMARY KEY, name TEXT, label TEXT);
CREATE TABLE NVTX_EVENTS (
  start INTEGER NOT NULL, end INTEGER, eventType INTEGER NOT NULL, rangeId INTEGER, category INTEGER, color INTEGER, text TEXT,
  globalTid INTEGER, endGlobalTid INTEGER, textId INTEGER, domainId INTEGER, uint64Value INTEGER, jsonTextId INTEGER);
CREATE TABLE CUPTI_ACTIVITY_KIND_RUNTIME (
  start INTEGER NOT NULL, end INTEGER NOT NULL, eventClass INTEGER NOT NULL, globalTid INTEGER, correlationId INTEGER,
  nameId INTEGER NOT NULL, returnValue INTEGER NOT NULL, callchainId INTEGER);
CREATE TABLE CUPTI_ACTIVITY_KIND_KERNEL (
  start INTEGER NOT NULL, end INTEGER NOT NULL, deviceId INTEGER NOT NULL, contextId INTEGER NOT NULL, greenContextId INTEGER,
  streamId INTEGER NOT NULL, correlationId INTEGER, globalPid INTEGER, demangledName INTEGER NOT NULL, shortName INTEGER NOT NULL,
  mangledName INTEGER, registersPerThread INTEGER NOT NULL, gridX INTEGER NOT NULL, gridY INTEGER NOT NULL,
  gridZ INTEGER NOT NULL, blockX INTEGER NOT NULL, blockY INTEGER NOT NULL, blockZ INTEGER NOT NULL,
  staticSharedMemory INTEGER NOT NULL, dynamicSharedMemory INTEGER NOT NULL, graphNodeId INTEGER, graphId INTEGER);
CREATE TABLE CUPTI_ACTIVITY_KIND_MEMCPY (
  start INTEGER NOT NULL, end INTEGER NOT NULL, deviceId INTEGER NOT NULL, contextId INTEGER NOT NULL, streamId INTEGER NOT NULL,
  correlationId INTEGER, globalPid INTEGER, bytes INTEGER NOT NULL, copyKind INTEGER NOT NULL, graphNodeId INTEGER);
CREATE TABLE CUPTI_ACTIVITY_KIND_MEMSET (
  start INTEGER NOT NULL, end INTEGER NOT NULL, deviceId INTEGER NOT NULL, contextId INTEGER NOT NULL, streamId INTEGER NOT NULL,
  correlationId INTEGER, globalPid INTEGER, value INTEGER NOT NULL, bytes INTEGER NOT NULL, graphNodeId INTEGER);
CREATE TABLE CUPTI_ACTIVITY_KIND_GRAPH_TRACE (
  start INTEGER NOT NULL, end INTEGER NOT NULL, deviceId INTEGER NOT NULL, contextId INTEGER NOT NULL, streamId INTEGER NOT NULL,
  correlationId INTEGER, globalPid INTEGER, graphId INTEGER NOT NULL, graphExecId INTEGER NOT NULL);
CREATE TABLE CUDA_GRAPH_NODE_EVENTS (
  start INTEGER NOT NULL, end INTEGER NOT NULL, eventClass INTEGER NOT NULL, globalTid INTEGER, nameId INTEGER NOT NULL,
  graphNodeId INTEGER NOT NULL, originalGraphNodeId INTEGER);
"""
PUSH_POP, START_END, CREATE = 59, 60, 75
DOMAIN_ID = 7


def thread_id(process: int, thread: int) -> int:
    """hardware:8 VM:8 process:24 thread:24, as a signed 64-bit integer."""
    value = 0x81 << 56 | 2 << 48 | process << 24 | thread
    return value - (1 << 64) if value >= 1 << 63 else value


class _Messages:
    """Stands in for the nvtx package, to learn what ``ranges`` calls a range."""

    def __init__(self) -> None:
        self.last = ""

    def annotate(self, message: str, **options: Any) -> Any:
        self.last = message
        return contextlib.nullcontext()


def message(kind: str, name: str, detail: str = "") -> str:
    """A range's text, by the code that opens ranges."""
    seen = _Messages()
    with ranges.Ranges(seen, record=False).range(kind, name, detail):
        return seen.last


@dataclass
class Recording:
    """An export being written.

    Args:
        seed: of every random choice.
        version: of the schema.
        registered: whether range texts go to StringIds, as those of registered strings do, or stand in the row.
    """

    seed: int = 0
    version: str = "3.28.1"
    registered: bool = True
    rows: dict[str, list[tuple[Any, ...]]] = field(default_factory=dict)
    strings: dict[str, int] = field(default_factory=dict)
    expected: list[Place] = field(default_factory=list)  # of the kernels, in order
    correlation: int = 0

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)

    def string(self, text: str) -> int:
        """Its id."""
        return self.strings.setdefault(text, len(self.strings) + 1)

    def add(self, table: str, *values: Any) -> None:
        """A row."""
        self.rows.setdefault(table, []).append(values)

    def domain(self, process: int) -> None:
        """The domain's creation in a process."""
        self.add(
            "NVTX_EVENTS",
            1,
            None,
            CREATE,
            None,
            None,
            None,
            "vlmops",
            thread_id(process, 1),
            None,
            None,
            DOMAIN_ID,
            None,
            None,
        )

    def range(
        self, start: int, end: int | None, thread: int, text: str, *, kind: int = PUSH_POP, domain: int = DOMAIN_ID
    ) -> None:
        """A range of a thread."""
        inline, number = (None, self.string(text)) if self.registered else (text, None)
        self.add("NVTX_EVENTS", start, end, kind, 1, None, 0xFF00, inline, thread, thread, number, domain, None, None)

    def call(self, start: int, thread: int, name: str = "cudaLaunchKernel_v7000", *, length: int = 2) -> int:
        """A runtime call; its correlation id."""
        self.correlation += 1
        self.add(
            "CUPTI_ACTIVITY_KIND_RUNTIME",
            start,
            start + length,
            0,
            thread,
            self.correlation,
            self.string(name),
            0,
            None,
        )
        return self.correlation

    def kernel(
        self, name: str, correlation: int, process: int | None, place: Place, *, start: int = 10**9, ns: int = 1000,
        stream: int = 7, device: int = 0, registers: int = 32, shared: tuple[int, int] = (0, 0), node: int | None = None,
    ) -> None:  # fmt: skip
        """A kernel that a call launched, and the place it must be given."""
        pid = None if process is None else thread_id(process, 0)
        self.add(
            "CUPTI_ACTIVITY_KIND_KERNEL", start, start + ns, device, 1, None, stream, correlation, pid,
            self.string(f"void {name}<float>(float*)"), self.string(name), None, registers, 1, 1, 1, 128, 1, 1, *shared, node,
            None,
        )  # fmt: skip
        self.expected.append(place)

    def write(self, path: Path, *, without: Sequence[str] = ()) -> Path:
        """The file; ``without``: tables that are left out."""
        path.unlink(missing_ok=True)
        db = sqlite3.connect(path)
        db.executescript(SCHEMA)
        parts = dict(zip(("MAJOR", "MINOR", "MICRO"), self.version.split("."), strict=False))
        meta = [(f"EXPORT_SCHEMA_VERSION_{name}", value) for name, value in parts.items()]
        meta += [("EXPORT_SCHEMA_VERSION", self.version), ("EXPORT_PRODUCT_VERSION", "2026.4.1.0")]
        db.executemany("INSERT INTO META_DATA_EXPORT VALUES (?, ?)", meta)
        db.execute("INSERT INTO TARGET_INFO_GPU VALUES (0, 0, 'NVIDIA H100', 9, 0)")
        types = ((PUSH_POP, "NvtxPushPopRange"), (START_END, "NvtxStartEndRange"), (CREATE, "NvtxDomainCreate"))
        db.executemany("INSERT INTO ENUM_NSYS_EVENT_TYPE VALUES (?, ?, NULL)", types)
        db.execute("INSERT INTO ENUM_CUDA_MEMCPY_OPER VALUES (1, 'CUDA_MEMCPY_KIND_HTOD', 'Host-to-Device')")
        for table, rows in self.rows.items():
            db.executemany(f"INSERT INTO {table} VALUES ({', '.join('?' * len(rows[0]))})", rows)
        db.executemany("INSERT INTO StringIds VALUES (?, ?)", [(n, text) for text, n in self.strings.items()])
        for table in without:
            db.execute(f"DROP TABLE {table}")
        db.commit()
        db.close()
        return path


OPS = ("mlp", "linear", "norms", "varlen_attention")


def nested(seed: int, kernels: int, *, processes: int = 2, threads: int = 3) -> Recording:
    """Random trees of ranges on several threads of several processes, and kernels launched at random moments of them.

    Every range is opened and closed by a walk that keeps the stack itself, so each launch's place is known when it is made.
    Correlation ids are the same in all processes; ranges of another domain lie between ours.
    """
    made = Recording(seed, registered=bool(seed % 2))
    pick = made.random
    for process in range(100, 100 + processes):
        made.domain(process)
        made.correlation = 0
        for thread in range(1, threads + 1):
            tid = thread_id(process, thread)
            share = kernels // (processes * threads) + (thread == 1) * (kernels % (processes * threads)) * (
                process == 100
            )
            _walk(made, pick, process, tid, share)
    return made


def _walk(made: Recording, pick: random.Random, process: int, tid: int, kernels: int) -> None:
    time, stack = pick.randrange(1000, 2000), list[tuple[int, str, str, str]]()
    left = kernels

    def close() -> None:
        start, kind, _, text = stack.pop()
        made.range(start, time, tid, text, domain=0 if kind == "other" else DOMAIN_ID)

    while left or stack:
        time += pick.choice((0, 1, 1, 2, 50))  # ranges often begin or end in the same nanosecond as a call
        action = pick.random()
        if left and action < 0.5:
            place = _expected(stack)
            made.kernel(
                pick.choice(("gemm", "softmax")), made.call(time, tid), process, place, ns=pick.randrange(1, 5000),
                start=time + pick.randrange(10**6), stream=pick.choice((7, 13)),
            )  # fmt: skip
            time += 2  # the call returns before its thread goes on
            left -= 1
        elif (left and action < 0.75 and len(stack) < 12) or (left and not stack):
            kind = pick.choice(("stage", "module", "op", "kernel", "other"))
            name = {
                "stage": pick.choice(("vision", "prefill", "decode")), "module": f"visual.blocks.{pick.randrange(30)}.attn",
                "op": pick.choice(OPS), "kernel": f"mlp_few_rows_t{pick.randrange(4)}", "other": "aten::mm",
            }[kind]  # fmt: skip
            behind, detail = {"module": (" (Attention)", ""), "op": (" triton", "8x16 bf16")}.get(kind, ("", ""))
            text = name if kind in ("kernel", "other") else message(kind, name + behind, detail)
            stack.append((time, kind, name, text))
        elif stack:
            time += 1  # a range has a length
            close()


def _expected(stack: Sequence[tuple[int, str, str, str]]) -> Place:
    inner = {kind: name for _, kind, name, _ in stack}
    return Place(
        inner.get("stage"), inner.get("module"), inner.get("op"), inner.get("kernel"), "triton" if "op" in inner else None,
        stack[-1][3] if stack else None,
    )  # fmt: skip


# -- Nsight Compute ----------------------------------------------------------------------------------------------------

NVTX_HEAD = "thread Domain:Push/Pop_Range:PL_Type:PL_Value:CLR_Type:Color:Msg_Type:Msg"
FIXED = (
    "ID", "Process ID", "Process Name", "Host Name", NVTX_HEAD, "Kernel Name", "Context", "Stream", "Block Size", "Grid Size",
    "Device", "CC",
)  # fmt: skip
STALLED = "smsp__average_warps_issue_stalled_{}_per_issue_active.ratio"
UNITS = {
    "gpu__time_duration.sum": "ns", "dram__bytes_read.sum": "byte", "dram__bytes_write.sum": "byte",
    "gpu__dram_throughput.avg.pct_of_peak_sustained_elapsed": "%", "sm__warps_active.avg.pct_of_peak_sustained_active": "%",
    "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_active": "%", "launch__registers_per_thread": "register/thread",
    "launch__shared_mem_per_block_static": "byte/block", "launch__shared_mem_per_block_dynamic": "byte/block",
    STALLED.format("long_scoreboard"): "inst", STALLED.format("barrier"): "inst", STALLED.format("selected"): "inst",
}  # fmt: skip


def nvtx_cell(thread: int, *texts: str, domain: str = "vlmops") -> str:
    """The cell of a launch's push/pop ranges, the outermost first."""
    return (
        f"{thread}  "
        + "  ".join(f'"{domain}:{text}:none:none:ARGB:16711680:REGISTERED:{text}"' for text in texts)
        + " "
    )


def ncu_csv(
    path: Path,
    launches: Sequence[dict[str, Any]],
    *,
    units: dict[str, str] | None = None,
    before: str = "",
    after: str = "",
) -> Path:
    """A raw page. A launch has "name", perhaps "nvtx" and "cc", and values of metrics in ``UNITS`` or ``units``."""
    units = {**UNITS, **(units or {})}
    with path.open("w", newline="", encoding="utf-8") as file:
        file.write(before)
        writer = csv.writer(file, quoting=csv.QUOTE_ALL, lineterminator="\n")
        writer.writerow([*FIXED, *units])
        writer.writerow([*("" for _ in FIXED), *units.values()])
        for number, launch in enumerate(launches):
            fixed = (number, 42, "python", "host", launch.get("nvtx", ""), launch["name"], 1, 7, "(128, 1, 1)", "(8, 1, 1)", 0,
                     launch.get("cc", "9.0"))  # fmt: skip
            writer.writerow([*fixed, *(launch.get(metric, "n/a") for metric in units)])
        file.write(after)
    return path
