"""The bars of single operations, one generator of rows an operation."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from vlmops.profiling import bars, workloads
from vlmops.profiling.bars import Row
from vlmops.profiling.peak import PEAK_WORK, peak_call
from vlmops.profiling.recorder import backends_used
from vlmops.profiling.settings import Settings
from vlmops.profiling.timing import Comparison, Work, WrongOutputError
from vlmops.profiling.workloads import OURS, Workload

__all__ = ["attention_rows", "guarded", "mlp_rows", "patchify_rows"]

PEAK = "packed GEMM (G)"


def _timed(load: Workload, dtype: torch.dtype, settings: Settings) -> Comparison:
    """Ours, the peers and G in the same rounds."""
    return settings.compare({**load.calls, PEAK: peak_call(dtype)}, load.correct)


def _ratio_row(row: Row, found: Comparison, peer: str, work: Work) -> Row:
    """Speed-up over ``peer``, with the rate and the speed-up over every other peer."""
    row.add(found.speedup(OURS, peer), found[OURS], work)
    row.share_of_peak = found.share(OURS, work, PEAK, PEAK_WORK).value
    row.ratios = {name: found.speedup(OURS, name).value for name in found.timings if name not in (OURS, PEAK)}
    return row


def guarded(rows: Callable[[], Iterator[Row]], group: str, case: str, dtype: str) -> Iterator[Row]:
    """The rows, or one that says what went wrong: a wrong output never becomes a speed."""
    try:
        yield from rows()
    except WrongOutputError as err:
        yield Row(group, case, dtype, "correct output", None, 1.0, note=str(err), wrong=True)


def attention_rows(settings: Settings) -> Iterator[Row]:
    """varlen_attention: share of G, and speed-up over SDPA."""
    for name in settings.dtypes:
        dtype = bars.DTYPES[name]
        for case in bars.ATTENTION:
            if settings.quick and max(case.lengths) > 1024:
                continue

            def rows(case: bars.AttentionCase = case, dtype: torch.dtype = dtype, name: str = name) -> Iterator[Row]:
                load = workloads.attention(case, dtype)
                found = _timed(load, dtype, settings)
                backend = backends_used(load.calls[OURS], "varlen_attention")
                share = found.share(OURS, load.work, PEAK, PEAK_WORK)
                ratios = {case.peer: found.speedup(OURS, case.peer).value}
                row = Row(
                    "varlen_attention", case.name, name, "share of G", None, case.share.get(name), backend=backend
                )
                row.add(share, found[OURS], load.work)
                row.share_of_peak, row.ratios = share.value, ratios
                yield row
                row = Row(
                    "varlen_attention", case.name, name, f"vs {case.peer}", None, case.ratio.get(name), backend=backend
                )
                yield _ratio_row(row, found, case.peer, load.work)

            yield from guarded(rows, "varlen_attention", case.name, name)


def patchify_rows(settings: Settings) -> Iterator[Row]:
    """patchify: speed-up over the product on a view, from floats and from uint8."""
    for name in settings.dtypes:
        dtype = bars.DTYPES[name]
        for case in bars.PATCHIFY:

            def rows(case: bars.PatchifyCase = case, dtype: torch.dtype = dtype, name: str = name) -> Iterator[Row]:
                load = workloads.patchify(case, dtype)
                found = _timed(load, dtype, settings)
                row = Row("patchify", case.name, name, f"vs {case.peer}", None, case.ratio.get(name))
                row.backend = backends_used(load.calls[OURS], "patchify")
                yield _ratio_row(row, found, case.peer, load.work)

            yield from guarded(rows, "patchify", case.name, name)


def mlp_rows(settings: Settings) -> Iterator[Row]:
    """mlp: speed-up over nn.Linear, GELU, nn.Linear."""
    for name in settings.dtypes:
        dtype = bars.DTYPES[name]
        for case in bars.MLP:

            def rows(case: bars.MlpCase = case, dtype: torch.dtype = dtype, name: str = name) -> Iterator[Row]:
                load = workloads.mlp(case, dtype)
                found = _timed(load, dtype, settings)
                peer = next(other for other in load.calls if other != OURS)
                row = Row("mlp", case.name, name, f"vs {peer}", None, case.ratio.get(name))
                row.backend = backends_used(load.calls[OURS], "mlp")
                yield _ratio_row(row, found, peer, load.work)

            yield from guarded(rows, "mlp", case.name, name)
