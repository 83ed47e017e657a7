"""The run's report: tables for the terminal and report.md, everything for report.json."""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from vlmops.backends import native, probe
from vlmops.profiling.report.facts import commit, facts
from vlmops.profiling.suite.chosen import Chosen
from vlmops.profiling.suite.measure import Measured
from vlmops.profiling.suite.row import Row

__all__ = ["FORMAT", "Run", "as_dict", "as_markdown", "lines", "write"]

FORMAT = 1
PACKAGES = (
    "torch",
    "transformers",
    "vlmops",
    "openvino",
    "onnxruntime",
    "onnx",
    "flash-attn",
    "liger-kernel",
    "pytest-benchmark",
)
MACHINE = ("cpu", "cores", "instruction_sets", "memory_gib", "python", "gpus")
COLUMNS = ("candidate", "ms", "spread", "outliers", "GFLOP/s", "GB/s", "of peak", "peak MiB", "times as fast as")


@dataclass
class Run:
    """A session.

    Args:
        chosen: its options.
        command: what was typed.
        groups: what was measured, in order.
        absent: (op or model, peer) -> why there is no such peer.
        seconds: it took.
    """

    chosen: Chosen
    command: str
    groups: list[Measured] = field(default_factory=list)
    absent: dict[tuple[str, str], str] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def rows(self) -> list[Row]:
        """Of all groups."""
        return [row for group in self.groups for row in group.rows.values()]


def left_out(run: Run) -> list[dict[str, str]]:
    """Group (or op), candidate and reason of everything that was not measured."""
    found = [
        {"group": group.group, "candidate": name, "reason": reason}
        for group in run.groups
        for name, reason in group.left_out.items()
    ]
    return found + [{"group": what, "candidate": peer, "reason": why} for (what, peer), why in run.absent.items()]


def failed(run: Run) -> list[dict[str, str]]:
    """The same of everything whose output was wrong."""
    return [
        {"group": group.group, "candidate": name, "reason": reason}
        for group in run.groups
        for name, reason in group.failed.items()
    ]


def as_dict(run: Run) -> dict[str, Any]:
    """What report.json holds; docs/profiling.md lists the keys."""
    machine = probe.report()
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    return {
        "kind": "vlmops benchmark report", "format": FORMAT,
        "machine": {k: machine[k] for k in MACHINE if k in machine}, "native": native.isa() or native.reason(),
        "versions": versions, "date": facts(torch.device("cpu"))["date"], "commit": commit(), "command": run.command,
        "settings": run.chosen.as_dict(), "seconds": run.seconds, "rows": [row.as_dict() for row in run.rows],
        "failed": failed(run), "left_out": left_out(run),
    }  # fmt: skip


def _cells(row: Row) -> list[str]:
    def number(value: float | None, form: str) -> str:
        return "" if value is None else format(value, form)

    extra = row.extra()
    peers = ", ".join(f"{name} {p['ratio']:.2f} [{p['low']:.2f}, {p['high']:.2f}]" for name, p in row.peers.items())
    memory = row.peak_memory if row.process_peak_memory is None else row.process_peak_memory
    return [
        row.candidate, f"{row.timing.median * 1e3:.3f}", f"{row.timing.spread:.0%}", str(row.outliers),
        number(extra["gflops"], ".0f"), number(extra["gbytes"], ".1f"), number(row.share_of_peak, ".0%"),
        "" if memory is None else f"{memory / 2**20:.1f}", peers,
    ]  # fmt: skip


def _notes(group: Measured) -> list[str]:
    found = []
    for name, row in group.rows.items():
        about = [
            f"backend {row.backend}" if row.backend else "",
            f"precision {row.precision}" if row.precision else "",
            row.note,
        ]
        if any(about):
            found.append(f"{name}: {'; '.join(part for part in about if part)}")
    found += [f"{name}: FAILED, {why}" for name, why in group.failed.items()]
    found += [f"{name}: left out, {why}" for name, why in group.left_out.items()]
    untimed = [name for name in group.right if name not in group.rows]
    return found + ([f"right, not timed: {', '.join(untimed)}"] if untimed else [])


def _title(group: Measured) -> str:
    bounds = {f"{row.bound}-bound" for row in group.rows.values()}
    return f"{group.group} ({', '.join(sorted(bounds))})" if bounds else group.group


def lines(run: Run) -> list[str]:
    """One table a group, as text."""
    found = []
    for i, group in enumerate(run.groups):
        found += [*[""][:i], _title(group)]
        if group.rows:
            found += _aligned([list(COLUMNS), *(_cells(row) for row in group.rows.values())])
        found += [f"  {note}" for note in _notes(group)]
    for reason, what in _absences(run):
        found += ["", f"no such peer, {reason}: {what}"]
    found += ["", _count(run)]
    if run.chosen.quick and run.rows:
        found.append("--quick: small shapes; these figures show that everything runs and are not to be quoted")
    return found


def _aligned(table: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    text = []
    for row in table:
        cells = [
            cell.ljust(w) if i in (0, len(widths) - 1) else cell.rjust(w)
            for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ]
        text.append("  " + "  ".join(cells).rstrip())
    return text


def _absences(run: Run) -> Iterable[tuple[str, str]]:
    found: dict[str, dict[str, list[str]]] = {}
    for (what, peer), why in run.absent.items():
        found.setdefault(why, {}).setdefault(peer, []).append(what)
    for why, peers in found.items():
        yield why, "; ".join(f"{peer} of {', '.join(names)}" for peer, names in peers.items())


def _count(run: Run) -> str:
    out, wrong = sum(len(g.left_out) for g in run.groups), len(failed(run))
    return f"{len(run.rows)} measured in {len(run.groups)} groups, {out} left out, {wrong} failed; {run.seconds:.0f} s"


def as_markdown(run: Run) -> str:
    """The report as report.md."""
    data = as_dict(run)
    machine, settings = data["machine"], data["settings"]
    text = ["# Benchmarks", "", "| | |", "|---|---|"]
    facts_ = {
        "machine": f"{machine.get('cpu')}, {machine.get('cores')} cores, {machine.get('memory_gib')} GiB",
        "software": ", ".join(f"{name} {version}" for name, version in data["versions"].items() if version),
        "date, commit": f"{data['date']}, `{data['commit']}`",
        "command": f"`{data['command']}`",
        "settings": f"{settings['device']}, {settings['threads']} threads, {settings['rounds']} rounds, "
        + f"backend {settings['backend']}{', ranges open' if settings['nvtx'] else ''}",
    }  # fmt: skip
    text += [f"| {name} | {_escaped(value)} |" for name, value in facts_.items()]
    text += [
        "",
        "Medians of interleaved rounds, outputs checked first; behind each ratio its 95% interval, over whole rounds.",
    ]
    for group in run.groups:
        text += ["", f"## {_title(group)}", ""]
        if group.rows:
            text += [f"| {' | '.join(COLUMNS)} |", f"|{'---|' * len(COLUMNS)}"]
            text += [f"| {' | '.join(_escaped(cell) for cell in _cells(row))} |" for row in group.rows.values()]
            text.append("")
        text += [f"- {_escaped(note)}" for note in _notes(group)]
    absences = list(_absences(run))
    if absences:
        text += ["", "## No such peer", "", *(f"- {why}: {what}" for why, what in absences)]
    return "\n".join([*text, "", _count(run), ""])


def _escaped(text: str) -> str:
    return text.replace("|", "\\|")


def write(run: Run, folder: Path) -> list[Path]:
    """report.md and report.json in the folder, which is made where it is missing."""
    folder.mkdir(parents=True, exist_ok=True)
    markdown, data = folder / "report.md", folder / "report.json"
    markdown.write_text(as_markdown(run), encoding="utf-8")
    data.write_text(json.dumps(as_dict(run), indent=1) + "\n", encoding="utf-8")
    return [markdown, data]
