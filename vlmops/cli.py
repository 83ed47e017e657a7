"""The `vlmops` command. Slow imports wait until a command needs them."""

from __future__ import annotations

import json
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from vlmops.version import __version__

app = typer.Typer(
    no_args_is_help=True, add_completion=False, help="vlmops: vision-language models, faster, with the same answers."
)


def _version(value: bool) -> None:
    if value:
        typer.echo(f"vlmops {__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    """vlmops: vision-language models, faster, with the same answers."""


@app.command()
def info(
    as_json: Annotated[bool, typer.Option("--json", help="Print plain JSON for scripts.")] = False,
    build: Annotated[
        bool, typer.Option("--build", help="Build the native CPU kernels now if they are not there.")
    ] = False,
) -> None:
    """Machine, instruction sets, compilers, backends and what the missing ones need, cache folders."""
    from vlmops.backends.probe import report

    data = report(build_now=build)
    if as_json:
        typer.echo(json.dumps(data, indent=2))
        return
    console = Console()
    facts = Table(title="machine", show_header=False)
    facts.add_column(style="bold")
    facts.add_column(overflow="fold")
    for name in ("vlmops", "python", "torch", "transformers", "triton", "platform", "cpu", "cores", "threads"):
        facts.add_row(name, str(data[name] if data[name] is not None else "not installed"))
    facts.add_row("instruction sets", ", ".join(data["instruction_sets"]) or "baseline")
    facts.add_row("caches", ", ".join(f"{name} {size}" for name, size in data["cpu_caches"].items()) or "unknown")
    facts.add_row("memory", f"{data['memory_gib']} GiB")
    facts.add_row("gpus", ", ".join(data["gpus"]) or "none")
    for name, path in data["compilers"].items():
        facts.add_row("compiler used" if name == "used" else name, path or "not found")
    sizes = ", ".join(f"{name} {size / 2**20:.1f} MiB" for name, size in sorted(data["cache"]["bytes"].items()))
    facts.add_row("cache folder", f"{data['cache']['folder']} ({sizes or 'empty'})")
    console.print(facts)
    table = Table("backend", "available", "what it is, or what is missing", title="backends")
    for row in data["backends"]:
        table.add_row(row["name"], "yes" if row["available"] else "no", row["detail"])
    console.print(table)


@app.command()
def models(
    name: Annotated[str | None, typer.Argument(help="One model, in full.")] = None,
    *,
    as_json: Annotated[bool, typer.Option("--json", help="Print plain JSON for scripts.")] = False,
) -> None:
    """The models that `vlmops.models.build` makes: types, parts, parameters, images.

    With a name: its config, its parameters part by part, and the places a picture of 1024 x 768 takes in its prompt.
    """
    from vlmops.models.cli import show

    show(name, as_json)


def _add_lazy_commands() -> None:
    from vlmops.demo.cli import demo
    from vlmops.profiling.cli import app as bench
    from vlmops.profiling.gpu_check.cli import gpu_check
    from vlmops.profiling.profile_cli import profile
    from vlmops.tune.cli import tune

    app.command()(demo)
    app.add_typer(bench, name="bench")
    app.command("gpu-check")(gpu_check)
    app.command()(profile)
    app.command()(tune)


_add_lazy_commands()
