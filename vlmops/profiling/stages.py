"""Where the time of one answer goes: image preprocessing, vision tower, connector, prefill, decoding.

Measured on real ``generate`` calls with hooks on four modules at most; they are there only while a call is timed, and
never on a module inside the parts that patching replaces.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from vlmops.profiling.timing import MIN_ROUNDS, Comparison, Timing, num_threads

__all__ = ["STAGES", "Parts", "compare_stages", "find_parts", "time_answer"]

STAGES = ("image preprocessing", "vision tower", "connector", "prefill", "decode, per token", "whole answer")
MAX_ROUNDS = 60
VISION = ("vision_tower", "visual", "vision_model", "vision_encoder", "image_tower")
CONNECTOR = ("multi_modal_projector", "connector", "mm_projector", "aligner", "qformer", "perceiver", "resampler")


@dataclass(frozen=True)
class Parts:
    """The modules that stages are read from; ``connector`` may be inside ``vision`` (Qwen's merger) or absent."""

    model: nn.Module
    vision: nn.Module
    connector: nn.Module | None


def find_parts(model: nn.Module) -> Parts:
    """Vision tower and connector, by the attribute names transformers uses.

    Raises:
        ValueError: there is no vision tower: not a vision-language model, or one of a shape not known here.
    """
    homes = [model, getattr(model, "model", None), getattr(model, "base_model", None)]
    for home in (h for h in homes if isinstance(h, nn.Module)):
        vision = next((getattr(home, n) for n in VISION if isinstance(getattr(home, n, None), nn.Module)), None)
        if vision is not None:
            places = [(home, CONNECTOR), (vision, ("merger",))]
            connector = next(
                (getattr(at, n) for at, names in places for n in names if isinstance(getattr(at, n, None), nn.Module)),
                None,
            )
            return Parts(model, vision, connector)
    raise ValueError(f"model: {type(model).__name__} has no vision tower under any of {', '.join(VISION)}")


class _Clock:
    """Start and end of every call of the watched modules."""

    def __init__(self, parts: Parts) -> None:
        self.spans: dict[str, list[tuple[float, float]]] = {"model": [], "vision": [], "connector": []}
        self._open: dict[str, float] = {}
        self._watched = {"model": parts.model, "vision": parts.vision, "connector": parts.connector}
        self._hooks: list[Any] = []

    def __enter__(self) -> _Clock:
        for name, module in self._watched.items():
            if module is not None:
                self._hooks.append(module.register_forward_pre_hook(lambda *_, name=name: self._start(name)))
                self._hooks.append(module.register_forward_hook(lambda *_, name=name: self._stop(name)))
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def _start(self, name: str) -> None:
        self._open[name] = time.perf_counter()

    def _stop(self, name: str) -> None:
        self.spans[name].append((self._open.pop(name), time.perf_counter()))


def _inside(spans: list[tuple[float, float]], outer: list[tuple[float, float]]) -> float:
    """Seconds of ``spans`` that lie inside one of ``outer``."""
    return sum(end - begin for begin, end in spans if any(a <= begin and end <= b for a, b in outer))


def stage_seconds(
    spans: Mapping[str, list[tuple[float, float]]], preprocessing: float, generating: float
) -> dict[str, float]:
    """Stages from the recorded spans; a stage that did not run is left out.

    Args:
        spans: (begin, end) of every call of "model", "vision" and "connector".
        preprocessing: seconds the processor took.
        generating: seconds of the whole ``generate`` call.
    """
    forwards, vision, connector = spans["model"], spans["vision"], spans["connector"]
    found = {"image preprocessing": preprocessing}
    inner = _inside(connector, vision)
    if vision:
        found["vision tower"] = sum(end - begin for begin, end in vision) - inner
    if connector:
        found["connector"] = sum(end - begin for begin, end in connector)
    if forwards:
        first = forwards[:1]
        outside = _inside(connector, first) - _inside([s for s in connector if _inside([s], vision)], first)
        found["prefill"] = first[0][1] - first[0][0] - _inside(vision, first) - outside
    if len(forwards) > 1:
        found["decode, per token"] = statistics.median(end - begin for begin, end in forwards[1:])
    found["whole answer"] = preprocessing + generating
    return found


def time_answer(
    parts: Parts, preprocess: Callable[[], Mapping[str, Any]], **generate: Any
) -> tuple[dict[str, float], torch.Tensor]:
    """One answer: seconds a stage, and the tokens [batch, prompt + new].

    Args:
        parts: of the model that answers.
        preprocess: makes ``generate``'s inputs from picture and prompt.
        generate: further arguments of ``generate``.
    """
    begin = time.perf_counter()
    inputs = preprocess()
    ready = time.perf_counter()
    with _Clock(parts) as clock, torch.inference_mode():
        tokens = parts.model.generate(**inputs, **generate)  # type: ignore[operator]
    return stage_seconds(clock.spans, ready - begin, time.perf_counter() - ready), tokens


def compare_stages(
    models: Mapping[str, nn.Module],
    preprocess: Callable[[], Mapping[str, Any]],
    *,
    rounds: int = MIN_ROUNDS,
    warmup: int = 2,
    threads: int | None = None,
    seconds: float = 0.0,
    **generate: Any,
) -> tuple[dict[str, Comparison], dict[str, torch.Tensor]]:
    """Stages of the same question to several models, interleaved.

    Args:
        models: name -> model. Copies may share their parameters.
        preprocess: makes the inputs.
        rounds: timed answers of each, at least ``MIN_ROUNDS``.
        warmup: untimed answers of each.
        threads: torch threads.
        seconds: go on beyond ``rounds`` until this time is spent (at most ``MAX_ROUNDS``): short answers need more
            rounds for a steady median.
        generate: further arguments of ``generate``.

    Returns:
        Stage -> comparison of the models, in the order of ``STAGES``, and each model's tokens.
    """
    if rounds < MIN_ROUNDS:
        raise ValueError(f"rounds: expected at least {MIN_ROUNDS}, got {rounds}")
    parts = {name: find_parts(model) for name, model in models.items()}
    names, tokens = list(models), {}
    times: dict[str, dict[str, list[float]]] = {}
    with num_threads(threads) as used:
        for name in names * max(1, warmup):
            _, tokens[name] = time_answer(parts[name], preprocess, **generate)
        begin, done = time.perf_counter(), 0
        while done < rounds or (done < MAX_ROUNDS and time.perf_counter() - begin < seconds):
            done += 1
            for name in names if done % 2 else names[::-1]:
                found, _ = time_answer(parts[name], preprocess, **generate)
                for stage, took in found.items():
                    times.setdefault(stage, {}).setdefault(name, []).append(took)
    return {
        stage: Comparison({name: Timing(name, tuple(times[stage][name])) for name in names}, used)
        for stage in STAGES
        if stage in times and set(times[stage]) == set(names)
    }, tokens
