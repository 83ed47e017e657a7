"""The report's plots. plotly is imported when one is made: it comes with ``pip install "vlmops[profile]"``."""

from __future__ import annotations

import html
import importlib
from collections.abc import Sequence
from typing import Any

from vlmops.profiling.report import tables
from vlmops.profiling.report.data import KINDS, Profile, Row

__all__ = ["PlotlyMissingError", "figures", "need_plotly"]

SHOWN = 20
KIND_COLOURS = {"op": "#1f6feb", "stock": "#9aa4b2", "python": "#e3a008", "unnamed": "#d1242f"}
RUN_COLOURS = ("#9aa4b2", "#1f6feb")


class PlotlyMissingError(ImportError):
    """The HTML report was asked for and plotly is not installed."""


def need_plotly() -> Any:
    """``plotly.graph_objects``.

    Raises:
        PlotlyMissingError: it is not installed.
    """
    try:
        return importlib.import_module("plotly.graph_objects")
    except ImportError as err:
        raise PlotlyMissingError('the HTML report draws with plotly: pip install "vlmops[profile]"') from err


def safe(text: str) -> str:
    """plotly reads some HTML in its labels: escaped, it shows the text as it is."""
    return html.escape(text, quote=False)


def figures(profile: Profile) -> dict[str, tuple[str, Any]]:
    """Name -> (title, figure), in the order of the page."""
    made = {
        "stages": ("Time by stage", _stages(profile)),
        "modules": ("Time by module, with what is inside", _bars(profile, tables.module_rows(profile))),
        "ops": ("Time by op", _bars(profile, tables.op_rows(profile))),
        "roofline": ("Roofline", _roofline(profile)),
        "memory": ("Memory through the last step", _memory(profile)),
    }
    for _, figure in made.values():
        figure.update_layout(
            template="plotly_white", margin=dict(l=20, r=20, t=20, b=40), legend=dict(orientation="h", y=1.02, yanchor="bottom")
        )  # fmt: skip
    return made


def _height(bars: int) -> int:
    return 140 + 24 * bars


def _stages(profile: Profile) -> Any:
    """Each stage's own time, stock above patched, by whom it belongs to."""
    go = need_plotly()
    names = dict.fromkeys(row.name for run in profile.runs.values() for row in run.stages)
    keys = [(stage, run) for stage in names for run in profile.runs.values()]
    labels = [safe(f"{stage}, {run.name}") for stage, run in keys]
    figure = go.Figure()
    for kind, title in KINDS.items():
        values = [
            sum(p.seconds for p in run.pieces if p.kind == kind and p.stage == stage) * 1e3 for stage, run in keys
        ]
        figure.add_bar(y=labels, x=values, orientation="h", name=title, marker_color=KIND_COLOURS[kind])
    figure.update_layout(barmode="stack", height=_height(len(labels)), xaxis_title="ms a step")
    figure.update_yaxes(autorange="reversed", automargin=True)
    return figure


def _bars(profile: Profile, rows: dict[str, list[Row]]) -> Any:
    """The longest rows, stock beside patched."""
    go = need_plotly()
    found = tables.side_by_side(profile, rows)[:SHOWN]
    labels = [safe(name) for name, _ in found]
    figure = go.Figure()
    for i, name in enumerate(profile.runs):
        values = [None if (row := pair[i]) is None else row.seconds * 1e3 for _, pair in found]
        figure.add_bar(y=labels, x=values, orientation="h", name=name, marker_color=RUN_COLOURS[i % 2])
    figure.update_layout(barmode="group", height=_height(2 * len(labels)), xaxis_title="ms a step")
    figure.update_yaxes(autorange="reversed", automargin=True, type="category")
    return figure


def _hover(profile: Profile, dots: Sequence[Any]) -> list[str]:
    return [
        safe(f"{d.name} | {d.detail}: {d.seconds * 1e3:.3g} ms, {d.share(profile.peaks):.0%} of the roof") for d in dots
    ]


def _roofline(profile: Profile) -> Any:
    """FLOP/s over FLOPs a byte, log-log; ops without products have no place there: their bytes/s stand beside."""
    need_plotly()
    subplots = importlib.import_module("plotly.subplots")
    figure = subplots.make_subplots(
        rows=1, cols=2, column_widths=[0.7, 0.3], subplot_titles=("matrix products", "no matrix product: bandwidth")
    )
    peaks = profile.peaks
    ridge = peaks.flops / peaks.bandwidth
    seen = [d.intensity for run in profile.runs.values() for d in run.dots if d.flops]
    low, high = min([ridge, *seen]) / 4, max([ridge, *seen]) * 4
    roof = dict(x=[low, ridge, high], y=[low * peaks.bandwidth / 1e9, peaks.flops / 1e9, peaks.flops / 1e9])
    figure.add_scatter(**roof, mode="lines", name="measured roof", line_color="#24292f", row=1, col=1)
    figure.add_hline(y=peaks.bandwidth / 1e9, line_color="#24292f", row=1, col=2)
    for i, run in enumerate(profile.runs.values()):
        products = [d for d in run.dots if d.flops]
        rest = [d for d in run.dots if not d.flops]
        style = dict(mode="markers", name=run.name, marker=dict(color=RUN_COLOURS[i % 2], size=11, line=dict(width=1)))
        figure.add_scatter(
            x=[d.intensity for d in products], y=[d.flops / d.seconds / 1e9 for d in products], 
            hovertext=_hover(profile, products),
            hoverinfo="text", legendgroup=run.name, **style, row=1, col=1,
        )  # fmt: skip
        if rest:
            figure.add_scatter(
                x=[safe(d.name) for d in rest], y=[d.bytes / d.seconds / 1e9 for d in rest], hovertext=_hover(profile, rest),
                hoverinfo="text", legendgroup=run.name, showlegend=False, **style, row=1, col=2,
            )  # fmt: skip
    figure.update_xaxes(type="log", title="FLOPs a byte", row=1, col=1)
    figure.update_yaxes(type="log", title="GFLOP/s", row=1, col=1)
    figure.update_yaxes(title="GB/s", rangemode="tozero", row=1, col=2)
    figure.update_layout(height=520)
    return figure


def _memory(profile: Profile) -> Any:
    """Allocated bytes above the step's begin."""
    go = need_plotly()
    figure = go.Figure()
    for i, run in enumerate(profile.runs.values()):
        x, y = [t * 1e3 for t, _ in run.memory.points], [b / 2**20 for _, b in run.memory.points]
        figure.add_scatter(x=x, y=y, mode="lines", line=dict(shape="hv", color=RUN_COLOURS[i % 2]), name=run.name)
    figure.update_layout(height=360, xaxis_title="ms since the step began", yaxis_title="MiB above its begin")
    return figure
