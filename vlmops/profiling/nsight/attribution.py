"""Which ranges were open on a thread when it made a call: one sweep over time, whatever the number of ranges."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from vlmops.profiling.nsight import names

__all__ = ["NOWHERE", "Place", "Point", "Span", "process_of", "under", "within"]

THREAD_BITS = 0xFFFFFF
FOREVER = 1 << 63
ForeignOrOurs = tuple[int, int, str, "names.Range | None"]


class Span(NamedTuple):
    """An NVTX range.

    Args:
        start, end: ns; an end of ``FOREVER``: still open when the recording ended.
        thread: the global id of the thread that opened it.
        shared: a start/end range, which counts on every thread of its process; else push/pop, on its own thread only.
        text: its message.
        domain: NVTX domain, "" the default one; None: not named in the file.
    """

    start: int
    end: int
    thread: int
    shared: bool
    text: str
    domain: str | None


class Point(NamedTuple):
    """A moment of a thread."""

    time: int
    thread: int


@dataclass(frozen=True)
class Place:
    """What a launch belongs to; None: nothing of the kind was open.

    Args:
        stage, module, op, kernel: names of the innermost range of each kind.
        backend: of the op.
        range: text of the innermost range of any kind and domain.
    """

    stage: str | None = None
    module: str | None = None
    op: str | None = None
    kernel: str | None = None
    backend: str | None = None
    range: str | None = None


NOWHERE = Place()


def process_of(thread: int) -> int:
    """The global process id of a global thread id: hardware, VM and process, 24 bits of thread cleared."""
    return thread & ~THREAD_BITS


def under(spans: Iterable[Span], points: Sequence[Point]) -> list[Place]:
    """The place of each point, in their order.

    A range is open from its start to just before its end. Of several open ones the innermost started last; of two that started
    together it is the one that ends first. Ranges of several domains, and start/end ranges, need not nest.
    """
    ordered = sorted(spans, key=lambda s: (s.start, -s.end))
    stacks: dict[tuple[bool, int], dict[str, list[ForeignOrOurs]]] = {}
    found = [NOWHERE] * len(points)
    known: dict[tuple[int, ...], Place] = {}  # many points share a place
    done = 0
    for index in sorted(range(len(points)), key=lambda i: points[i].time):
        time, thread = points[index]
        while done < len(ordered) and ordered[done].start <= time:
            span = ordered[done]
            mine = names.parse(span.text, span.domain)
            owner = (span.shared, process_of(span.thread) if span.shared else span.thread)
            stack = stacks.setdefault(owner, {}).setdefault(mine.kind if mine else "", [])
            stack.append((span.end, done, span.text, mine))
            done += 1
        tops: dict[str, ForeignOrOurs] = {}
        for owner in ((False, thread), (True, process_of(thread))):
            for kind, stack in stacks.get(owner, {}).items():
                while stack and stack[-1][0] <= time:  # ended: no later point is in it
                    stack.pop()
                if stack and (kind not in tops or stack[-1][1] > tops[kind][1]):
                    tops[kind] = stack[-1]
        if tops:
            key = tuple(top[1] for top in tops.values())
            place = known.get(key)
            if place is None:
                place = known[key] = _place(tops)
            found[index] = place
    return found


def _place(tops: dict[str, ForeignOrOurs]) -> Place:
    ours = {kind: top[3] for kind, top in tops.items() if top[3] is not None}
    op = ours.get("op")
    return Place(
        **{kind: None if ours.get(kind) is None else ours[kind].name for kind in ("stage", "module", "op", "kernel")},
        backend=(op.extra or None) if op else None,
        range=max(tops.values(), key=lambda top: top[1])[2],
    )


def within(launch: Place, creation: Place) -> Place:
    """The place of a CUDA graph's kernel: where its graph was launched, made more precise by where its node was made.

    The stage is the launch's; op, module and range are those that were open while the graph was captured, if there were any.
    """
    op = creation if creation.op else launch
    return Place(
        launch.stage or creation.stage, creation.module or launch.module, op.op, creation.kernel or launch.kernel, op.backend,
        creation.range or launch.range,
    )  # fmt: skip
