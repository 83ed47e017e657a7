"""From a trace of torch.profiler to rows: each moment of a step belongs to the innermost named thing it lies in.

The trace is the file that Chrome and Perfetto read. Ranges and ops nest on the thread that ran the model; GPU kernels are
joined to the op that launched them by their correlation number.
"""

from __future__ import annotations

import bisect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from vlmops.backends.ranges import COLOURS, SEPARATOR
from vlmops.profiling.report.data import Memory, Piece, Row, Run, pattern

__all__ = ["ROOT", "Shaped", "TraceError", "account", "shapes"]

#: (PyTorch op outside vlmops ops, shapes of its tensors) -> calls, seconds and GPU seconds a step.
Shaped = dict[tuple[str, tuple[tuple[int, ...], ...]], tuple[float, float, float]]

#: Name of the model itself among its modules.
ROOT = "(model)"
OPS = ("cpu_op", "cuda_runtime", "cuda_driver")
KERNELS = ("kernel", "gpu_memcpy", "gpu_memset")
POINTS = 2000  # of a memory timeline: what a screen can show


class TraceError(ValueError):
    """A trace that holds no step."""


@dataclass
class _Node:
    """One range or op; times in ns."""

    kind: str  # "stage", "module", "op", "stock" or "" (a range of somebody else)
    name: str
    detail: str
    begin: int
    end: int
    parent: _Node | None = None
    inside: int = 0  # ns of the children
    correlation: Any = None
    dims: tuple[tuple[int, ...], ...] = ()
    stage: str = ""
    module: str = ""
    outer: _Node | None = None  # outermost op around it, or itself
    inner_stage: int = 0
    inner_module: int = 0
    gpu: float = 0.0

    @property
    def length(self) -> int:
        return self.end - self.begin

    @property
    def own(self) -> int:
        return self.length - self.inside


@dataclass
class _Totals:
    """Rows under construction, by key, in order of appearance."""

    rows: dict[Any, Row] = field(default_factory=dict)

    def add(self, kind: str, name: str, detail: str, *, calls: float = 0, seconds: float = 0, own: float = 0, gpu=0.0):
        row = self.rows.setdefault((kind, name, detail), Row(kind, name, detail))
        row.add(Row(kind, name, detail, calls, seconds, own, gpu))


def _parse(message: str) -> tuple[str, str, str]:
    """A range's message -> kind, name, detail; kind "" where it is none of ours."""
    kind, colon, rest = message.partition(": ")
    if not colon or kind not in COLOURS:
        return "", message, ""
    name, _, detail = rest.partition(SEPARATOR)
    if kind == "module" and name.endswith(")") and " (" in name:
        name, _, detail = name[:-1].rpartition(" (")
    return kind, name, detail


def _dims(event: Mapping[str, Any]) -> tuple[tuple[int, ...], ...]:
    """Shapes of the tensor arguments of an op; scalars and lists are left out."""
    given = event.get("args", {}).get("Input Dims", ())
    return tuple(tuple(d) for d in given if d and all(isinstance(n, int) for n in d))


def _nodes(events: Sequence[Mapping[str, Any]]) -> tuple[list[_Node], int, int]:
    """The nodes of the thread that runs the model in the order of their begin, ns clipped, ns of ops on other threads."""
    threads = [e["tid"] for e in events if e.get("cat") == "user_annotation" and _parse(e["name"])[0] == "stage"]
    if not threads:
        raise TraceError('trace: it has no range of a stage ("stage: ...")')
    main, elsewhere, found = threads[0], 0, []
    for event in events:
        category = event.get("cat")
        if event.get("ph") != "X" or category not in (*OPS, "user_annotation"):
            continue
        begin = round(event["ts"] * 1e3)
        end = begin + round(event["dur"] * 1e3)
        if event["tid"] != main:
            elsewhere += end - begin if category == "cpu_op" else 0
            continue
        if category == "user_annotation":
            node = _Node(*_parse(event["name"]), begin, end)
        else:
            correlation = event.get("args", {}).get("correlation") if category != "cpu_op" else None
            node = _Node("stock", event["name"], "", begin, end, correlation=correlation, dims=_dims(event))
        found.append(node)
    found.sort(key=lambda n: (n.begin, -n.end))  # stable: of two equal ones the trace's order decides
    return found, _nest(found), elsewhere


def _nest(nodes: Sequence[_Node]) -> int:
    """Give each its parent, stage, module and outermost op; returns the ns that were clipped to make all nest."""
    stack: list[_Node] = []
    clipped = 0
    for node in nodes:
        while stack and stack[-1].end <= node.begin and not (node.begin == node.end == stack[-1].end):
            stack.pop()
        parent = stack[-1] if stack else None
        if parent is not None:
            clipped += max(0, node.end - parent.end)
            node.end = min(node.end, parent.end)
            node.parent, node.stage, node.module, node.outer = parent, parent.stage, parent.module, parent.outer
            parent.inside += node.length
        if node.outer is None:
            if node.kind == "stage":
                _inner(node, "stage")
                node.stage, node.module = node.name, ""
            elif node.kind == "module":
                _inner(node, "module")
                node.module = node.name
        if node.kind in ("op", "stock") and node.outer is None:
            node.outer = node
        stack.append(node)
    return clipped


def _inner(node: _Node, kind: str) -> None:
    """Tell the closest range of this kind around it that this one lies inside."""
    around = node.parent
    while around is not None and around.kind != kind:
        around = around.parent
    if around is not None:
        if kind == "stage":
            around.inner_stage += node.length
        else:
            around.inner_module += node.length


def _launch(nodes: Sequence[_Node], events: Sequence[Mapping[str, Any]]) -> float:
    """Add kernels' times to what launched them, outwards; returns ns of all kernels."""
    by_correlation = {n.correlation: n for n in nodes if n.correlation is not None}
    total = 0.0
    for event in events:
        if event.get("cat") not in KERNELS or event.get("ph") != "X":
            continue
        took = event["dur"] * 1e3
        total += took
        node = by_correlation.get(event.get("args", {}).get("correlation"))
        while node is not None:
            node.gpu += took
            node = node.parent
    return total


def account(trace: Mapping[str, Any], name: str, steps: int, device: str = "cpu") -> tuple[Run, Shaped]:
    """The rows of a trace, and its PyTorch ops by shape.

    Args:
        trace: the parsed file, with ranges of ``vlmops.backends.ranges``; each step is one or more outermost stages.
        name: of the run.
        steps: how many steps the trace holds.
        device: whose memory is followed, "cpu" or "cuda".

    Raises:
        TraceError: it has no stage.
    """
    events = trace["traceEvents"]
    nodes, clipped, elsewhere = _nodes(events)
    kernels = _launch(nodes, events)
    unit = 1e-9 / steps
    stages, modules, ops, inner = _Totals(), _Totals(), _Totals(), _Totals()
    pieces: dict[tuple[str, str, str, str], float] = {}
    shaped: Shaped = {}
    whole = 0
    for node in nodes:
        if not node.stage:
            continue  # before a step or after it
        if node.parent is None or not node.parent.stage:
            whole += node.length
        took, own, gpu = node.length * unit, node.own * unit, node.gpu * unit
        if node.outer is None and node.kind in ("stage", "module"):
            table, within = (stages, node.inner_stage) if node.kind == "stage" else (modules, node.inner_module)
            table.add(
                node.kind, node.name, node.detail, calls=1 / steps, seconds=took, own=took - within * unit, gpu=gpu
            )
        if node.outer is node:
            detail = node.detail if node.kind == "op" else shapes(node.dims)
            ops.add(node.kind, node.name, detail, calls=1 / steps, seconds=took, own=own, gpu=gpu)
        if node.kind in ("op", "stock"):
            inner.add(node.kind, node.name, pattern(node.module), calls=1 / steps, seconds=took, own=own)
        if node.kind == "stock" and node.dims and node.outer is not None and node.outer.kind == "stock":
            before = shaped.get((node.name, node.dims), (0.0, 0.0, 0.0))
            shaped[node.name, node.dims] = (before[0] + 1 / steps, before[1] + took, before[2] + gpu)
        kind, label = "unnamed", node.name
        if node.outer is not None:
            kind, label = node.outer.kind, node.outer.name
        elif node.module:
            kind, label = "python", node.module
        key = (node.stage, node.module, kind, label)
        pieces[key] = pieces.get(key, 0.0) + own
    run = Run(name, steps, whole * unit, kernels=kernels * unit, clipped=clipped * unit, other_threads=elsewhere * unit)
    run.stages, run.modules = list(stages.rows.values()), list(modules.rows.values())
    run.ops, run.inner = list(ops.rows.values()), list(inner.rows.values())
    run.pieces = [Piece(*key, seconds) for key, seconds in pieces.items()]
    run.memory = _memory(events, nodes, steps, device)
    return run, shaped


def shapes(dims: Sequence[Sequence[int]]) -> str:
    """Shapes in words: "4x3, 3x5"."""
    return ", ".join("x".join(map(str, d)) for d in dims)


# -- memory ------------------------------------------------------------------------------------------------------------


def _memory(events: Sequence[Mapping[str, Any]], nodes: Sequence[_Node], steps: int, device: str) -> Memory:
    """Allocated bytes through the last step."""
    outermost = [n for n in nodes if n.kind == "stage" and n.parent is None]
    per_step = max(1, len(outermost) // steps)
    begin, end = outermost[-per_step].begin, outermost[-1].end
    wanted = {"cpu": 0, "cuda": 1}.get(device, 0)
    seen = []
    for event in events:
        if event.get("name") == "[memory]" and event.get("args", {}).get("Device Type") == wanted:
            at = round(event["ts"] * 1e3)
            if begin <= at <= end:
                seen.append((at, int(event["args"]["Bytes"])))
    seen.sort(key=lambda pair: pair[0])
    points, level = [(0.0, 0)], 0
    peak, peak_at = 0, begin
    for at, change in seen:
        level += change
        points.append(((at - begin) * 1e-9, level))
        if level > peak:
            peak, peak_at = level, at
    points.append(((end - begin) * 1e-9, level))
    return Memory(_thinned(points), peak, _where(nodes, peak_at), device)


def _thinned(points: list[tuple[float, int]]) -> list[tuple[float, int]]:
    """At most ``POINTS``: the lowest and highest of each stretch stay, so no peak is lost."""
    if len(points) <= POINTS:
        return points
    width = -(-2 * len(points) // POINTS)
    kept = []
    for i in range(0, len(points), width):
        part = points[i : i + width]
        kept += sorted({min(part, key=lambda p: p[1]), max(part, key=lambda p: p[1])})
    return kept


def _where(nodes: Sequence[_Node], at: int) -> str:
    """The stage, module and op open at a moment."""
    last = bisect.bisect_right([n.begin for n in nodes], at) - 1
    node = nodes[last] if last >= 0 else None
    while node is not None and node.end < at:
        node = node.parent
    if node is None:
        return ""
    op = f"{node.outer.name} in " if node.outer is not None else ""
    return f"{op}{node.module or 'no module'}, stage {node.stage or 'none'}"
