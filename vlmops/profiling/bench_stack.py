"""The bars of the reference stack: against transformers on the same weights, stage by stage; and of preparing photos."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from itertools import chain
from typing import Any

import torch

import vlmops
from vlmops.profiling import bars, stacks
from vlmops.profiling.bars import Row
from vlmops.profiling.bench_ops import guarded
from vlmops.profiling.settings import Settings
from vlmops.profiling.stacks import Stack
from vlmops.profiling.timing import WrongOutputError, agrees, bootstrap_ratio
from vlmops.profiling.towers import shared_copy
from vlmops.profiling.workloads import OURS

__all__ = ["preprocess_rows", "stack_rows"]

STOCK, PATCHED = "stock", "patched"
NEW = 16  # tokens decoded, behind a short prompt: a long one's prefill would drown them
SHORT, SEVERAL = 32, 4  # tokens of that prompt; prompts at once


def stack_rows(name: str, settings: Settings) -> Iterator[Row]:
    """Vision, prefill and decode of one model, for each dtype."""
    for dtype in settings.dtypes:
        stack = stacks.build(name, bars.DTYPES[dtype], quick=settings.quick)
        stages = (part(stack, dtype, settings) for part in (_vision, _text))
        yield from guarded(partial(chain.from_iterable, stages), f"stack {name}", stack.what, dtype)


def _oracle(stack: Stack, call: Callable[[Stack, Any], torch.Tensor]) -> torch.Tensor | None:
    """Stock's result in float32, for a 16-bit model."""
    if stack.ours.dtype == torch.float32:
        return None
    wide = {key: x.float() if x.is_floating_point() else x for key, x in stack.pixels.items()}
    wider = Stack(stack.name, None, stack.ours, wide, stack.prompt, "")
    return call(wider, copy.deepcopy(stack.stock).float())


def _vision(stack: Stack, dtype: str, settings: Settings) -> Iterator[Row]:
    patched = vlmops.patch_model(shared_copy(stack.stock))
    calls = {
        OURS: stack.encode_ours, STOCK: lambda: stack.encode(stack.stock), PATCHED: lambda: stack.encode(patched),
    }  # fmt: skip
    found = settings.compare(calls, agrees(OURS, STOCK, _oracle(stack, Stack.encode)))
    ratios = {peer: found.speedup(OURS, peer).value for peer in (STOCK, PATCHED)}
    for peer, bar in bars.STACK["vision"].items():
        row = Row(f"stack {stack.name}", f"vision: {stack.what}", dtype, f"vs {peer}", None, bar, ratios=ratios)
        row.note = f"{peer} {found[peer].median * 1e3:.0f} ms"
        yield row.add(found.speedup(OURS, peer), found[OURS])


def _text(stack: Stack, dtype: str, settings: Settings) -> Iterator[Row]:
    """Prefill is an answer of one token; decode is what the 16 that follow take longer, for one prompt and for several."""
    agrees(OURS, STOCK, _oracle(stack, Stack.logits))(
        {OURS: stack.logits(stack.ours), STOCK: stack.logits(stack.stock)}
    )
    models = {OURS: stack.ours, STOCK: stack.stock}
    found = settings.compare({who: partial(stack.answer, model, 1) for who, model in models.items()}, None)
    row = Row(f"stack {stack.name}", f"prefill: {stack.what}", dtype, "vs stock", None, bars.STACK["prefill"][STOCK])
    row.note = f"stock {found[STOCK].median * 1e3:.0f} ms"
    yield row.add(found.speedup(OURS, STOCK), found[OURS])
    for prompts, bar in ((1, bars.STACK["decode"][STOCK]), (SEVERAL, None)):
        yield _decode(replace(stack, prompt=stack.prompt[:, :SHORT].expand(prompts, -1)), models, bar, dtype, settings)


def _decode(stack: Stack, models: dict[str, Any], bar: float | None, dtype: str, settings: Settings) -> Row:
    calls = {f"{who} {n}": partial(stack.answer, model, n) for who, model in models.items() for n in (1, 1 + NEW)}
    found = settings.compare(calls, None)
    steps = {
        who: [
            (b - a) / NEW
            for a, b in zip(found[f"{who} 1"].seconds, found[f"{who} {1 + NEW}"].seconds, strict=True)
        ]
        for who in models
    }  # fmt: skip
    many = "one prompt" if len(stack.prompt) == 1 else f"{len(stack.prompt)} prompts"
    case = f"decode, {many} of {stack.prompt.shape[1]} tokens: {len(stack.ours.decoder.blocks)} layers"
    row = Row(f"stack {stack.name}", case, dtype, "vs stock", None, bar)
    row.add(bootstrap_ratio(steps[STOCK], steps[OURS]))
    middle = {who: sorted(s)[len(s) // 2] * 1e3 for who, s in steps.items()}
    row.ms, row.spread = middle[OURS], 0.0
    row.note = f"a token: ours {middle[OURS]:.1f} ms, stock {middle[STOCK]:.1f} ms"
    return row


def photos(count: int, height: int, width: int) -> list[Any]:
    """Pillow images with structure and noise, all different."""
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(0)
    y, x = np.mgrid[0:height, 0:width]
    found = []
    for i in range(count):
        waves = np.stack([np.sin(x / (9 + i + c)) + np.cos(y / (7 + c)) for c in range(3)], -1) * 60 + 128
        found.append(Image.fromarray((waves + rng.normal(0, 12, waves.shape)).clip(0, 255).astype(np.uint8)))
    return found


def preprocess_rows(settings: Settings) -> Iterator[Row]:
    """32 photos of 1024 x 768 to AnyRes tiles, pixels left in bytes, against transformers' PIL processor."""
    from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

    from vlmops import images

    many = photos(4 if settings.quick else 32, 768, 1024)
    theirs = LlavaNextImageProcessorPil(size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336})
    calls: dict[str, Callable[[], Any]] = {
        OURS: lambda: images.prepare(many, mode="anyres"),
        "PIL processor": lambda: theirs(many, return_tensors="pt"),
    }

    def correct(outputs: dict[str, Any]) -> None:
        values = outputs[OURS].pixel_values()
        want = outputs["PIL processor"]["pixel_values"]
        have = torch.as_tensor(values).view(len(many), -1, *values.shape[1:])
        if not bool((have - want[:, : have.shape[1]]).abs().max() <= 1e-5):
            raise WrongOutputError("pixel values differ from the PIL processor's")

    case = f"{len(many)} photos 1024 x 768 to AnyRes"

    def rows() -> Iterator[Row]:
        found = settings.compare(calls, correct)
        row = Row("preprocess", case, "", "vs PIL processor", None, bars.PREPROCESS_BAR)
        yield row.add(found.speedup(OURS, "PIL processor"), found[OURS])

    yield from guarded(rows, "preprocess", case, "")
