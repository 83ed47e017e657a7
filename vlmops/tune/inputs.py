"""A model and the inputs that stand for its use: one picture, several, a prompt, a decoding step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vlmops.profiling import towers
from vlmops.profiling.bars import random_tensor

__all__ = ["BUILT_IN", "Step", "TuneError", "prepare"]

#: Names that need no checkpoint: vision towers of true width with random weights, and the demo's model.
BUILT_IN = {
    "qwen2-vl-2b-vision": "qwen2_vl",
    "qwen2.5-vl-3b-vision": "qwen2_5_vl",
    "clip-l-336": "clip_l_336",
    "pixtral-vision": "pixtral",
}
EMBEDDED = "tiny"
SEVERAL = 3
#: Towers that take a picture of their one size only.
ONE_SIZE = ("clip_l_336",)


class TuneError(RuntimeError):
    """The model or a size cannot be had; the message says why."""


@dataclass(frozen=True)
class Step:
    """One use of the model: ``run(model)``."""

    name: str
    run: Callable[[nn.Module], Any]


def prepare(
    name: str, *, sizes: Sequence[int] = (), dtype: torch.dtype = torch.float32, device: torch.device, layers: int | None = None
) -> tuple[nn.Module, list[Step]]:  # fmt: skip
    """A stock model in eval mode on a device, and the steps to run it through.

    Args:
        name: a name of ``BUILT_IN``, "tiny", a folder or a hub id.
        sizes: pixels on a side of square pictures; empty: the model's usual one.
        dtype: of the weights.
        device: where.
        layers: of a built-in tower; None: 1, since every layer asks for the same choices (Qwen2.5-VL: 2, one windowed).

    Raises:
        TuneError: it cannot be had, or a size does not fit it.
    """
    if name in BUILT_IN:
        return _tower(BUILT_IN[name], sizes, dtype, device, layers)
    return _whole(name, sizes, dtype, device)


def _move(inputs: Any, device: torch.device) -> dict[str, Any]:
    return {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}


def _tower(
    key: str, sizes: Sequence[int], dtype: torch.dtype, device: torch.device, layers: int | None
) -> tuple[nn.Module, list[Step]]:  # fmt: skip
    unit = {"pixtral": 16}.get(key, 14) * (1 if key in ("clip_l_336", "pixtral") else 2)
    usual = {"clip_l_336": 336, "pixtral": 512}.get(key, 896)
    for size in sizes:
        if size < unit or size % unit:
            raise TuneError(f"--image-size: {key} takes multiples of {unit} pixels, got {size}")
        if key in ONE_SIZE and size != usual:
            raise TuneError(f"--image-size: {key} takes pictures of {usual} pixels only, got {size}")
    count = layers or (2 if key == "qwen2_5_vl" else 1)
    chosen = list(sizes) or [usual]
    largest = max(chosen)
    patch = 16 if key == "pixtral" else 14
    images = 4 if key == "pixtral" else 1
    module = towers.build(key, dtype, layers=count, patches=images * (largest // patch) ** 2).module.to(device)
    steps = []
    for size in chosen:
        for many in (1, SEVERAL):
            inputs = _move(_pictures(key, size // patch, many, dtype), device)
            label = f"{many} picture{'s' if many > 1 else ''} of {size} x {size}"
            steps.append(Step(label, lambda model, inputs=inputs: model(**inputs)))  # type: ignore[misc]
    return module, steps


def _pictures(key: str, side: int, count: int, dtype: torch.dtype) -> dict[str, Any]:
    """Random pixels as the tower's image processor makes them; ``side``: patches on a side."""
    if key.startswith("qwen"):
        rows = random_tensor(count * side * side, 3 * 2 * 14 * 14, dtype=dtype, seed=3)
        return {"hidden_states": rows, "grid_thw": torch.tensor([[1, side, side]] * count)}
    pixels = side * (16 if key == "pixtral" else 14)
    return {"pixel_values": random_tensor(count, 3, pixels, pixels, dtype=dtype, seed=3)}


def _whole(name: str, sizes: Sequence[int], dtype: torch.dtype, device: torch.device) -> tuple[nn.Module, list[Step]]:
    from vlmops.demo import loading

    try:
        subject = loading.embedded(dtype=dtype) if name == EMBEDDED else loading.load(name, None, None, dtype)
    except loading.DemoError as err:
        known = ", ".join([EMBEDDED, *BUILT_IN])
        raise TuneError(f"{str(err).removeprefix('--model: ')} (built-in names: {known})") from err
    return subject.model.to(device), list(_uses(subject, sizes, device))


def _uses(subject: Any, sizes: Sequence[int], device: torch.device) -> Iterator[Step]:
    """Prefill with one picture and with several prompts at once, and two tokens generated, at each size."""
    picture = subject.image
    for size in sizes or (None,):
        image = picture if size is None else picture.resize((size, size))
        label = f"{image.width} x {image.height}"
        for many in (1, SEVERAL):
            inputs = _move(_processed(subject, [image] * many), device)
            what = f"prefill, {many} picture{'s' if many > 1 else ''} of {label}"
            yield Step(what, lambda model, inputs=inputs: model(**inputs))  # type: ignore[misc]
        inputs = _move(_processed(subject, [image]), device)
        yield Step(
            f"decoding, 1 picture of {label}",
            lambda model, inputs=inputs: model.generate(**inputs, max_new_tokens=3, do_sample=False),  # type: ignore[misc]
        )


def _processed(subject: Any, images: list[Any]) -> dict[str, Any]:
    """The processor's output for a batch of equal prompts, each with its picture."""
    text = [subject.text(subject.prompt)] * len(images)
    nested: Any = images if len(images) == 1 else [[image] for image in images]
    made = subject.processor(images=nested, text=text, return_tensors="pt")
    dtype = next(subject.model.parameters()).dtype
    return {k: v.to(dtype) if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in made.items()}


def local(name: str) -> bool:
    """Whether the name is built in or a folder: nothing is downloaded."""
    return name in BUILT_IN or name == EMBEDDED or Path(name).exists()
