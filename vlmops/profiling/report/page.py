"""The report as one HTML file that needs nothing else: no network, no second file."""

from __future__ import annotations

import html
import importlib
from collections.abc import Sequence

from vlmops.profiling.report import plots, tables
from vlmops.profiling.report.data import Profile

__all__ = ["render"]

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 76rem; padding: 0 1rem; color: #1f2328 }
h1 { font-size: 1.6rem } h2 { font-size: 1.2rem; margin-top: 2.5rem }
.wide { overflow-x: auto } table { border-collapse: collapse; font-size: 13px }
th, td { padding: .25rem .6rem; border-bottom: 1px solid #d1d9e0; text-align: left; vertical-align: top }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap }
footer { margin-top: 3rem; color: #59636e; font-size: 13px }
"""


def _table(table: tables.Table) -> str:
    if not table.rows:
        return ""

    def line(cells: Sequence[str], tag: str) -> str:
        made = (
            f"<{tag}{'' if i < table.numbers else ' class=n'}>{html.escape(cell)}</{tag}>"
            for i, cell in enumerate(cells)
        )
        return f"<tr>{''.join(made)}</tr>"

    rows = "\n".join(line(row, "td") for row in table.rows)
    note = f"<p>{html.escape(table.note)}</p>" if table.note else ""
    return (
        f"<section><h2>{html.escape(table.title)}</h2>{note}\n<div class=wide><table><thead>{line(table.head, 'th')}</thead>"
        f"<tbody>\n{rows}\n</tbody></table></div></section>"
    )


def _list(lines: Sequence[str]) -> str:
    return "<ul>" + "".join(f"<li>{html.escape(line)}</li>" for line in lines) + "</ul>"


def render(profile: Profile, traces: Sequence[str] = ()) -> str:
    """The page.

    Args:
        profile: what to show.
        traces: names of the trace files beside it.

    Raises:
        PlotlyMissingError: plotly is not installed.
    """
    plots.need_plotly()
    drawn = []
    to_html = importlib.import_module("plotly.io").to_html
    for name, (title, figure) in plots.figures(profile).items():
        config = dict(displaylogo=False, responsive=True, typesetMath=False)
        made = to_html(figure, include_plotlyjs=False, full_html=False, div_id=f"plot-{name}", config=config)
        drawn.append(f"<section><h2>{html.escape(title)}</h2>{made}</section>")
    library = importlib.import_module("plotly.offline").get_plotlyjs()
    title = html.escape(f"Profile of {profile.model}")
    parts = [
        f"<h1>{title}</h1>", _list(tables.summary(profile)), _table(tables.opportunities(profile)), *drawn[:1],
        _table(tables.stages(profile)), _table(tables.accounting(profile)), drawn[1], _table(tables.modules(profile)), drawn[2],
        _table(tables.ops(profile)), drawn[3], _table(tables.roofline(profile)), drawn[4],
        _list([tables.memory(run) for run in profile.runs.values()]), _table(tables.unpatched(profile)),
        _footer(profile, traces),
    ]  # fmt: skip
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f'<meta name="viewport" content="width=device-width"><link rel="icon" href="data:,"><style>{STYLE}</style>'
        f"<script>{library}</script></head>\n<body>\n" + "\n".join(parts) + "\n</body></html>\n"
    )


def _footer(profile: Profile, traces: Sequence[str]) -> str:
    lines = [f"{name}: {value}" for name, value in profile.facts.items()]
    if traces:
        lines.append(f"timelines, for https://ui.perfetto.dev or chrome://tracing: {', '.join(traces)}")
    return f"<footer>{_list(lines)}</footer>"
