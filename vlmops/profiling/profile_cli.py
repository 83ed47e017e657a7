"""`vlmops profile`."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

if TYPE_CHECKING:
    from vlmops.profiling.nsight.peaks import Measured
    from vlmops.profiling.nsight.report import Report

__all__ = ["profile"]


def profile(
    *,
    words: Annotated[
        list[str] | None,
        typer.Argument(
            help='A model: folder, hub id, or "tiny", the embedded one. With --nsys or --ncu: the program to record, after --.',
            metavar="MODEL|PROGRAM",
        ),
    ] = None,
    image: Annotated[
        Path | None, typer.Option("--image", help="Picture for the model; none: the embedded one.")
    ] = None,
    prompt: Annotated[str | None, typer.Option("--prompt", help="Question to the model.")] = None,
    generate: Annotated[int, typer.Option("--generate", min=0, help="New tokens; 0: one forward.")] = 0,
    steps: Annotated[int, typer.Option("--steps", min=1, help="Profiled steps of the model.")] = 3,
    dtype: Annotated[str, typer.Option("--dtype", help="float32, bfloat16 or float16, of the model.")] = "float32",
    html: Annotated[bool, typer.Option("--html/--no-html", help="The page needs plotly.")] = True,
    files: Annotated[
        list[Path] | None,
        typer.Option(
            "--from",
            help="A recording made elsewhere: FILE.sqlite (nsys export), FILE.csv (ncu --csv --page raw), or one of each.",
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="Folder for reports, traces and recordings; profile, if not given.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the JSON instead of tables.")] = False,
    nsys: Annotated[bool, typer.Option("--nsys", help="Record the program with Nsight Systems, then report.")] = False,
    ncu: Annotated[bool, typer.Option("--ncu", help="Record the program with Nsight Compute, then report.")] = False,
    peaks: Annotated[
        str | None,
        typer.Option(
            "--peaks",
            help="The GPU's measured peaks, GB/s and TFLOP/s (2900,620), or gpu-check.json; ncu's own, if not given.",
            metavar="GB/S,TFLOP/S|FILE",
        ),
    ] = None,
    flops: Annotated[
        list[str] | None,
        typer.Option(
            "--flops",
            help="FLOPs of one launch of a kernel, for the TFLOP/s of --peaks; repeatable.",
            metavar="KERNEL=N",
        ),
    ] = None,
) -> None:
    """Where a model's time goes, stock against patched; or where a GPU's goes, from Nsight Systems and Nsight Compute.

    With a MODEL, both run under torch.profiler: by stage, module and op, with roofline, memory and opportunities. Exits with 1
    if the patched output is wrong, with 2 if something cannot be read or is not there.
    """
    program = list(words or ())
    if len(program) == 1 and not (nsys or ncu or files):
        if peaks is not None or flops:
            raise typer.BadParameter("a model's roof is measured in the same run", param_hint="--peaks, --flops")
        _model(program[0], image, prompt, generate, steps, dtype, html, out or Path("profile"), as_json)
        return
    from vlmops.profiling.nsight import ProfileFileError, ToolFailedError, ToolMissingError, show

    if nsys or ncu:
        if files:
            raise typer.BadParameter("it goes without --nsys and --ncu: either record or read", param_hint="--from")
        if not program:
            raise typer.BadParameter("name the program to record, after --", param_hint="PROGRAM")
    elif not files:
        raise typer.BadParameter("name a model, a recording, or record with --nsys or --ncu", param_hint="MODEL")
    elif program:
        raise typer.BadParameter(f"{program[0]!r} is not recorded without --nsys or --ncu", param_hint="PROGRAM")
    if flops and peaks is None:
        raise typer.BadParameter("of which peak? it goes with --peaks", param_hint="--flops")
    notes = Console(stderr=True, highlight=False)
    try:
        measured, work = _peaks(peaks, flops or [])
        folder = out or Path("profile")
        report = _report(list(files) if files else _record(program or [], folder, nsys, ncu), measured, work)
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


def _model(
    where: str, image: Path | None, prompt: str | None, tokens: int, steps: int, dtype: str, html: bool, out: Path, as_json: bool
) -> None:  # fmt: skip
    """Profile a model and write the report."""
    import shlex
    import sys

    import torch

    from vlmops.demo import loading
    from vlmops.demo.cli import DTYPES
    from vlmops.profiling import report
    from vlmops.profiling.timing import WrongOutputError

    if dtype not in DTYPES:
        raise typer.BadParameter(f"{dtype!r} is none of {', '.join(DTYPES)}", param_hint="--dtype")
    notes = Console(stderr=True, highlight=False)
    try:
        if html:
            report.need_plotly()
        precision = getattr(torch, dtype)
        notes.print(f"loading {where} ...", style="dim", markup=False)
        tiny = where == "tiny"
        subject = loading.embedded(image, prompt, precision) if tiny else loading.load(where, image, prompt, precision)
        notes.print("profiling, stock and patched ...", style="dim")
        command = shlex.join(["vlmops", *sys.argv[1:]])
        found = report.profile_model(subject.model, subject.inputs, steps=steps, generate=tokens, command=command)
        paths = report.write(found, out, html=html)
    except (loading.DemoError, report.PlotlyMissingError, OSError, ValueError) as err:
        notes.print(f"vlmops profile: {err}", style="red", markup=False, soft_wrap=True)
        raise typer.Exit(2) from err
    except WrongOutputError as err:
        notes.print(f"vlmops profile: {err}", style="red", markup=False, soft_wrap=True)
        raise typer.Exit(1) from err
    if as_json:
        typer.echo(report.as_json(found))
    else:
        typer.echo(report.as_markdown(found))
    notes.print(f"wrote {', '.join(map(str, paths.values()))}", style="dim", markup=False, soft_wrap=True)


def _record(program: list[str], folder: Path, nsys: bool, ncu: bool) -> list[Path]:
    """Record with one tool or both, one after the other."""
    from vlmops.profiling.nsight import commands

    wanted = [build for build, on in ((commands.nsys_command, nsys), (commands.ncu_command, ncu)) if on]
    return [commands.record(*build(program, folder)) for build in wanted]


def _peaks(text: str | None, flops: list[str]) -> tuple[Measured | None, dict[str, float]]:
    """What --peaks and --flops say."""
    from vlmops.profiling.nsight import ProfileFileError, peaks

    option = "--peaks"
    try:
        measured = None if text is None else peaks.given(text)
        option = "--flops"
        return measured, peaks.flops(flops)
    except ProfileFileError:
        raise
    except ValueError as err:
        raise typer.BadParameter(str(err), param_hint=option) from err


def _report(files: list[Path], measured: Measured | None, flops: dict[str, float]) -> Report:
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
    peaks = None if measured is None else measured.peaks
    gpus: tuple[str, ...] = ()
    if traces:
        trace = nsys.read(traces[0])
        gpus = tuple(trace.gpus)
        found = report.of_trace(trace, counters, budgets=limits, peaks=peaks, flops=flops)
    else:
        found = report.of_counters(counters, tables[0].name, budgets=limits, peaks=peaks, flops=flops)
    return found if measured is None else replace(found, notes=(*found.notes, *measured.notes(gpus)))
