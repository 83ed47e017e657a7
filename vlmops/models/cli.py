"""`vlmops models`."""

from __future__ import annotations

import difflib
import json
from dataclasses import asdict
from typing import Any

import torch
import typer
from PIL import Image
from rich.console import Console
from rich.table import Table

from vlmops import images
from vlmops.models.chat import places
from vlmops.models.presets import PRESETS, TYPES, Preset, build

__all__ = ["show"]

EXAMPLE = (768, 1024)  # height and width of the image whose tokens are counted
SHOWN = 16  # numbers of a list; a code book has thousands


def show(name: str | None, as_json: bool) -> None:
    """Print the list of presets, or one in full; arguments as the command has them."""
    console = Console(highlight=False)
    if not console.is_terminal and console.width == 80:
        console = Console(highlight=False, width=200)
    if name is None:
        rows = [_row(key, preset) for key, preset in PRESETS.items()]
        if as_json:
            typer.echo(json.dumps(rows, indent=2))
            return
        _list(rows, console)
        return
    if name not in PRESETS:
        near = difflib.get_close_matches(name, PRESETS, 3, 0.4)
        hint = f"; near it are {', '.join(near)}" if near else ""
        raise typer.BadParameter(f"{name!r} is no model of `vlmops models`{hint}", param_hint="NAME")
    data = _whole(name, PRESETS[name])
    if as_json:
        typer.echo(json.dumps(data, indent=2))
        return
    _show(data, console)


def _row(name: str, preset: Preset) -> dict[str, Any]:
    """What the list says of a model."""
    return {
        "name": name, "type": preset.kind, "tower": preset.tower, "connector": _connector(preset),
        "language_model": preset.decoder, "parameters": preset.published, "exact": preset.exact,
        "images": preset.config.images["mode"], "source": preset.source, "note": preset.note,
    }  # fmt: skip


def _connector(preset: Preset) -> str:
    config = preset.config
    parts = [] if config.connector is None else [config.connector.kind]
    parts += ["cross-attention"] * (config.cross is not None) + ["visual expert"] * (config.family == "cogvlm2")
    return ", ".join(parts) or "none"


def _whole(name: str, preset: Preset) -> dict[str, Any]:
    """All there is to say of one; its parameters are counted, not looked up."""
    with torch.device("meta"):
        vlm = build(name)
    counted = {part: sum(p.numel() for p in module.parameters()) for part, module in vlm.named_children()}
    total = sum(p.numel() for p in vlm.parameters())
    rest = total - sum(counted.values())
    config, (height, width) = preset.config, EXAMPLE
    layout = images.prepare(Image.new("RGB", (width, height)), **config.images).layouts[0]
    tokens = places(config, layout)
    return {
        **_row(name, preset), "meaning": TYPES[preset.kind],
        "counted": {**counted, **({"rest": rest} if rest else {}), "total": total},
        "example": {"height": height, "width": width, "tokens": tokens}, "config": asdict(config),
    }  # fmt: skip


def _list(rows: list[dict[str, Any]], console: Console) -> None:
    table = Table(title="models")
    table.add_column("name", no_wrap=True)
    for title in ("type", "tower", "connector", "language model"):
        table.add_column(title)
    table.add_column("parameters", justify="right", no_wrap=True)
    table.add_column("images")
    table.add_column("published by", overflow="fold")
    for row in rows:
        columns = [row[k] for k in ("name", "type", "tower", "connector", "language_model")]
        table.add_row(*columns, _billions(row), row["images"], row["source"])
    console.print(table)


def _billions(row: dict[str, Any]) -> str:
    """Exact ones to a hundredth of a billion, rounded ones to the digit they are rounded to."""
    return f"{row['parameters'] / 1e9:{'.2f' if row['exact'] else 'g'}} B"


def _show(data: dict[str, Any], console: Console) -> None:
    facts = Table(title=data["name"], show_header=False)
    facts.add_column(style="bold")
    facts.add_column(overflow="fold")
    facts.add_row("type", f"{data['type']}: {data['meaning']}")
    for key in ("tower", "connector", "language_model"):
        facts.add_row(key.replace("_", " "), data[key])
    for part, count in data["counted"].items():
        facts.add_row(f"parameters, {part}", f"{count:,}")
    facts.add_row("published", f"{data['parameters']:,}{'' if data['exact'] else ' (rounded)'}; {data['source']}")
    picture = data["example"]
    facts.add_row(f"a picture of {picture['width']} x {picture['height']}", f"{picture['tokens']} places in the prompt")
    if data["note"]:
        facts.add_row("note", data["note"])
    console.print(facts)
    console.print(json.dumps(_shortened(data["config"]), indent=2), markup=False, soft_wrap=True)


def _shortened(value: Any) -> Any:
    """Long lists by their first numbers."""
    if isinstance(value, dict):
        return {key: _shortened(x) for key, x in value.items()}
    if isinstance(value, (list, tuple)) and len(value) > SHOWN:
        return [*value[:3], f"... {len(value)} in all"]
    return value
