"""Nsight Systems' SQLite export: what ran on the GPUs, and under which ranges it was launched.

Tables and columns are those of the "SQLite Schema Reference" in Nsight Systems' documentation. A launch is joined to the call
that made it by process and correlation id, and the call to the ranges open on its thread (``attribution``). Columns are read
by name, so that additions of later minor versions do no harm.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vlmops.profiling.nsight import names
from vlmops.profiling.nsight.attribution import FOREVER, NOWHERE, Place, Point, Span, process_of, under, within
from vlmops.profiling.nsight.database import Database, opened
from vlmops.profiling.nsight.errors import ProfileFileError

__all__ = ["SUPPORTED", "SUPPORTED_TEXT", "Launch", "Trace", "read"]

#: The major version of the export schema that is read, and the newest minor one whose description was followed.
SUPPORTED, NEWEST = 3, "3.28"
SUPPORTED_TEXT = f"export schema {SUPPORTED}.x is supported (its description was followed up to {NEWEST})"
HINT = "an export of Nsight Systems is expected: nsys export --type=sqlite --output=FILE.sqlite FILE.nsys-rep"
#: ENUM_NSYS_EVENT_TYPE of NVTX events, where the file does not bring the table.
EVENT_TYPES = {"NvtxPushPopRange": 59, "NvtxStartEndRange": 60, "NvtxDomainCreate": 75}
#: ENUM_CUDA_MEMCPY_OPER, where the file does not bring the table.
COPIES = {1: "Host-to-Device", 2: "Device-to-Host", 8: "Device-to-Device", 9: "Host-to-Host", 10: "Peer-to-Peer"}
ACTIVITY = "CUPTI_ACTIVITY_KIND_"


@dataclass(frozen=True)
class Launch:
    """Something a GPU did.

    Args:
        kind: "kernel", "graph" (a whole CUDA graph), "memcpy" or "memset".
        name: with templates and parameters; short: without.
        start, end: ns.
        process: global id; device, stream: as CUDA counts them.
        place: the ranges it was launched under.
        linked: whether the call that launched it is in the file.
        registers: of a thread; shared: bytes of static and dynamic shared memory of a block.
        bytes: copied or set.
    """

    kind: str
    name: str
    short: str
    start: int
    end: int
    process: int | None
    device: int
    stream: int
    place: Place = NOWHERE
    linked: bool = False
    registers: int | None = None
    shared: int | None = None
    bytes: int | None = None

    @property
    def ns(self) -> int:
        """Its duration."""
        return self.end - self.start


@dataclass(frozen=True)
class Trace:
    """A recording.

    Args:
        path: the file.
        schema: version of the export schema, "3.17.2".
        product: Nsight Systems' version, "" if the file does not say.
        gpus: their names.
        capability: compute capability, "9.0", where all GPUs have the same.
        launches: in the order of their tables.
        notes: what the file lacks, in words.
    """

    path: Path
    schema: str
    product: str
    gpus: tuple[str, ...]
    capability: str | None
    launches: tuple[Launch, ...]
    notes: tuple[str, ...] = field(default=())


@dataclass
class _Raw:
    """A launch before it has a place."""

    kind: str
    fields: dict[str, Any]
    correlation: int | None
    node: int | None


def read(path: Path | str) -> Trace:
    """Read an export.

    Args:
        path: FILE.sqlite.

    Raises:
        ProfileFileError: no such export, damaged, or of a schema that is not supported; the message says which are.
        OSError: it cannot be opened.
    """
    path = Path(path)
    with opened(path, HINT) as db:
        schema, product = _version(db)
        reader = _Reader(db)
        gpus, capability = reader.gpus()
        raw = [*reader.kernels(), *reader.graphs(), *reader.copies(), *reader.sets()]
        if not raw and not db.tables & {f"{ACTIVITY}{kind}" for kind in ("KERNEL", "GRAPH_TRACE", "MEMCPY", "MEMSET")}:
            raise ProfileFileError(
                path, f"no table {ACTIVITY}KERNEL: nothing ran on a GPU, or it was recorded without --trace=cuda"
            )
        launches = reader.placed(raw)
        return Trace(path, schema, product, gpus, capability, launches, tuple(reader.notes))


def _version(db: Database) -> tuple[str, str]:
    """Schema version, product version."""
    found = {name: str(value) for name, value in db.rows("META_DATA_EXPORT", ("name", "value")) if value is not None}
    parts = [found.get(f"EXPORT_SCHEMA_VERSION_{part}", "") for part in ("MAJOR", "MINOR", "MICRO")]
    version = found.get("EXPORT_SCHEMA_VERSION", "") if not parts[0] else ".".join(part or "0" for part in parts)
    version = names.clean(version)[:40]
    major = version.partition(".")[0]
    if not version:
        raise ProfileFileError(db.path, f"no schema version in META_DATA_EXPORT ({SUPPORTED_TEXT}): {HINT}")
    if not major.isascii() or not major.isdigit():
        raise ProfileFileError(db.path, f"schema version {version!r} is none ({SUPPORTED_TEXT})")
    if int(major) != SUPPORTED:
        age = "newer" if int(major) > SUPPORTED else "older"
        raise ProfileFileError(
            db.path, f"schema version {version} is {age} than what is read: {SUPPORTED_TEXT}. "
            "An .nsys-rep file can be exported again by another release of nsys"
        )  # fmt: skip
    return version, names.clean(found.get("EXPORT_PRODUCT_VERSION", ""))[:40]


class _Reader:
    """Reads the tables of one file, in any order."""

    def __init__(self, db: Database) -> None:
        self.db, self.notes = db, list[str]()
        rows = db.rows("StringIds", ("id", "value"))
        self.strings = {self.whole(n, "StringIds.id"): names.clean(str(text)) for n, text in rows}

    def whole(self, value: Any, where: str) -> int:
        """An integer; anything else is a damaged file: SQLite does not hold columns to their types."""
        if not isinstance(value, int):
            raise ProfileFileError(self.db.path, f"{where}: expected an integer, found {value!r:.60}")
        return value

    def maybe(self, value: Any, where: str) -> int | None:
        """An integer or None."""
        return None if value is None else self.whole(value, where)

    def string(self, number: Any, where: str) -> str:
        """A string by its id."""
        found = self.strings.get(self.whole(number, where))
        if found is None:
            raise ProfileFileError(self.db.path, f"{where}: StringIds has no {number}")
        return found

    def enum(self, table: str, column: str) -> dict[int, str]:
        """An enumeration's ids and the texts of a column."""
        rows = self.db.rows(table, ("id", column))
        return {self.whole(number, f"{table}.id"): names.clean(str(text)) for number, text in rows if text is not None}

    # -- what ran ------------------------------------------------------------------------------------------------------

    def gpus(self) -> tuple[tuple[str, ...], str | None]:
        """Names, and the one compute capability."""
        found = list(self.db.rows("TARGET_INFO_GPU", (), ("name", "computeMajor", "computeMinor")))
        capabilities = {(a, b) for _, a, b in found if isinstance(a, int) and isinstance(b, int)}
        one = f"{min(capabilities)[0]}.{min(capabilities)[1]}" if len(capabilities) == 1 else None
        return tuple(names.clean(str(name)) for name, *_ in found if name is not None), one

    def _activities(
        self, kind: str, more: tuple[str, ...], optional: tuple[str, ...]
    ) -> Iterable[tuple[_Raw, tuple[Any, ...]]]:
        table = f"{ACTIVITY}{kind}"
        label = {"KERNEL": "kernel", "GRAPH_TRACE": "graph"}.get(kind, kind.lower())
        required = ("start", "end", "deviceId", "streamId", "correlationId", *more)
        for row in self.db.rows(table, required, ("globalPid", "graphNodeId", *optional)):
            start, end, device, stream = (
                self.whole(value, f"{table}.{name}") for value, name in zip(row, required[:4], strict=False)
            )
            if end < start:
                raise ProfileFileError(self.db.path, f"{table}: an event ends {start - end} ns before it starts")
            at = len(required)
            process = self.maybe(row[at], f"{table}.globalPid")
            fields = dict(start=start, end=end, device=device, stream=stream, process=process)
            node = self.maybe(row[at + 1], f"{table}.graphNodeId")
            raw = _Raw(label, fields, self.maybe(row[4], f"{table}.correlationId"), node or None)
            yield raw, (*row[5:at], *row[at + 2 :])

    def kernels(self) -> list[_Raw]:
        """CUPTI_ACTIVITY_KIND_KERNEL."""
        found = []
        optional = ("registersPerThread", "staticSharedMemory", "dynamicSharedMemory")
        for raw, (short, full, registers, static, dynamic) in self._activities(
            "KERNEL", ("shortName", "demangledName"), optional
        ):
            shared = [self.maybe(n, f"{ACTIVITY}KERNEL shared memory") for n in (static, dynamic)]
            raw.fields |= dict(
                name=self.string(full, f"{ACTIVITY}KERNEL.demangledName"),
                short=self.string(short, f"{ACTIVITY}KERNEL.shortName"),
                registers=self.maybe(registers, f"{ACTIVITY}KERNEL.registersPerThread"),
                shared=None if None in shared else sum(n for n in shared if n is not None),
            )
            found.append(raw)
        return found

    def graphs(self) -> list[_Raw]:
        """CUPTI_ACTIVITY_KIND_GRAPH_TRACE: CUDA graphs recorded as one event each."""
        found = []
        for raw, (graph,) in self._activities("GRAPH_TRACE", ("graphId",), ()):
            label = f"CUDA graph {self.whole(graph, f'{ACTIVITY}GRAPH_TRACE.graphId')}"
            raw.fields |= dict(name=label, short=label)
            found.append(raw)
        if found:
            self.notes.append(
                f"{len(found)} launches of CUDA graphs were recorded whole: record with --cuda-graph-trace=node "
                "to see their kernels"
            )
        return found

    def copies(self) -> list[_Raw]:
        """CUPTI_ACTIVITY_KIND_MEMCPY."""
        labels = COPIES | self.enum("ENUM_CUDA_MEMCPY_OPER", "label")
        found = []
        for raw, (size, kind) in self._activities("MEMCPY", ("bytes", "copyKind"), ()):
            kind = self.whole(kind, f"{ACTIVITY}MEMCPY.copyKind")
            label = f"[memcpy {labels.get(kind, kind)}]"
            raw.fields |= dict(name=label, short=label, bytes=self.whole(size, f"{ACTIVITY}MEMCPY.bytes"))
            found.append(raw)
        return found

    def sets(self) -> list[_Raw]:
        """CUPTI_ACTIVITY_KIND_MEMSET."""
        found = []
        for raw, (size,) in self._activities("MEMSET", ("bytes",), ()):
            raw.fields |= dict(name="[memset]", short="[memset]", bytes=self.whole(size, f"{ACTIVITY}MEMSET.bytes"))
            found.append(raw)
        return found

    # -- who launched it -----------------------------------------------------------------------------------------------

    def spans(self) -> list[Span]:
        """NVTX_EVENTS that are ranges."""
        table = "NVTX_EVENTS"
        if table not in self.db.tables:
            self.notes.append("no NVTX_EVENTS: nothing is known of ops, modules and stages but by the kernels' names")
            return []
        types = EVENT_TYPES | {name: number for number, name in self.enum("ENUM_NSYS_EVENT_TYPE", "name").items()}
        push, start_end, create = (types[name] for name in EVENT_TYPES)
        domains: dict[tuple[int, int], str] = {}
        ranges = []
        required, optional = ("start", "end", "eventType", "globalTid"), ("text", "textId", "domainId")
        for start, end, kind, thread, text, text_id, domain in self.db.rows(table, required, optional):
            if kind not in (push, start_end, create) or thread is None:
                continue
            thread = self.whole(thread, f"{table}.globalTid")
            if text is None and text_id is not None:
                text = self.string(text_id, f"{table}.textId")
            domain = self.maybe(domain, f"{table}.domainId") or 0
            if kind == create:
                domains[process_of(thread), domain] = names.clean(str(text))
                continue
            start = self.whole(start, f"{table}.start")
            end = FOREVER if end is None else self.whole(end, f"{table}.end")
            if end < start:
                raise ProfileFileError(self.db.path, f"{table}: a range ends {start - end} ns before it starts")
            ranges.append((start, end, thread, kind == start_end, names.clean(str(text or "")), domain))
        if not ranges:
            self.notes.append("no NVTX range was recorded: run the program under vlmops.profiling.annotate.annotated")
        return [
            Span(start, end, thread, shared, text, "" if domain == 0 else domains.get((process_of(thread), domain)))
            for start, end, thread, shared, text, domain in ranges
        ]

    def calls(self, wanted: set[int]) -> dict[tuple[int, int], Point]:
        """(process, correlation id) -> when and on which thread the launching call began; the outermost of nested ones."""
        table = f"{ACTIVITY}RUNTIME"
        if table not in self.db.tables:
            self.notes.append(f"no {table}: launches cannot be joined to ranges; record with --trace=cuda,nvtx")
        found: dict[tuple[int, int], Point] = {}
        for start, thread, correlation in self.db.rows(table, ("start", "globalTid", "correlationId")):
            if thread is None or correlation not in wanted:
                continue
            point = Point(self.whole(start, f"{table}.start"), self.whole(thread, f"{table}.globalTid"))
            key = (process_of(point.thread), correlation)
            if key not in found or point < found[key]:
                found[key] = point
        return found

    def nodes(self) -> dict[tuple[int, int], tuple[Point, int | None]]:
        """(process, CUDA graph node) -> where it was made, and the node it was cloned from."""
        table = "CUDA_GRAPH_NODE_EVENTS"
        found: dict[tuple[int, int], tuple[Point, int | None]] = {}
        for start, thread, node, original in self.db.rows(
            table, ("start", "globalTid", "graphNodeId"), ("originalGraphNodeId",)
        ):
            if thread is None:
                continue
            point = Point(self.whole(start, f"{table}.start"), self.whole(thread, f"{table}.globalTid"))
            key = (process_of(point.thread), self.whole(node, f"{table}.graphNodeId"))
            if key not in found or point < found[key][0]:
                found[key] = (point, self.maybe(original, f"{table}.originalGraphNodeId") or None)
        return found

    def placed(self, raw: list[_Raw]) -> tuple[Launch, ...]:
        """The launches with their places."""
        calls = self.calls({r.correlation for r in raw if r.correlation is not None})
        only = {process for process, _ in calls}
        nodes = self.nodes() if any(r.node is not None for r in raw) else {}
        points: dict[Point, int] = {}
        launched, made = [], []
        for r in raw:
            process = r.fields["process"]
            if process is None and len(only) == 1:  # the column may be empty
                (process,) = only
            r.fields["process"] = process
            call = None if process is None or r.correlation is None else calls.get((process, r.correlation))
            launched.append(None if call is None else points.setdefault(call, len(points)))
            root = None if process is None or r.node is None else _root(nodes, process, r.node)
            made.append(None if root is None else points.setdefault(root, len(points)))
        lost = sum(at is None for at in launched)
        if lost and f"{ACTIVITY}RUNTIME" in self.db.tables:
            self.notes.append(
                f"{lost} of {len(raw)} launches have no call in the file: they began before the recording"
            )
        places = under(self.spans(), list(points))
        found = []
        for r, at, node in zip(raw, launched, made, strict=True):
            place = NOWHERE if at is None else places[at]
            place = place if node is None else within(place, places[node])
            found.append(Launch(r.kind, place=place, linked=at is not None, **r.fields))
        return tuple(found)


def _root(nodes: dict[tuple[int, int], tuple[Point, int | None]], process: int, node: int) -> Point | None:
    """Where the node was made that this one is a clone of a clone of."""
    seen = set()
    while node not in seen and (process, node) in nodes:
        seen.add(node)
        point, original = nodes[process, node]
        if original is None or (process, original) not in nodes:
            return point if original is None else None  # a clone's own moment is its graph's instantiation
        node = original
    return None
