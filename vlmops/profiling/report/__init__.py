"""Where the time of a model goes, stock against patched: ``profile_model``, then ``write``.

profile = report.profile_model(model, inputs)
report.write(profile, Path("profile"))  # report.html, report.md, report.json, trace-stock.json.gz, ...
"""

from __future__ import annotations

import json
from pathlib import Path

from vlmops.profiling.report import markdown, page
from vlmops.profiling.report.data import Profile, Run
from vlmops.profiling.report.opportunities import Opportunity, find
from vlmops.profiling.report.plots import PlotlyMissingError, need_plotly
from vlmops.profiling.report.record import profile_model

__all__ = [
    "Opportunity", "PlotlyMissingError", "Profile", "Run", "as_html", "as_json", "as_markdown", "find", "need_plotly",
    "profile_model", "write",
]  # fmt: skip

as_html, as_markdown = page.render, markdown.render


def as_json(profile: Profile) -> str:
    """Everything but the traces, with the opportunities; seconds and bytes."""
    data = profile.as_dict()
    data["opportunities"] = [vars(found) for found in find(profile)]
    return json.dumps(data, indent=1) + "\n"


def write(profile: Profile, folder: Path, *, html: bool = True) -> dict[str, Path]:
    """Write the report's files.

    Args:
        profile: of ``profile_model``.
        folder: made where it is missing; files of the same names are replaced.
        html: whether to write the page, which needs plotly.

    Returns:
        "html", "markdown", "json", "trace-stock", "trace-patched" -> file.

    Raises:
        PlotlyMissingError: ``html`` and plotly is not installed; nothing was written.
        OSError: the folder cannot be written.
    """
    if html:
        need_plotly()
    folder.mkdir(parents=True, exist_ok=True)
    written = {}
    for name, run in profile.runs.items():
        written[f"trace-{name}"] = folder / f"trace-{name}.json.gz"
        written[f"trace-{name}"].write_bytes(run.trace)
    traces = [path.name for path in written.values()]
    made = {"json": ("report.json", as_json(profile)), "markdown": ("report.md", as_markdown(profile))}
    if html:
        made["html"] = ("report.html", as_html(profile, traces))
    for name, (file, text) in made.items():
        written[name] = folder / file
        written[name].write_text(text, encoding="utf-8")
    return written
