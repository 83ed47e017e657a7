"""`vlmops gpu-check`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

if TYPE_CHECKING:
    from vlmops.profiling.gpu_check.tasks import Result

__all__ = ["gpu_check"]

INTERPRET = "TRITON_INTERPRET=1 vlmops gpu-check --device cpu --quick"


class _Bar:
    """A progress bar that is drawn when a result comes: a thread that refreshes would disturb what is timed."""

    def __init__(self, console: Console) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self.bar = Progress(*columns, console=console, auto_refresh=False, transient=True)
        self.task: TaskID | None = None

    def __enter__(self) -> _Bar:
        self.bar.start()
        return self

    def __exit__(self, *exc: Any) -> None:
        self.bar.stop()

    def phase(self, name: str, tasks: int) -> None:
        self.task = self.bar.add_task(name, total=tasks)
        self.bar.refresh()

    def done(self, result: Result) -> None:
        if self.task is not None:
            self.bar.update(self.task, advance=1, refresh=True)


def _refuse(notes: Console, text: str) -> typer.Exit:
    notes.print(f"vlmops gpu-check: {text}", style="red", markup=False, soft_wrap=True)
    return typer.Exit(2)


def gpu_check(
    *,
    quick: Annotated[
        bool, typer.Option("--quick", help="Under two minutes: fewer shapes and dtypes, default configurations.")
    ] = False,
    out: Annotated[Path, typer.Option("--out", help="Folder for gpu-check.json and gpu-check.html.")] = Path("."),
    as_json: Annotated[bool, typer.Option("--json", help="Print the JSON instead of tables.")] = False,
    op: Annotated[list[str] | None, typer.Option("--op", help="Only this operation; repeatable.")] = None,
    device: Annotated[str, typer.Option("--device", help="cuda, or cpu: Triton's interpreter, parity only.")] = "cuda",
) -> None:
    """Is every kernel right on this GPU, and how fast is it? Parity, measured peak, timings; JSON and HTML, in 10 minutes.

    Exits with 1 if a kernel is wrong, with 2 if nothing can be checked here.
    """
    notes = Console(stderr=True, highlight=False)
    if device not in ("cuda", "cpu"):
        raise typer.BadParameter(f"{device!r} is neither cuda nor cpu", param_hint="--device")
    import torch

    from vlmops.backends import triton_runtime
    from vlmops.profiling.gpu_check import report, run

    for name in op or ():
        if name not in run.known_ops():
            raise typer.BadParameter(f"{name!r} is none of {', '.join(run.known_ops())}", param_hint="--op")
    if device == "cuda" and not torch.cuda.is_available():
        raise _refuse(
            notes,
            f"torch {torch.__version__} sees no CUDA GPU, so nothing can be measured here. What can be checked: "
            f"`{INTERPRET}` runs the parity cases in Triton's interpreter, on small shapes and without times.",
        )
    if device == "cpu":
        missing = triton_runtime.installed()
        if missing is not None:
            raise _refuse(notes, missing)
        if not triton_runtime.interpreted():
            raise _refuse(notes, f"on a CPU the kernels need Triton's interpreter: `{INTERPRET}`")
    elif triton_runtime.interpreted():
        raise _refuse(
            notes, "TRITON_INTERPRET is set: on a GPU the compiled kernels are what is to be checked; unset it"
        )
    settings = run.Settings(device, quick, tuple(dict.fromkeys(op or ())))
    with _Bar(notes) as bar:
        found = run.check(settings, bar)
    data = found.as_dict()
    try:
        paths = report.write(data, out)
    except OSError as err:
        raise _refuse(notes, f"cannot write to {out}: {err}") from err
    if as_json:
        typer.echo(json.dumps(data, indent=1))
    else:
        console = Console(highlight=False)
        report.show(found, console if console.is_terminal else Console(highlight=False, width=200))
    notes.print(f"wrote {paths[0]} and {paths[1]}", style="dim", markup=False, soft_wrap=True)
    if found.failed:
        raise typer.Exit(1)
    if not found.passed:
        raise _refuse(notes, "no kernel was checked: see why each case was skipped")
