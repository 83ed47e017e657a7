"""The bars of whole vision towers: patched against stock, against their own products, and their memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

import vlmops
from vlmops.profiling import bars, memory, towers
from vlmops.profiling.bars import Row, TowerBar
from vlmops.profiling.bench_ops import PEAK, guarded
from vlmops.profiling.peak import PEAK_WORK, packed_sequence, peak_call
from vlmops.profiling.recorder import backends_used
from vlmops.profiling.settings import Settings
from vlmops.profiling.timing import Comparison, Work, agrees, bootstrap_ratio
from vlmops.profiling.towers import Tower
from vlmops.profiling.workloads import OURS

__all__ = ["budget_seconds", "memory_rows", "tower_rows"]

STOCK, GEMMS, COMPILED = "stock", "packed GEMMs alone", "torch.compile"


def _size(name: str, settings: Settings) -> dict[str, Any]:
    if settings.quick:
        return {"layers": 1, "patches": towers.TOWERS[name].quick}
    return {"layers": None if settings.full else towers.DEFAULT_LAYERS}


def _compiled(tower: Tower) -> Callable[[], torch.Tensor]:
    """torch.compile with constant folding of the weights: what plain PyTorch can do at its best."""
    import torch._inductor.config as inductor

    inductor.freezing = True
    module = torch.compile(towers.shared_copy(tower.module))
    return lambda: tower.run(module)


def budget_seconds(found: Comparison, tower: Tower, bar: TowerBar, dtype: str) -> list[float]:
    """Per round: the products alone as measured, and attention at the bar's share of G."""
    full, window = tower.attention.flops / bar.attention_share[dtype], tower.windows.flops / bar.window_share[dtype]
    per_peak = (full + window) / PEAK_WORK.flops
    return [gemm + per_peak * peak for gemm, peak in zip(found[GEMMS].seconds, found[PEAK].seconds, strict=True)]


def tower_rows(name: str, settings: Settings) -> Iterator[Row]:
    """Time over budget, and speed-up over stock, for each dtype."""
    for dtype in settings.dtypes:
        tower = towers.build(name, bars.DTYPES[dtype], **_size(name, settings))
        yield from guarded(partial(_one, tower, bars.TOWERS[name], dtype, settings), name, tower.what, dtype)


def _one(tower: Tower, bar: TowerBar, dtype: str, settings: Settings) -> Iterator[Row]:
    patched = vlmops.patch_model(towers.shared_copy(tower.module))
    products, work = packed_sequence(tower.products, bars.DTYPES[dtype])
    total = Work(work.flops + tower.attention.flops + tower.windows.flops)
    calls: dict[str, Callable[[], Any]] = {
        OURS: lambda: tower.run(patched),
        STOCK: tower.run,
        GEMMS: products,
        PEAK: peak_call(bars.DTYPES[dtype]),
    }
    if "compile" in settings.peers:
        calls[COMPILED] = _compiled(tower)
    found = settings.compare(calls, agrees(OURS, STOCK, towers.reference(tower)))
    share = found.share(OURS, total, PEAK, PEAK_WORK).value
    peers = {peer: found.speedup(OURS, peer).value for peer in (STOCK, COMPILED) if peer in calls}
    rates = f"attention at {bar.attention_share[dtype]:.0%} of G"
    if tower.windows.flops:
        rates += f", windows at {bar.window_share[dtype]:.0%}"
    gemm_ms, backend = found[GEMMS].median * 1e3, backends_used(calls[OURS])
    over = bootstrap_ratio(found[OURS].seconds, budget_seconds(found, tower, bar, dtype))
    budget = Row(
        tower.name, tower.what, dtype, "time / (GEMMs + attention)", None, bar.budget, higher=False, ratios=peers,
        backend=backend, share_of_peak=share, note=f"GEMMs alone {gemm_ms:.0f} ms, {rates}",
    ).add(over, found[OURS], total)  # fmt: skip
    floor = Row(
        tower.name, tower.what, dtype, "vs stock", None, bar.floor.get(dtype), ratios=peers, backend=backend,
        share_of_peak=share, note=f"stock {found[STOCK].median * 1e3:.0f} ms",
    ).add(found.speedup(OURS, STOCK), found[OURS], total)  # fmt: skip
    yield from (budget, floor)


def memory_rows(names: tuple[str, ...], settings: Settings) -> Iterator[Row]:
    """Peak memory of the patched towers over (stock's peak + packed weights)."""
    jobs = [
        {"tower": name, "dtype": dtype, "patched": patched, "threads": settings.threads, **_size(name, settings)}
        for name in names
        for dtype in settings.dtypes
        for patched in (False, True)
    ]
    results = memory.measure(jobs)
    for i in range(0, len(jobs), 2):
        stock, ours = results[i], results[i + 1]
        name, dtype = str(jobs[i]["tower"]), str(jobs[i]["dtype"])
        row = Row(
            name, "peak memory of a forward", dtype, "peak / (stock + packed)", None, bars.MEMORY_BAR, higher=False
        )
        failed = stock.get("error") or ours.get("error")
        if failed:
            row.note = failed
        else:
            row.measured = ours["growth"] / (stock["growth"] + ours["packed"])
            mib = {
                k: v / 2**20
                for k, v in (("ours", ours["growth"]), ("stock", stock["growth"]), ("packed", ours["packed"]))
            }
            row.note = f"patched {mib['ours']:.0f} MiB, stock {mib['stock']:.0f} + packed {mib['packed']:.0f} MiB"
        yield row
