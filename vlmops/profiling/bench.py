"""All bars in order: measure, collect, show."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Iterator
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from vlmops.ops._shared.gemm_cpu import widened
from vlmops.profiling import bars, bench_ops, bench_stack, bench_towers, overhead
from vlmops.profiling.bars import Row
from vlmops.profiling.peak import PEAK_WORK, peak_call
from vlmops.profiling.settings import Settings
from vlmops.profiling.timing import compare

__all__ = ["as_dict", "measure_peaks", "run", "table"]


def measure_peaks(settings: Settings) -> dict[str, float]:
    """G in GFLOP/s by dtype, as a headline: every bar measures it again in its own rounds."""
    found = compare(
        {name: peak_call(bars.DTYPES[name]) for name in settings.dtypes},
        rounds=settings.rounds,
        threads=settings.threads,
    )
    return {name: found[name].gflops(PEAK_WORK) for name in settings.dtypes}


def run(settings: Settings, progress: Callable[[str], None] = lambda line: None) -> Iterator[Row]:
    """Every bar that was asked for, one row as soon as it is measured.

    Args:
        settings: what to run.
        progress: gets one line before each long part.
    """
    parts = {
        "varlen_attention": bench_ops.attention_rows,
        "patchify": bench_ops.patchify_rows,
        "mlp": bench_ops.mlp_rows,
        "overhead": overhead.overhead_rows,
        "preprocess": bench_stack.preprocess_rows,
    }
    for name in settings.ops:
        progress(name)
        yield from parts[name](settings)
    for name in settings.models:
        for dtype in settings.dtypes:
            progress(f"{name} {dtype}")
            yield from bench_towers.tower_rows(name, dataclasses.replace(settings, dtypes=(dtype,)))
    for name in settings.stacks:
        for dtype in settings.dtypes:
            progress(f"stack {name} {dtype}")
            yield from bench_stack.stack_rows(name, dataclasses.replace(settings, dtypes=(dtype,)))
    if settings.models:
        progress("peak memory of the towers, each in a process of its own")
        yield from bench_towers.memory_rows(settings.models, settings)


def _figure(row: Row) -> str:
    if row.wrong:
        return "[bold red]WRONG[/]"
    if row.measured is None:
        return "-"
    if "share" in row.metric:
        return f"{row.measured:.0%}"
    if row.metric.startswith("us"):
        return f"{row.measured:.1f} us"
    interval = f" [dim]\\[{row.low:.2f}, {row.high:.2f}][/]" if row.low is not None and row.high is not None else ""
    return f"{row.measured:.2f}x{interval}"


def _bar(row: Row) -> str:
    if row.bar is None:
        return ""
    sign = ">=" if row.higher else "<="
    return f"{sign} {row.bar:.0%}" if "share" in row.metric else f"{sign} {row.bar:g}"


def table(rows: list[Row], title: str) -> Table:
    """The rows as a rich table."""
    out = Table(title=title, show_lines=False)
    for name, style in (
        ("what", "bold"),
        ("case", ""),
        ("dtype", ""),
        ("measure", ""),
        ("measured", ""),
        ("bar", ""),
        ("", ""),
    ):
        out.add_column(name, style=style or None, overflow="fold")
    for name in ("ms", "GFLOP/s", "GB/s", "of G"):
        out.add_column(name, justify="right", no_wrap=True)
    out.add_column("times as fast as / note", overflow="fold")
    before: Row | None = None
    for row in rows:
        verdict = {True: "[green]met[/]", False: "[red]MISSED[/]", None: ""}[row.met]
        peers = ", ".join(f"{name} {ratio:.2f}x" for name, ratio in row.ratios.items() if row.metric != f"vs {name}")
        again = before is not None and (before.case, before.dtype) == (row.case, row.dtype)
        backend = f"backend {row.backend}" if row.backend and not again else ""
        notes = "; ".join(part for part in (peers, row.note, backend) if part)
        before = row
        out.add_row(
            row.group, row.case, row.dtype, row.metric, _figure(row), _bar(row), verdict,
            "" if row.ms is None else f"{row.ms:.2f} ±{row.spread:.0%}",
            "" if row.gflops is None else f"{row.gflops:.0f}",
            "" if row.gbytes is None else f"{row.gbytes:.1f}",
            "" if row.share_of_peak is None else f"{row.share_of_peak:.0%}", Text(notes),
        )  # fmt: skip
    return out


def as_dict(rows: list[Row], peaks: dict[str, float], settings: Settings) -> dict[str, Any]:
    """Everything as plain data."""
    from vlmops.backends import native, probe
    from vlmops.profiling.report.facts import commit, facts

    machine = probe.report()
    judged = [row for row in rows if row.met is not None]
    return {
        "kind": "vlmops bench",
        "date": facts(torch.device("cpu"))["date"],
        "commit": commit(),
        "machine": {
            k: machine[k]
            for k in ("cpu", "cores", "instruction_sets", "memory_gib", "torch", "transformers", "vlmops", "python")
        },
        "native": native.isa() or native.reason(),
        "settings": dataclasses.asdict(settings),
        "peak_gflops": peaks,
        "rows": [row.as_dict() for row in rows],
        "met": sum(bool(row.met) for row in judged),
        "missed": sum(not row.met for row in judged),
        "wrong": sum(row.wrong for row in rows),
        "median_spread": statistics.median([row.spread for row in rows if row.spread is not None] or [0.0]),
        "threads": settings.threads or torch.get_num_threads(),
    }


def show(rows: list[Row], peaks: dict[str, float], settings: Settings, console: Console) -> None:
    """Print machine, table and count."""
    data = as_dict(rows, peaks, settings)
    machine = data["machine"]
    console.print(
        f"{machine['cpu']}, {machine['cores']} cores, {data['threads']} threads, torch {machine['torch']}, "
        f"native kernels: {data['native']}"
    )
    console.print(
        "G = "
        + ", ".join(f"{name} {rate:.0f} GFLOP/s" for name, rate in peaks.items())
        + " (packed oneDNN 1024 x 1024 x 4096"
        + ("; bf16 through float32: this processor has no bf16 products)" if widened(torch.bfloat16) else ")")
    )
    console.print(table(rows, f"bars: medians of {settings.rounds} interleaved rounds, 95% bootstrap intervals"))
    console.print(
        f"{data['met']} met, {data['missed']} missed, {data['wrong']} wrong; median spread {data['median_spread']:.1%}"
    )
    if settings.quick:
        console.print(
            "[yellow]--quick: towers of one layer on few patches; use these figures for nothing but a smoke test[/]"
        )
