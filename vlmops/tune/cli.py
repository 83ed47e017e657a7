"""`vlmops tune`."""

from __future__ import annotations

import json
import time
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

__all__ = ["tune"]

DTYPES = ("float32", "bfloat16", "float16")


def tune(
    model: Annotated[
        str,
        typer.Argument(
            help="Folder or hub id of a vision-language model, or qwen2-vl-2b-vision, qwen2.5-vl-3b-vision, clip-l-336, "
            "pixtral-vision (random weights), tiny (the demo's)."
        ),
    ],
    *,
    image_size: Annotated[
        list[int] | None, typer.Option("--image-size", min=1, help="Pixels on a side of the pictures; repeatable.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:1; a GPU if there is one.")] = "",
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Run the model once, measure nothing: which choices are still to be measured?"),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print plain JSON for scripts.")] = False,
) -> None:
    """Measure ahead of time which kernel is fastest for a model: one picture, several, a prompt, a decoding step.

    Results go to the tuning cache, which every later run on this machine reads. What is there already is not measured again.
    """
    if dtype not in DTYPES:
        raise typer.BadParameter(f"{dtype!r} is none of {', '.join(DTYPES)}", param_hint="--dtype")
    notes = Console(stderr=True, highlight=False)
    begin = time.perf_counter()

    def progress(line: str) -> None:  # lines, not a spinner: its thread would disturb what is being timed
        notes.print(f"{time.perf_counter() - begin:4.0f} s  {line}", style="dim", markup=False, soft_wrap=True)

    progress("importing torch and transformers")
    import torch

    from vlmops.backends import choice, forced_backend
    from vlmops.tune import inputs, warm

    try:
        where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as err:
        raise typer.BadParameter(f"{device!r} is no device", param_hint="--device") from err
    if where.type not in ("cpu", "cuda") or (where.type == "cuda" and not torch.cuda.is_available()):
        raise typer.BadParameter(f"torch sees no {device}", param_hint="--device")
    if not choice.tuning_enabled() or forced_backend() is not None:
        notes.print("vlmops tune: VLMOPS_TUNING=off or VLMOPS_BACKEND leaves nothing to choose; unset it", style="red")
        raise typer.Exit(2)
    progress(f"loading {model}")
    try:
        stock, steps = inputs.prepare(model, sizes=image_size or (), dtype=getattr(torch, dtype), device=where)
    except inputs.TuneError as err:
        notes.print(f"vlmops tune: {err}", style="red", markup=False, soft_wrap=True)
        raise typer.Exit(2) from err
    data: dict[str, Any] = {
        "model": model, "dtype": dtype, "device": str(where), "machine": choice.machine_key(_indexed(where)),
        "cache": str(choice.cache_path()), "steps": [step.name for step in steps],
    }  # fmt: skip
    if dry_run:
        progress(f"asking for the choices of {len(steps)} steps")
        keys = warm.rehearse(stock, steps)
        data["keys"] = [{"key": key, "measured": known} for key, known in keys.items()]
    else:
        data["keys"] = warm.warm(stock, steps, where, lambda name, new: progress(f"{name}: {new} new choices"))
    data["seconds"] = round(time.perf_counter() - begin, 1)
    if as_json:
        typer.echo(json.dumps(data, indent=1))
    else:
        console = Console(highlight=False)
        _show(data, dry_run, console if console.is_terminal else Console(highlight=False, width=200))


def _indexed(device: Any) -> Any:
    import torch

    return (
        torch.device("cuda", torch.cuda.current_device()) if device.type == "cuda" and device.index is None else device
    )


def _show(data: dict[str, Any], dry: bool, console: Console) -> None:
    table = Table(title="to be measured" if dry else "choices")
    table.add_column("key", overflow="fold")
    for name in ("measured already",) if dry else ("choice", "ms, best of each", "new"):
        table.add_column(name)
    for row in data["keys"]:
        if dry:
            table.add_row(Text(row["key"]), "yes" if row["measured"] else "no")
        else:
            times = ", ".join(f"{name} {ms:.3g}" for name, ms in sorted(row["ms"].items(), key=lambda item: item[1]))
            table.add_row(Text(row["key"]), Text(row["choice"]), Text(times), "yes" if row["new"] else "")
    console.print(table)
    new = sum(not row["measured"] for row in data["keys"]) if dry else sum(row["new"] for row in data["keys"])
    what = "to be measured" if dry else "measured now"
    console.print(
        f"{len(data['keys'])} keys, {new} {what}; {data['cache']}, {data['seconds']:.0f} s",
        markup=False,
        soft_wrap=True,
    )
