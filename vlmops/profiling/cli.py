"""`vlmops bench`."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

__all__ = ["app"]

app = typer.Typer(invoke_without_command=True, add_completion=False)


def _chosen(option: str, given: list[str] | None, known: tuple[str, ...], default: tuple[str, ...]) -> tuple[str, ...]:
    for name in given or ():
        if name not in known:
            raise typer.BadParameter(f"{name!r} is none of {', '.join(known)}", param_hint=option)
    return tuple(dict.fromkeys(given)) if given else default


@app.callback()
def bench(
    context: typer.Context,
    *,
    op: Annotated[
        list[str] | None,
        typer.Option(
            "--op", help="Only this operation (varlen_attention, patchify, mlp, overhead, preprocess); repeatable."
        ),
    ] = None,
    model: Annotated[
        list[str] | None,
        typer.Option("--model", help="Only this tower (qwen2_vl, qwen2_5_vl, clip_l_336, pixtral); repeatable."),
    ] = None,
    stack: Annotated[
        list[str] | None,
        typer.Option("--stack", help="Only this model of the reference stack (qwen2_vl, llava); repeatable."),
    ] = None,
    dtype: Annotated[
        list[str] | None, typer.Option("--dtype", help="bf16 or fp32; repeatable. Both if not given.")
    ] = None,
    threads: Annotated[int, typer.Option(min=1, help="Threads for everybody.")] = 2,
    rounds: Annotated[int, typer.Option(min=7, help="Timed rounds of each comparison.")] = 7,
    quick: Annotated[
        bool, typer.Option("--quick", help="Tiny towers and no long attention: does everything run?")
    ] = False,
    full: Annotated[bool, typer.Option("--full", help="Whole towers instead of 4 layers (long).")] = False,
    peers: Annotated[
        list[str] | None, typer.Option("--peers", help='Extra peers: "compile" (torch.compile with frozen weights).')
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help='Also write everything to this file ("-": print it alone).')
    ] = None,
    strict: Annotated[bool, typer.Option("--strict", help="Exit with 1 if a bar is missed.")] = False,
) -> None:
    """Every performance bar with its figure, against stock and plain PyTorch, interleaved in one process.

    Exits with 1 if an output is wrong (and with --strict also if a bar is missed). `compare` compares two recorded runs.
    """
    if context.invoked_subcommand is not None:
        _only_its_own(context)
        return
    from vlmops.profiling import bars
    from vlmops.profiling import bench as runner
    from vlmops.profiling.settings import Settings

    alone = json_file is not None and str(json_file) == "-"
    everything = not op and not model and not stack
    settings = Settings(
        ops=_chosen("--op", op, bars.OPS, bars.OPS if everything else ()),
        models=_chosen("--model", model, bars.MODELS, bars.MODELS if everything else ()),
        stacks=_chosen("--stack", stack, bars.STACKS, bars.STACKS if everything else ()),
        dtypes=_chosen("--dtype", dtype, tuple(bars.DTYPES), tuple(bars.DTYPES)),
        peers=_chosen("--peers", peers, ("compile",), ()),
        threads=threads, rounds=rounds, quick=quick, full=full,
    )  # fmt: skip
    notes = Console(stderr=True, highlight=False)
    begin = time.perf_counter()

    def progress(line: str) -> None:  # lines, not a spinner: its thread would disturb what is being timed
        notes.print(f"{time.perf_counter() - begin:4.0f} s  {line} ...", style="dim", markup=False)

    progress("measuring the machine's peak")
    peaks = runner.measure_peaks(settings)
    rows = list(runner.run(settings, progress))
    data = runner.as_dict(rows, peaks, settings)
    if json_file is not None and not alone:
        try:
            json_file.write_text(json.dumps(data, indent=1) + "\n")
        except OSError as err:
            raise typer.BadParameter(f"cannot write {json_file}: {err}", param_hint="--json") from err
    if alone:
        typer.echo(json.dumps(data, indent=1))
    else:
        console = Console(highlight=False)
        runner.show(rows, peaks, settings, console if console.is_terminal else Console(highlight=False, width=200))
    if data["wrong"] or (strict and data["missed"]):
        raise typer.Exit(1)


def _only_its_own(context: typer.Context) -> None:
    """Refuse options in front of a subcommand, which would do nothing there."""
    given = [name for name in context.params if str(context.get_parameter_source(name)).endswith("COMMANDLINE")]
    if given:
        options = {p.name: p.opts[0] for p in context.command.params}
        names = ", ".join(options[name] for name in given)
        raise typer.BadParameter(f"put it behind {context.invoked_subcommand!r}, or leave it out", param_hint=names)


@app.command()
def compare(
    a: Annotated[Path, typer.Argument(metavar="A", help="The older run.")],
    b: Annotated[Path, typer.Argument(metavar="B", help="The newer run.")],
    *,
    tolerance: Annotated[
        float, typer.Option("--tolerance", min=0, max=0.99, help="A change within this share does not matter.")
    ] = 0.05,
    repeat: Annotated[
        bool, typer.Option("--repeatability", help="Both runs are of one commit: how far do they agree?")
    ] = False,
    json_file: Annotated[
        Path | None, typer.Option("--json", help='Also write everything to this file ("-": print it alone).')
    ] = None,
    strict: Annotated[
        bool, typer.Option("--strict", help="Exit with 1 if a row is slower, or --repeatability misses its bar.")
    ] = False,
) -> None:
    """Two recorded runs against each other: regressions told from noise.

    A run is the JSON of `vlmops bench --json`, the report.json of `pytest --benchmark --report`, or that of pytest-benchmark's
    --benchmark-json. Exits with 2 if a file is none, or if the runs have no row in common.
    """
    from vlmops.profiling import compare_runs, run_files

    notes = Console(stderr=True, highlight=False)
    try:
        found = compare_runs.compare(run_files.read(a), run_files.read(b), tolerance)
    except run_files.RunFileError as err:
        notes.print(f"vlmops bench compare: {err}", style="red", markup=False, soft_wrap=True)
        raise typer.Exit(2) from err
    data = compare_runs.as_dict(found, repeat)
    text = json.dumps(data, indent=1, allow_nan=False)
    if json_file is not None and str(json_file) != "-":
        try:
            json_file.write_text(text + "\n")
        except OSError as err:
            raise typer.BadParameter(f"cannot write {json_file}: {err}", param_hint="--json") from err
    if json_file is not None and str(json_file) == "-":
        typer.echo(text)
    else:
        console = Console(highlight=False)
        compare_runs.show(found, console if console.is_terminal else Console(highlight=False, width=200), repeat)
    if not found.rows:
        notes.print("vlmops bench compare: the runs have no row in common", style="red")
        raise typer.Exit(2)
    missed = repeat and data["repeatability"]["met"] is False
    if strict and (found.regressed or missed):
        raise typer.Exit(1)
