"""The report's tables, once for HTML and Markdown: head and rows of plain text."""

from __future__ import annotations

import statistics
from dataclasses import dataclass

from vlmops.profiling.report.data import KINDS, Profile, Row, Run, grouped
from vlmops.profiling.report.opportunities import find, milliseconds

__all__ = [
    "Table", "accounting", "memory", "module_rows", "modules", "op_rows", "opportunities", "ops", "roofline", "side_by_side",
    "stage_rows", "stages", "summary", "unpatched",
]  # fmt: skip

TOP = 25


@dataclass
class Table:
    """A title, what to know about it, column heads, and rows of as many cells. Columns from ``numbers`` on are figures."""

    title: str
    note: str
    head: list[str]
    rows: list[list[str]]
    numbers: int = 1


def summary(profile: Profile) -> list[str]:
    """What the report says first."""
    lines = []
    for run in profile.runs.values():
        shares = ", ".join(f"{share:.1%} {KINDS[kind]}" for kind, share in run.shares().items() if share >= 0.0005)
        plain = milliseconds(statistics.median(run.plain or (0.0,)))
        text = f"{run.name}: {plain} a step without the profiler (median of {len(run.plain)}), "
        text += f"{milliseconds(run.clock or run.seconds)} with it: {shares}."
        if run.kernels:
            text += f" GPU kernels: {milliseconds(run.kernels)} a step."
        lines.append(text)
    step = f"generates {profile.generate} tokens" if profile.generate else "is one forward"
    given = ", ".join(f"{name} {what}" for name, what in profile.inputs.items())
    lines.append(f"A step {step}; inputs: {given}; {profile.dtype} on {profile.device}. {profile.agreement}.")
    return lines


def side_by_side(profile: Profile, rows: dict[str, list[Row]]) -> list[tuple[str, list[Row | None]]]:
    """(name, one row a run), the longest first.

    Args:
        rows: name of a run -> its rows, each name once.
    """
    found: dict[str, list[Row | None]] = {}
    for i, name in enumerate(profile.runs):
        for row in rows[name]:
            found.setdefault(row.name, [None] * len(profile.runs))[i] = row
    return sorted(found.items(), key=lambda item: -max(row.seconds for row in item[1] if row is not None))


def stage_rows(profile: Profile) -> dict[str, list[Row]]:
    """Each run's stages."""
    return {name: run.stages for name, run in profile.runs.items()}


def module_rows(profile: Profile) -> dict[str, list[Row]]:
    """Each run's modules, layers of one kind together."""
    return {name: grouped(run.modules, details=False) for name, run in profile.runs.items()}


def op_rows(profile: Profile) -> dict[str, list[Row]]:
    """Each run's outermost ops, by name."""
    return {name: grouped(run.ops, details=False) for name, run in profile.runs.items()}


def _cells(rows: list[Row | None], profile: Profile) -> list[str]:
    cells = []
    for row, run in zip(rows, profile.runs.values(), strict=True):
        if row is None:
            cells += ["", "", ""]
        else:
            cells += [f"{row.seconds * 1e3:.3f}", f"{row.own * 1e3:.3f}", f"{row.seconds / run.seconds:.1%}"]
    return cells


def _compared(profile: Profile, title: str, note: str, rows: dict[str, list[Row]]) -> Table:
    head = [title.lower()[:-1]]
    for name in profile.runs:
        head += [f"{name}, ms", "own, ms", "share"]
    found = side_by_side(profile, rows)[:TOP]
    return Table(title, note, head, [[name, *_cells(pair, profile)] for name, pair in found])


def stages(profile: Profile) -> Table:
    """Time by stage."""
    note = "A step. Own time leaves out stages inside (Qwen's merger runs inside its tower)."
    return _compared(profile, "Stages", note, stage_rows(profile))


def modules(profile: Profile) -> Table:
    """Time by module."""
    note = "Modules of one kind together (layers as *), with what is inside them; own time leaves out modules inside."
    return _compared(profile, "Modules", note, module_rows(profile))


def ops(profile: Profile) -> Table:
    """Time by outermost op."""
    note = "vlmops ops with all they call, and PyTorch ops outside them; own time leaves out ops inside."
    return _compared(profile, "Ops", note, op_rows(profile))


def accounting(profile: Profile) -> Table:
    """Whose time each stage is, and whether it adds up."""
    rows = []
    for run in profile.runs.values():
        for stage in [None, *dict.fromkeys(row.name for row in run.stages)]:
            shares = run.shares(stage)
            rows.append([
                run.name, stage or "whole step, by the clock", *[f"{share:.2%}" for share in shares.values()],
                f"{run.difference(stage):+.2%}",
            ])  # fmt: skip
    note = "Shares of a stage's own time. The last column is the sum of all its parts over the stage's time, less 1."
    return Table("Accounting", note, ["run", "stage", *KINDS.values(), "off by"], rows, 2)


def roofline(profile: Profile) -> Table:
    """Each op against the measured peaks."""
    peaks = profile.peaks
    rows = []
    for run in profile.runs.values():
        for dot in run.dots:
            rows.append([
                run.name, dot.name, dot.detail, f"{dot.calls:.0f}", f"{dot.seconds * 1e3:.3f}", f"{dot.intensity:.1f}",
                f"{dot.flops / dot.seconds / 1e9:.1f}", f"{dot.bytes / dot.seconds / 1e9:.2f}", f"{dot.share(peaks):.0%}",
            ])  # fmt: skip
    note = (
        f"Peaks measured in this run: {peaks.bandwidth / 1e9:.1f} GB/s (a copy of {peaks.copied / 2**20:.0f} MiB, read and "
        f"written), {peaks.flops / 1e9:.0f} GFLOP/s (one large {peaks.dtype} product). Work is the least an op needs; above "
        "100% its data came from caches."
    )
    head = ["run", "op", "tensors", "calls", "ms a call", "FLOP/byte", "GFLOP/s", "GB/s", "of the roof"]
    return Table("Roofline", note, head, rows, 3)


def opportunities(profile: Profile) -> Table:
    """The findings in words."""
    rows = [[str(i), o.what, o.todo] for i, o in enumerate(find(profile), 1)]
    note = f"About the {profile.last.name} model, by time at stake; every figure is from this profile."
    return Table("Opportunities", note, ["", "what was seen", "what to do"], rows, 3)


def unpatched(profile: Profile) -> Table:
    """What patching replaced and left, equal rows counted."""
    groups: dict[tuple[str, ...], int] = {}
    for row in profile.patch:
        key = (row["cls"], row["operation"], row["backend"], row["status"], row["why"])
        groups[key] = groups.get(key, 0) + 1
    rows = [[*key, str(count)] for key, count in groups.items()]
    return Table("Patching", "", ["class", "operation", "backend", "status", "why", "modules"], rows, 5)


def memory(run: Run) -> str:
    """One run's memory in words."""
    found = run.memory
    if not found.points:
        return f"{run.name}: nothing was allocated"
    return (
        f"{run.name}: at most {found.peak / 2**20:.1f} MiB above the step's begin, in {found.where or 'no named thing'}"
    )
