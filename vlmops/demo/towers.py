"""Vision towers at the true dimensions of known checkpoints, random weights: stock against patched."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import vlmops
from vlmops.demo.run import PATCHED, STOCK
from vlmops.profiling import towers
from vlmops.profiling.bars import DTYPES
from vlmops.profiling.timing import WrongOutputError, agrees, compare, error

__all__ = ["measure"]

#: Tower -> title and patches: a picture of 336 x 336 for both, so that the demo ends within a minute on two cores.
SHOWN = {"qwen2_vl": ("Qwen2-VL-2B", 576), "clip_l_336": ("CLIP-L/14-336", 576)}


def _usable(dtype: torch.dtype) -> bool:
    """bf16 towers are only shown where the processor has instructions for them: emulated, one forward takes minutes."""
    return dtype == torch.float32 or bool(
        torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )


def _cosine(x: Tensor, y: Tensor) -> float:
    return float(torch.nn.functional.cosine_similarity(x.double().flatten(), y.double().flatten(), dim=0))


def measure(
    *,
    full: bool,
    rounds: int,
    threads: int | None,
    progress: Callable[[str], None],
    scale: int = 1,
    layers: int = towers.DEFAULT_LAYERS,
) -> list[dict[str, Any]]:
    """One row a tower and dtype.

    Args:
        full: every layer of the checkpoint.
        rounds: timed rounds.
        threads: torch threads; None: as it is.
        progress: gets a line before each tower.
        scale: divides the number of patches (tests).
        layers: of each tower unless ``full``.

    Returns:
        Times, ratio and errors. The reference of a 16-bit tower is the stock one in float32 with the same (rounded)
        weights, and its own error stands beside ours; that of a float32 tower is the stock output itself.
    """
    rows: list[dict[str, Any]] = []
    for name, (title, patches) in SHOWN.items():
        for label, dtype in DTYPES.items():
            row: dict[str, Any] = {"tower": title, "dtype": label}
            if not _usable(dtype):
                rows.append({**row, "note": "this processor has no bf16 instructions: not measured"})
                continue
            tower = towers.build(name, dtype, layers=None if full else layers, patches=patches // scale)
            progress(f"{title}, {label}: {tower.what}")
            patched = vlmops.patch_model(towers.shared_copy(tower.module))
            outputs: dict[str, Tensor] = {}
            truth = towers.reference(tower)

            def check(
                found: dict[str, Tensor], truth: Tensor | None = truth, outputs: dict[str, Tensor] = outputs
            ) -> None:
                agrees(PATCHED, STOCK, truth)(found)
                outputs.update(found)

            try:
                times = compare(
                    {STOCK: tower.run, PATCHED: lambda tower=tower, patched=patched: tower.run(patched)},  # type: ignore[misc]
                    rounds=rounds, threads=threads, correct=check,
                )  # fmt: skip
            except WrongOutputError as err:
                rows.append({**row, "what": tower.what, "wrong": True, "note": str(err)})
                continue
            speedup = times.speedup(PATCHED, STOCK)
            row.update(what=tower.what, stock_ms=times[STOCK].median * 1e3, patched_ms=times[PATCHED].median * 1e3)
            row.update(ratio=speedup.value, low=speedup.low, high=speedup.high)
            rows.append({**row, **_closeness(outputs, truth)})
    return rows


def _closeness(outputs: dict[str, Tensor], truth: Tensor | None) -> dict[str, Any]:
    """Largest differences and cosine against the float32 truth, or against stock where that is the truth."""
    reference = outputs[STOCK] if truth is None else truth
    return {
        "reference": "stock" if truth is None else "stock, fp32",
        "max_difference": error(outputs[PATCHED], reference),
        "stock_difference": error(outputs[STOCK], reference),
        "max_value": float(reference.float().abs().max()),
        "cosine": _cosine(outputs[PATCHED], reference),
    }
