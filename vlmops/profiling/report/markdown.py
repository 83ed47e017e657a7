"""The report as Markdown, for issues and pull requests."""

from __future__ import annotations

from vlmops.profiling.report import tables
from vlmops.profiling.report.data import Profile

__all__ = ["render"]


def _cell(text: str) -> str:
    """Text that no table or HTML reads as its own."""
    for plain, safe in (("&", "&amp;"), ("<", "&lt;"), (">", "&gt;"), ("|", "\\|"), ("\n", " ")):
        text = text.replace(plain, safe)
    return text.replace("*", "\\*").replace("_", "\\_").replace("`", "\\`")


def _table(table: tables.Table) -> list[str]:
    if not table.rows:
        return []
    rule = [":--" if i < table.numbers else "--:" for i in range(len(table.head))]
    rows = [table.head, *table.rows]
    lines = ["| " + " | ".join(map(_cell, row)) + " |" for row in rows]
    lines.insert(1, "|" + "|".join(rule) + "|")
    return [f"## {table.title}", "", *([_cell(table.note), ""] if table.note else []), *lines, ""]


def render(profile: Profile) -> str:
    """The whole report."""
    lines = [f"# Profile of {_cell(profile.model)}", ""]
    lines += [f"- {_cell(line)}" for line in tables.summary(profile)] + [""]
    for make in (
        tables.opportunities, tables.stages, tables.accounting, tables.modules, tables.ops, tables.roofline, tables.unpatched,
    ):  # fmt: skip
        lines += _table(make(profile))
    lines += ["## Memory", "", *[f"- {_cell(tables.memory(run))}" for run in profile.runs.values()], ""]
    lines += ["---", "", *[f"- {_cell(name)}: {_cell(value)}" for name, value in profile.facts.items()], ""]
    return "\n".join(lines)
