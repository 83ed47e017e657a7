"""The result on a terminal, as JSON and as one HTML page that needs nothing else."""

from __future__ import annotations

import html
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from vlmops.profiling.gpu_check.run import Check

__all__ = ["HTML_NAME", "JSON_NAME", "page", "show", "summary", "write"]

JSON_NAME, HTML_NAME = "gpu-check.json", "gpu-check.html"
NO_TIMES = "Triton's interpreter on a CPU: outputs and gradients were compared, nothing was timed."


def summary(data: dict[str, Any]) -> str:
    """One line."""
    text = f"{data['passed']} parity cases passed, {data['failed']} failed, {data['skipped']} skipped"
    cut = sum(row["reason"] == "budget" for row in (*data["parity"], *data["timings"]))
    if cut:
        text += f" ({cut} for want of time)"
    rows = sum(len(load["rows"]) for load in data["timings"])
    timed = f"; {rows} timings" if data["settings"]["device"] == "cuda" else "; no timings: interpreter"
    return f"{text}{timed}; {data['seconds']:.0f} s"


def by_backend(parity: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Counts for each op and backend, the worst error as a share of its bound, and why cases were skipped."""
    groups: dict[tuple[str, str], dict[str, Any]] = {}
    for row in parity:
        group = groups.setdefault(
            (row["op"], row["backend"]),
            {
                "op": row["op"],
                "backend": row["backend"],
                "passed": 0,
                "failed": 0,
                "skipped": 0,
                "worst": 0.0,
                "skips": {},
            },
        )
        group[row["status"]] += 1
        group["worst"] = max(group["worst"], row["error_over_bound"] or 0.0)
        if row["status"] == "skipped":
            group["skips"][row["reason"]] = group["skips"].get(row["reason"], 0) + 1
    return list(groups.values())


def _reasons(skips: dict[str, int]) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in skips.items())


def facts(machine: dict[str, Any]) -> list[tuple[str, str]]:
    """What is known of the machine."""
    return [(name, str(value)) for name, value in machine.items() if value is not None]


def peak_lines(peaks: dict[str, Any] | None) -> list[str]:
    """The measured limits in words."""
    if peaks is None:
        return []
    products = [f"{name} {rate / 1e12:.1f} TFLOP/s" for name, rate in peaks["flops"].items()]
    return [f"copy {peaks['bandwidth'] / 1e9:.0f} GB/s", *(f"product {text}" for text in products)]


def timing_cells(row: dict[str, Any]) -> list[str]:
    """A timing's columns: what, time, rates, share, ratios."""
    ours = row["ours"]
    mine = row["times"].get(ours) if ours else None
    ratios = ", ".join(f"{name} {r['value']:.2f}x" for name, r in row["ratios"].items())
    absent = "; ".join(f"{name}: {why}" for name, why in row["absent"].items())
    return [
        row["op"], row["case"], row["dtype"], row["direction"], ours or "none",
        "" if mine is None else f"{mine['ms'] * 1e3:.1f} ±{mine['spread']:.0%}",
        "" if mine is None else f"{mine['host_us']:.0f}",
        "" if row["gflops"] is None or not row["flops"] else f"{row['gflops'] / 1e3:.1f}",
        "" if row["gbytes"] is None else f"{row['gbytes']:.0f}",
        "" if row["share"] is None else f"{row['share']:.0%} of {row['limit']}", ratios, absent,
    ]  # fmt: skip


TIMING_HEADS = (
    "op", "case", "dtype", "direction", "fastest of ours", "us", "host us", "TFLOP/s", "GB/s", "share of peak",
    "times as fast as", "not compared",
)  # fmt: skip


def show(check: Check, console: Console) -> None:
    """Print machine, peaks, parity, failures, timings and one line of summary."""
    data = check.as_dict()
    console.print(", ".join(f"{name} {value}" for name, value in facts(data["machine"])), markup=False)
    for line in peak_lines(data["peaks"]):
        console.print(f"measured: {line}", markup=False)
    table = Table("op", "backend", "passed", "failed", "skipped", "worst error / bound", "why skipped", title="parity")
    for row in by_backend(data["parity"]):
        failed = Text(str(row["failed"]), style="bold red" if row["failed"] else "")
        counts = (str(row["passed"]), failed, str(row["skipped"]))
        table.add_row(row["op"], row["backend"], *counts, f"{row['worst']:.2f}", _reasons(row["skips"]))
    console.print(table)
    for row in [*data["parity"], *data["timings"]]:
        if row["status"] == "failed":
            label = f"FAILED {row['op']}: {row['case']} {row['backend']} {row['dtype']} [{row['reason']}] {row['note']}"
            console.print(label, style="red", markup=False, soft_wrap=True)
    rows = [row for load in data["timings"] for row in load["rows"]]
    if rows:
        table = Table(title="timings: device time, medians, cold caches; shares of the measured peak")
        for head in TIMING_HEADS[:-1]:
            table.add_column(head, overflow="fold")
        for row in rows:
            table.add_row(*(Text(cell) for cell in timing_cells(row)[:-1]))
        console.print(table)
    if check.settings.device == "cpu":
        console.print(NO_TIMES)
    console.print(summary(data), markup=False)


# -- files -------------------------------------------------------------------------------------------------------------

STYLE = """
body { font: 14px/1.45 system-ui, sans-serif; margin: 2em auto; max-width: 1200px; padding: 0 1em;
  color: #1c2430; background: #fff }
h1 { font-size: 1.5em } h2 { font-size: 1.15em; margin-top: 2em }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums }
th, td { text-align: left; padding: .3em .6em; border-bottom: 1px solid #d9dee6; vertical-align: top }
th { border-bottom: 2px solid #8a94a6 }
.failed { color: #b3261e; font-weight: 600 } .skipped { color: #7a5b00 } .passed { color: #1a6b37 }
.bar { display: inline-block; height: .7em; background: #3b6fb5; margin-right: .4em }
.note { color: #4a5568 }
@media (prefers-color-scheme: dark) {
  body { background: #14181f; color: #dfe5ee } th, td { border-color: #39424f } .note { color: #a3aebd }
  .failed { color: #ff8a80 } .skipped { color: #e8c468 } .passed { color: #7fd39a } .bar { background: #6fa3ea }
}
"""


def _cell(value: Any, kind: str = "td", cls: str = "") -> str:
    return f"<{kind}{f' class={cls!r}' if cls else ''}>{html.escape(str(value))}</{kind}>"


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """``rows`` are cells, markup included."""
    head = "".join(_cell(name, "th") for name in heads)
    return (
        f"<table><thead><tr>{head}</tr></thead><tbody>"
        + "".join(f"<tr>{''.join(r)}</tr>" for r in rows)
        + "</tbody></table>"
    )


def _share(row: dict[str, Any]) -> str:
    if row["share"] is None:
        return "<td></td>"
    width = max(0.0, min(1.0, row["share"])) * 6
    return f"<td><span class='bar' style='width:{width:.2f}em'></span>{row['share']:.0%} of {html.escape(row['limit'])}</td>"


def page(data: dict[str, Any]) -> str:
    """The HTML of a check's plain data; no script, nothing loaded from elsewhere."""
    gpu = data["machine"].get("gpu", "no GPU")
    parts = [
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>",
        "<meta name='viewport' content='width=device-width, initial-scale=1'>",
        f"<title>vlmops gpu-check: {html.escape(gpu)}</title><style>{STYLE}</style></head><body>",
        f"<h1>vlmops gpu-check: {html.escape(gpu)}</h1>",
        f"<p class='{'failed' if data['failed'] else 'passed'}'>{html.escape(summary(data))}</p>",
    ]
    if data["settings"]["device"] == "cpu":
        parts.append(f"<p class='note'>{html.escape(NO_TIMES)}</p>")
    parts.append("<h2>Machine</h2>" + _table(("", ""), ((_cell(a), _cell(b)) for a, b in facts(data["machine"]))))
    if data["peaks"]:
        lines = "".join(f"<li>{html.escape(line)}</li>" for line in peak_lines(data["peaks"]))
        parts.append(f"<h2>Measured peak</h2><ul>{lines}</ul>")
    rows = [row for load in data["timings"] for row in load["rows"]]
    if rows:
        parts.append(
            "<h2>Timings</h2><p class='note'>Device time of one call with cold caches, medians of interleaved rounds, results "
            "checked before. Share: of the measured peak, by the bytes and FLOPs the op states. Above 1x we are faster.</p>"
        )
        cells = []
        for row in rows:
            texts = timing_cells(row)
            cells.append([*(_cell(t) for t in texts[:9]), _share(row), *(_cell(t) for t in texts[10:])])
        parts.append(_table(TIMING_HEADS, cells))
    counted = by_backend(data["parity"])
    parts.append("<h2>Parity</h2>" + _table(
        ("op", "backend", "passed", "failed", "skipped", "worst error / bound", "why skipped"),
        (
            (_cell(r["op"]), _cell(r["backend"]), _cell(r["passed"]), _cell(r["failed"], cls="failed" if r["failed"] else ""),
             _cell(r["skipped"]), _cell(f"{r['worst']:.2f}"), _cell(_reasons(r["skips"]))) for r in counted
        ),
    ))  # fmt: skip
    every = [*data["parity"], *({**load, "backend": "timing"} for load in data["timings"])]
    heads = ("op", "case", "backend", "dtype", "result", "worst error / bound", "what")
    parts.append("<h2>Every case</h2>" + _table(heads, (
        (_cell(r["op"]), _cell(r["case"]), _cell(r["backend"]), _cell(r["dtype"]), _cell(r["status"], cls=r["status"]),
         _cell("" if r["error_over_bound"] is None else f"{r['error_over_bound']:.2f}"),
         _cell(": ".join(x for x in (r["reason"], r["note"]) if x))) for r in every
    )))  # fmt: skip
    return "\n".join([*parts, "</body></html>\n"])


def write(data: dict[str, Any], folder: Path) -> tuple[Path, Path]:
    """gpu-check.json and gpu-check.html in a folder, which is made.

    Raises:
        OSError: it cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = folder / JSON_NAME, folder / HTML_NAME
    for path, text in zip(paths, (json.dumps(data, indent=1, allow_nan=False) + "\n", page(data)), strict=True):
        path.write_text(text, encoding="utf-8")
    return paths
