"""`vlmops profile`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

if TYPE_CHECKING:
    from vlmops.profiling.nsight.report import Report

__all__ = ["profile"]


def profile(
    *,
    program: Annotated[
        list[str] | None,
        typer.Argument(help="With --nsys or --ncu: the program to record, after --.", metavar="PROGRAM"),
    ] = None,
    files: Annotated[
        list[Path] | None,
        typer.Option(
            "--from",
            help="A recording made elsewhere: FILE.sqlite (nsys export), FILE.csv (ncu --csv --page raw), or one of each.",
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", help="Folder for nsight.json, nsight.md and recordings.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the JSON instead of tables.")] = False,
    nsys: Annotated[bool, typer.Option("--nsys", help="Record the program with Nsight Systems, then report.")] = False,
    ncu: Annotated[bool, typer.Option("--ncu", help="Record the program with Nsight Compute, then report.")] = False,
) -> None:
    """Where GPU time goes, by kernel, op, module and stage: from Nsight Systems and Nsight Compute.

    Exits with 2 if a file cannot be read or a profiler is not there.
    """
    from vlmops.profiling.nsight import ProfileFileError, ToolFailedError, ToolMissingError, show

    if nsys or ncu:
        if files:
            raise typer.BadParameter("it goes without --nsys and --ncu: either record or read", param_hint="--from")
        if not program:
            raise typer.BadParameter("name the program to record, after --", param_hint="PROGRAM")
    elif not files:
        raise typer.BadParameter("name a recording, or record with --nsys or --ncu", param_hint="--from")
    elif program:
        raise typer.BadParameter(f"{program[0]!r} is not recorded without --nsys or --ncu", param_hint="PROGRAM")
    notes = Console(stderr=True, highlight=False)
    try:
        folder = out or Path("profile")
        report = _report(list(files) if files else _record(program or [], folder, nsys, ncu))
        paths = show.write(report, folder) if out is not None or not files else ()
    except (ProfileFileError, ToolFailedError, ToolMissingError, OSError) as err:
        notes.print(f"vlmops profile: {err}", style="red", markup=False, soft_wrap=True)
        raise typer.Exit(2) from err
    if as_json:
        typer.echo(json.dumps(report.as_dict(), indent=1))
    else:
        console = Console(highlight=False)
        show.show(report, console if console.is_terminal else Console(highlight=False, width=240))
    if paths:
        notes.print(f"wrote {paths[0]} and {paths[1]}", style="dim", markup=False, soft_wrap=True)


def _record(program: list[str], folder: Path, nsys: bool, ncu: bool) -> list[Path]:
    """Record with one tool or both, one after the other."""
    from vlmops.profiling.nsight import commands

    wanted = [build for build, on in ((commands.nsys_command, nsys), (commands.ncu_command, ncu)) if on]
    return [commands.record(*build(program, folder)) for build in wanted]


def _report(files: list[Path]) -> Report:
    """The report of one recording, or of one of each tool."""
    from vlmops.profiling.nsight import ProfileFileError, budgets, ncu, nsys, report

    traces: list[Path] = []
    tables: list[Path] = []
    for path in files:
        kind = path.suffix.lower()
        if kind == ".nsys-rep":
            raise ProfileFileError(path, f"a report, not an export: {nsys.HINT}")
        if kind == ".ncu-rep":
            raise ProfileFileError(path, f"a report, not a table: {ncu.HINT}")
        with path.open("rb") as file:
            is_database = file.read(16).startswith(b"SQLite format 3")
        (traces if is_database or kind in (".sqlite", ".db") else tables).append(path)
    if len(traces) > 1 or len(tables) > 1:
        raise ProfileFileError(files[-1], "expected one recording of each tool at most")
    limits = budgets.load()
    counters = ncu.read(tables[0]) if tables else ()
    if traces:
        return report.of_trace(nsys.read(traces[0]), counters, budgets=limits)
    return report.of_counters(counters, tables[0].name, budgets=limits)
