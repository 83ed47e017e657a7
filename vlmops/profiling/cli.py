"""`vlmops bench`."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

__all__ = ["bench"]


def _chosen(option: str, given: list[str] | None, known: tuple[str, ...], default: tuple[str, ...]) -> tuple[str, ...]:
    for name in given or ():
        if name not in known:
            raise typer.BadParameter(f"{name!r} is none of {', '.join(known)}", param_hint=option)
    return tuple(dict.fromkeys(given)) if given else default


def bench(
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

    Exits with 1 if an output is wrong (and with --strict also if a bar is missed).
    """
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
