"""`vlmops demo`."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

__all__ = ["demo"]

DTYPES = ("float32", "bfloat16", "float16")


def demo(
    *,
    model: Annotated[
        str | None,
        typer.Option("--model", help="Folder or hub id of a vision-language model instead of the embedded one."),
    ] = None,
    image: Annotated[Path | None, typer.Option("--image", help="Picture to ask about.")] = None,
    prompt: Annotated[str | None, typer.Option("--prompt", help="Question to ask.")] = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16, for the model that answers.")] = "float32",
    max_new_tokens: Annotated[int, typer.Option(min=2, help="Longest answer.")] = 24,
    rounds: Annotated[int, typer.Option(min=7, help="Timed rounds.")] = 7,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads; as torch has them if not given.")] = None,
    towers: Annotated[
        bool, typer.Option("--towers/--no-towers", help="Also time vision towers at their true dimensions.")
    ] = True,
    full: Annotated[bool, typer.Option("--full", help="Towers with all their layers (minutes).")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print plain JSON for scripts.")] = False,
) -> None:
    """A VLM answers about a picture, stock and patched; every stage timed; what was patched with which kernel.

    Exits with 1 if a float32 answer changed or a tower's output is wrong.
    """
    if dtype not in DTYPES:
        raise typer.BadParameter(f"{dtype!r} is none of {', '.join(DTYPES)}", param_hint="--dtype")
    begin = time.perf_counter()
    notes = Console(stderr=True, highlight=False)
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=150)

    def progress(line: str) -> None:  # lines, not a spinner: its thread would disturb what is being timed
        notes.print(f"{time.perf_counter() - begin:3.0f} s  {line} ...", style="dim", markup=False, soft_wrap=True)

    progress("importing torch and transformers")
    data = _measure(
        model=model, image=image, prompt=prompt, dtype=dtype, max_new_tokens=max_new_tokens, rounds=rounds,
        threads=threads, console=console, as_json=as_json, progress=progress,
    )  # fmt: skip
    if towers:
        from vlmops.demo import table
        from vlmops.demo import towers as true_size

        data["towers"] = true_size.measure(full=full, rounds=rounds, threads=threads, progress=progress)
        if not as_json:
            table.print_towers(console, data["towers"])
    data["seconds"] = time.perf_counter() - begin
    if as_json:
        typer.echo(json.dumps(data, indent=1))
    else:
        machine = f"{data['machine']}, torch {data['torch']}, native kernels: {data['native']}"
        console.print(f"{machine}, {data['seconds']:.0f} s in all", markup=False)
    changed = data["dtype"] == "float32" and not data["same_answers"]
    if changed or any(row.get("wrong") for row in data.get("towers", ())):
        notes.print("[bold red]the patched model does not give the same result[/]")
        raise typer.Exit(1)
    if not data["same_answers"]:
        notes.print(f"[yellow]{dtype} answers differ: rounding decided between tokens that are nearly equal[/]")


def _measure(
    *,
    model: str | None, image: Path | None, prompt: str | None, dtype: str, max_new_tokens: int, rounds: int,
    threads: int | None, console: Console, as_json: bool, progress: Any,
) -> dict[str, Any]:  # fmt: skip
    """Load, ask, time; print unless JSON is wanted."""
    import torch

    from vlmops.backends import native
    from vlmops.backends.machine import cpu_model
    from vlmops.demo import loading, run, table

    progress("loading the native kernels (built once per machine)")
    native.load()
    progress(f"loading {model or 'the embedded model'}")
    kind = getattr(torch, dtype)
    try:
        subject = loading.embedded(image, prompt, kind) if model is None else loading.load(model, image, prompt, kind)
        if not as_json and console.is_terminal:
            console.print(table.thumbnail(subject.image))
        data = run.ask(subject, rounds=rounds, max_new_tokens=max_new_tokens, threads=threads, progress=progress)
    except loading.DemoError as err:
        Console(stderr=True, highlight=False).print(f"vlmops demo: {err}", style="red", markup=False, soft_wrap=True)
        raise typer.Exit(2) from err
    data.update(
        machine=cpu_model(),
        torch=torch.__version__,
        native=native.isa() or native.reason(),
        threads=threads or torch.get_num_threads(),
    )
    if not as_json:
        table.print_answers(console, data)
        table.print_stages(console, data)
        table.print_patch(console, data)
    return data
