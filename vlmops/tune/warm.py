"""Running a patched model through its steps so that every choice is measured and kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

import vlmops
from vlmops.backends import choice
from vlmops.ops._shared.registry import OPS
from vlmops.profiling.towers import shared_copy
from vlmops.tune.inputs import Step

__all__ = ["rehearse", "warm"]

Progress = Callable[[str, int], None]


def _forget_in_process() -> None:
    """What ops remember beside the cache file, so that every key is asked for again."""
    for op in OPS.values():
        op._memory.clear()


def rehearse(model: nn.Module, steps: Sequence[Step]) -> dict[str, bool]:
    """Keys that the steps ask for -> whether each is measured already; nothing is measured.

    Args:
        model: stock; a patched copy that shares its weights is run.
        steps: what to run.
    """
    _forget_in_process()
    try:
        patched = vlmops.patch_model(shared_copy(model))
        with choice.rehearse() as keys, torch.inference_mode():
            for step in steps:
                step.run(patched)
        return dict(keys)
    finally:
        _forget_in_process()


def warm(
    model: nn.Module, steps: Sequence[Step], device: torch.device, progress: Progress = lambda name, new: None
) -> list[dict[str, Any]]:  # fmt: skip
    """Run the steps, measure what is not measured yet, and save after each: a second run goes on where one was stopped.

    Args:
        model: stock; a patched copy that shares its weights is run.
        steps: what to run.
        device: whose choices.
        progress: gets each finished step and how many keys it measured.

    Returns:
        One row a key asked for: "key", "choice", "ms" by candidate, "new", "step".
    """
    before = choice.measured(device)
    known = set(before)
    rows: dict[str, dict[str, Any]] = {}
    _forget_in_process()
    patched = vlmops.patch_model(shared_copy(model))
    with torch.inference_mode():
        for step in steps:
            with choice.watch() as asked:
                step.run(patched)
            table = choice.measured(device)
            for key in asked:
                if key in table and key not in rows:
                    row = table[key]
                    rows[key] = {
                        "key": key,
                        "choice": row["choice"],
                        "ms": row["ms"],
                        "new": key not in known,
                        "step": step.name,
                    }
            fresh = len(set(table) - known)
            known |= set(table)
            choice.save()
            progress(step.name, fresh)
    return list(rows.values())
