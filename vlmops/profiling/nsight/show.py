"""A report on a terminal, as Markdown, and as files."""

from __future__ import annotations

import json
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from vlmops.profiling.nsight.report import INFERRED, Report, Row, Sum

__all__ = ["JSON_NAME", "MARKDOWN_NAME", "markdown", "show", "write"]

JSON_NAME, MARKDOWN_NAME = "nsight.json", "nsight.md"
ROWS = 50  # in tables; the JSON has all of them
HEADS = (
    "kernel", "op", "module", "stage", "count", "total ms", "share", "GB/s", "tensor %", "occupancy %", "main stall",
    "of roof", "budget",
)  # fmt: skip
MISSING = "-"


def _number(value: float | None, digits: int = 1) -> str:
    return MISSING if value is None else f"{value:.{digits}f}"


def _cells(row: Row) -> list[str]:
    op = row.op or MISSING
    if row.backend:
        op += f" ({row.backend})"
    roof = MISSING if row.roof is None else f"{row.roof:.0%} of {row.limit}"
    return [
        row.kernel, op + ("*" if row.op_from == INFERRED else ""), row.module or MISSING, row.stage or MISSING, str(row.count),
        _number(row.total_ms, 3), f"{row.share:.1%}", _number(row.gbytes), _number(row.tensor), _number(row.occupancy),
        row.stall or MISSING, roof, MISSING if row.budget == "none" else f"{row.budget}: {row.budget_text}",
    ]  # fmt: skip


def _sum_cells(found: Sum) -> list[str]:
    return [found.name or "none", str(found.count), _number(found.total_ms, 3), f"{found.share:.1%}"]


def _footnotes(report: Report) -> list[str]:
    notes = list(report.notes)
    if any(row.op_from == INFERRED for row in report.rows[:ROWS]):
        notes.append("*: no op's range was open; only this op has a kernel of this name")
    if len(report.rows) > ROWS:
        rest = sum(row.share for row in report.rows[ROWS:])
        notes.append(f"{len(report.rows) - ROWS} more rows, {rest:.1%} of the time, are in the JSON")
    return notes


def show(report: Report, console: Console) -> None:
    """Print the sums by stage and op, the longest rows, and the notes."""
    console.print(report.source, markup=False)
    for what in ("stage", "op"):
        table = Table(what, "launches", "ms", "share", title=f"GPU time by {what}")
        for found in report.by(what):
            table.add_row(*(Text(cell) for cell in _sum_cells(found)))
        console.print(table)
    table = Table(title=f"{report.total_ms:.3f} ms of GPU time")
    for head in HEADS:
        table.add_column(head, overflow="fold")
    for row in report.rows[:ROWS]:
        table.add_row(*(Text(cell) for cell in _cells(row)))
    console.print(table)
    for note in _footnotes(report):
        console.print(note, markup=False, soft_wrap=True)


def _line(cells: list[str]) -> str:
    escaped = (
        cell.replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;").replace("`", "\\`") for cell in cells
    )
    return f"| {' | '.join(escaped)} |"


def _table(heads: list[str], rows: list[list[str]]) -> list[str]:
    return [_line(heads), f"|{'---|' * len(heads)}", *(_line(row) for row in rows), ""]


def markdown(report: Report) -> str:
    """The report as Markdown."""
    lines = ["# GPU profile", "", _line([report.source]).strip("| "), ""]
    for what in ("stage", "op", "module"):
        sums = report.by(what)[:ROWS]
        lines += [f"## By {what}", "", *_table([what, "launches", "ms", "share"], [_sum_cells(s) for s in sums])]
    lines += ["## Kernels", "", *_table(list(HEADS), [_cells(row) for row in report.rows[:ROWS]])]
    lines += [f"- {_line([note]).strip('| ')}" for note in _footnotes(report)]
    return "\n".join(lines).rstrip() + "\n"


def write(report: Report, folder: Path) -> tuple[Path, Path]:
    """nsight.json and nsight.md in a folder, which is made.

    Raises:
        OSError: it cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = folder / JSON_NAME, folder / MARKDOWN_NAME
    texts = json.dumps(report.as_dict(), indent=1, allow_nan=False) + "\n", markdown(report)
    for path, text in zip(paths, texts, strict=True):
        path.write_text(text, encoding="utf-8")
    return paths
