"""What a patched module costs in Python over the raw ops it calls, on shapes so small that nothing else is left."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

import vlmops
from vlmops.profiling.bars import OVERHEAD_BAR_US, Row
from vlmops.profiling.recorder import OpRecorder
from vlmops.profiling.settings import Settings
from vlmops.profiling.timing import bootstrap_ratio, compare

__all__ = ["module_calls", "overhead_rows", "tiny_tower"]


def tiny_tower() -> tuple[nn.Module, dict[str, Any]]:
    """A CLIP tower of one layer, 64 wide, and one image of 16 patches for it."""
    from transformers import CLIPVisionConfig, CLIPVisionModel

    config = CLIPVisionConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4, image_size=32, patch_size=8
    )
    rng = torch.Generator().manual_seed(0)
    return CLIPVisionModel(config).eval().requires_grad_(False), {
        "pixel_values": torch.randn(1, 3, 32, 32, generator=rng)
    }


def module_calls(
    model: nn.Module, inputs: dict[str, Any]
) -> dict[str, tuple[nn.Module, tuple[Any, ...], dict[str, Any]]]:
    """Class name -> (patched module, args, kwargs) of the first call of each kind inside a forward of ``model``."""
    from vlmops.patch.classes import original_class

    found: dict[str, tuple[nn.Module, tuple[Any, ...], dict[str, Any]]] = {}
    hooks = []

    def seen(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found.setdefault(type(module).__name__, (module, args, kwargs))

    for module in model.modules():
        if original_class(module) is not None:
            hooks.append(module.register_forward_pre_hook(seen, with_kwargs=True))
    try:
        with torch.inference_mode():
            model(**inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def _replay(calls: list[tuple[Any, tuple[Any, ...]]]) -> Callable[[], Any]:
    def run() -> Any:
        for op, args in calls:
            out = op(*args)
        return out

    return run


@contextlib.contextmanager
def always_fused() -> Iterator[None]:
    """Modules patched and called in here leave no call to the original: not small ones, not slower ones."""
    from vlmops.patch import base

    small, first = (base.SMALL_PRODUCT, base.SMALL_NORM), base.Patched._first
    try:
        base.SMALL_PRODUCT = base.SMALL_NORM = 0
        base.Patched._first = lambda self, x, args, kwargs: (self.fused(*args, **kwargs), "fused")  # type: ignore
        yield
    finally:
        base.SMALL_PRODUCT, base.SMALL_NORM = small
        base.Patched._first = first  # type: ignore[method-assign]


def overhead_rows(settings: Settings) -> Iterator[Row]:
    """One row a kind of patched module: microseconds an op call above the same raw ops with the same arguments."""
    with always_fused():
        yield from _rows(settings)


def _rows(settings: Settings) -> Iterator[Row]:
    tower, inputs = tiny_tower()
    calls = module_calls(vlmops.patch_model(tower), inputs)
    if not calls:
        yield Row(
            "overhead",
            "tiny CLIP tower",
            "",
            "us per op call",
            None,
            OVERHEAD_BAR_US,
            higher=False,
            note="nothing was patched",
        )
    for name, (module, args, kwargs) in calls.items():
        with torch.inference_mode():
            with OpRecorder() as seen:
                module(*args, **kwargs)
            if not seen.calls:
                continue
            raw, count = _replay(seen.calls), len(seen.calls)
            pair: dict[str, Callable[[], Any]] = {"module": lambda m=module, a=args, k=kwargs: m(*a, **k), "raw": raw}  # type: ignore[misc]
            found = compare(pair, rounds=max(settings.rounds, 41), warmup=3, threads=1, sample_seconds=1e-3)
        both = list(zip(found["module"].seconds, found["raw"].seconds, strict=True))
        cost = bootstrap_ratio([(a - b) * 1e6 for a, b in both], [float(count)] * len(both))
        ops_used = ", ".join(sorted({func._schema.name.split("::")[1] for func, _ in seen.calls}))
        row = Row("overhead", f"{name} ({ops_used})", "fp32", "us per op call", None, OVERHEAD_BAR_US, higher=False)
        row.note = (
            f"module {found['module'].median * 1e6:.0f} us, its {count} raw op(s) {found['raw'].median * 1e6:.0f} us"
        )
        yield row.add(cost)
