"""How the demo looks on a terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["print_answers", "print_patch", "print_stages", "print_towers", "thumbnail"]


def thumbnail(image: Image.Image, columns: int = 32) -> Text:
    """The picture in half blocks: two pixels a character."""
    rows = max(2, round(columns * image.height / image.width / 2) * 2)
    small = image.resize((columns, rows))
    pixels = small.load()
    text = Text()
    for y in range(0, rows, 2):
        for x in range(columns):
            top, bottom = pixels[x, y], pixels[x, y + 1]
            text.append("▀", style=f"rgb({top[0]},{top[1]},{top[2]}) on rgb({bottom[0]},{bottom[1]},{bottom[2]})")
        text.append("\n")
    return text


def _times(value: float) -> str:
    style = "green" if value >= 1.02 else "yellow" if value < 0.98 else "default"
    return f"[{style}]{value:.2f}x[/]"


def print_answers(console: Console, data: dict[str, Any]) -> None:
    """The picture's description, and each question with both answers."""
    picture = data["picture"]
    console.print(f"[bold]model[/]    {data['model']}, {data['dtype']}")
    console.print(f"[bold]picture[/]  {picture['source']}, {picture['size'][0]} x {picture['size'][1]}")
    if picture["shows"]:
        console.print(f"[bold]it shows[/] {picture['shows']}")
    table = Table("question", "stock answer", "patched answer", "same tokens", "right")
    for row in data["questions"]:
        same = "[green]yes[/]" if row["same"] else "[bold red]NO[/]"
        right = "" if not row["expected"] else "yes" if row["patched"] == row["expected"] else f"no: {row['expected']}"
        table.add_row(*(Text(row[k]) for k in ("question", "stock", "patched")), same, right)
    console.print(table)
    logits = data["logits"]
    console.print(
        f"largest difference of the logits: {logits['max_difference']:.2e} (largest logit {logits['max_logit']:.1f})"
    )


def print_stages(console: Console, data: dict[str, Any]) -> None:
    """Stock ms, patched ms and their ratio, a line a stage."""
    table = Table(
        title=f"one answer, stage by stage (medians of {data['rounds']} interleaved answers, {data['threads']} threads)"
    )
    table.add_column("stage")
    for name in ("stock ms", "patched ms", "ratio", "95% interval"):
        table.add_column(name, justify="right")
    for row in data["stages"]:
        table.add_row(
            row["stage"],
            f"{row['stock_ms']:.2f}",
            f"{row['patched_ms']:.2f}",
            _times(row["ratio"]),
            f"{row['low']:.2f} - {row['high']:.2f}",
        )
    console.print(table)


def print_patch(console: Console, data: dict[str, Any]) -> None:
    """What was patched with which kernel, and what was not, and why."""
    table = Table(title="what was patched")
    for name in ("modules", "class", "operation", "kernel", "status"):
        table.add_column(name, justify="right" if name == "modules" else "left")
    for row in data["patch"]["rows"]:
        status = row["status"] + (f": {row['why']}" if row["why"] else "")
        table.add_row(str(row["modules"]), row["class"], row["operation"], row["kernel"], Text(status))
    console.print(table)
    for note in data["patch"]["notes"]:
        console.print(note)
    console.print(f"packed weights: {data['patch']['packed_mib']:.1f} MiB")


def print_towers(console: Console, rows: list[dict[str, Any]]) -> None:
    """Towers at their true dimensions."""
    table = Table(title="vision towers at their true dimensions, random weights")
    table.add_column("tower")
    table.add_column("dtype")
    for name in ("stock ms", "patched ms", "ratio", "max difference", "stock's own", "cosine"):
        table.add_column(name, justify="right")
    for row in rows:
        name = f"{row['tower']}\n[dim]{row.get('what', '')}[/]"
        if "ratio" not in row:
            table.add_row(name, row["dtype"], f"[{'bold red' if row.get('wrong') else 'yellow'}]{row['note']}[/]")
            continue
        own = "-" if row["reference"] == "stock" else f"{row['stock_difference']:.1e}"
        table.add_row(
            name, row["dtype"], f"{row['stock_ms']:.0f}", f"{row['patched_ms']:.0f}", _times(row["ratio"]),
            f"{row['max_difference']:.1e} of {row['max_value']:.1f}", own, f"{row['cosine']:.7f}",
        )  # fmt: skip
    console.print(table)
    console.print(
        "[dim]differences: bf16 against the stock tower in fp32 with the same weights; fp32 against the stock tower[/]"
    )
