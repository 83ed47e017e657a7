"""Run a model stock and patched under torch.profiler, and keep where the time went."""

from __future__ import annotations

import gzip
import json
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

import vlmops
from vlmops.backends import ranges
from vlmops.models.vlm import VLM
from vlmops.patch.base import KEY
from vlmops.patch.classes import original_class
from vlmops.profiling.annotate import annotated, stage_of
from vlmops.profiling.bars import dtype_name
from vlmops.profiling.report.accounting import ROOT, Shaped, account, shapes
from vlmops.profiling.report.data import Dot, Peaks, Profile, Run
from vlmops.profiling.report.facts import facts
from vlmops.profiling.report.work import WorkSeen, measure_peaks
from vlmops.profiling.timing import agrees, error
from vlmops.profiling.towers import shared_copy

__all__ = ["PATCHED", "STOCK", "profile_model"]

STOCK, PATCHED = "stock", "patched"
WARMUP = 2
MOST_DOTS = 60  # what a plot can show
Inputs = Mapping[str, Any] | Callable[[], Mapping[str, Any]]


class _Job:
    """One step: inputs, and what the model does with them."""

    def __init__(self, inputs: Inputs, generate: int, stage: str, device: torch.device) -> None:
        self.inputs, self.generate, self.stage, self.device = inputs, generate, stage, device

    def prepare(self) -> Mapping[str, Any]:
        if not callable(self.inputs):
            return self.inputs
        with ranges.stage("preprocess"):
            made = self.inputs()
        return {k: v.to(self.device) if isinstance(v, torch.Tensor) else v for k, v in made.items()}

    def __call__(self, model: nn.Module) -> Any:
        inputs = self.prepare()
        with ranges.stage(self.stage), torch.inference_mode():
            run = model.generate if self.generate else model
            more = _greedy(model, self.generate) if self.generate else {}
            out = run(**inputs, **more)  # type: ignore[operator]
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
        return out


def _greedy(model: nn.Module, tokens: int) -> dict[str, Any]:
    """``generate``'s arguments for so many tokens, whatever they are."""
    if isinstance(model, VLM):
        return dict(max_new_tokens=tokens, eos_token_id=())
    return dict(max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)


def profile_model(
    model: nn.Module,
    inputs: Inputs,
    *,
    patched: bool = True,
    steps: int = 3,
    generate: int = 0,
    stage: str | None = None,
    peaks: Peaks | None = None,
    command: str = "",
) -> Profile:
    """Profile a model as it is and patched, on copies that share its weights.

    Outputs are compared before anything is timed. Times without the profiler are interleaved; then each copy runs
    ``steps`` times under torch.profiler with ranges of stages, modules and ops.

    Args:
        model: in eval mode; of transformers or the reference stack, whole or a tower. Patched or not: it stays as it is.
        inputs: keyword arguments of its forward (or of ``generate``), on its device; or a call that makes them, which is
            then part of every step as the stage "preprocess".
        patched: whether to profile a patched copy too.
        steps: profiled steps of each, at least 1; rows are means over them.
        generate: new tokens of a step, by ``model.generate``; 0: a step is one forward.
        stage: name for the time outside the model's own stages; None: "rest" where it has any, else "forward".
        peaks: of the machine; None: measured now.
        command: how to repeat this, for the report.

    Raises:
        ValueError: fewer than 1 step, fewer than 0 tokens, or a model that cannot generate.
        WrongOutputError: the patched forward is not the stock one's within ``timing.agrees``.
    """
    if steps < 1:
        raise ValueError(f"steps: expected at least 1, got {steps}")
    if generate < 0 or (generate and not callable(getattr(model, "generate", None))):
        raise ValueError(f"generate: expected tokens of a model that has generate(), got {generate}")
    first = next(model.parameters(), torch.empty(0))
    device = first.device
    staged = any(stage_of(path) in ("vision", "text") for path, _ in model.named_modules() if path)
    job = _Job(inputs, generate, stage or ("rest" if staged else "forward"), device)
    models = {STOCK: _plain(model)}
    if patched:
        models[PATCHED] = vlmops.patch_model(shared_copy(models[STOCK]))
    outputs: dict[str, Any] = {}
    for _ in range(WARMUP):
        for name, copy in models.items():
            outputs[name] = job(copy)
    agreement = _agreement(outputs, generate)
    del outputs
    peaks = measure_peaks(_product_dtype(first.dtype), device) if peaks is None else peaks
    plain = _times(models, job, steps)
    runs = {name: _record(name, copy, job, steps) for name, copy in models.items()}
    for name, run in runs.items():
        run.plain = tuple(plain[name])
    given = job.prepare()
    profile = Profile(
        type(model).__name__, {k: ranges.describe([v]) or type(v).__name__ for k, v in given.items()},
        dtype_name(first.dtype) if first.dtype in ranges.SHORT else str(first.dtype), device.type, generate, runs,
        peaks, agreement=agreement, facts=facts(device, command),
    )  # fmt: skip
    if patched:
        found = vlmops.patch_report(models[PATCHED])
        profile.patch = [vars(row).copy() for row in found.rows]
        profile.notes = list(found.notes)
    vlmops.repack(models[STOCK])  # the copies share the caller's parameters: their packed weights go with them
    return profile


def _plain(model: nn.Module) -> nn.Module:
    """A stock copy on the same parameters."""
    copy = shared_copy(model)
    touched = any(original_class(m) is not None or KEY in m.__dict__ for m in copy.modules())
    return vlmops.unpatch_model(copy) if touched else copy


def _product_dtype(dtype: torch.dtype) -> torch.dtype:
    return dtype if dtype in (torch.float32, torch.bfloat16, torch.float16) else torch.float32


def _agreement(outputs: Mapping[str, Any], generate: int) -> str:
    """How the two outputs compare, in words; wrong ones of a forward raise."""
    if PATCHED not in outputs:
        return "stock alone"
    stock, patched = _main(outputs[STOCK]), _main(outputs[PATCHED])
    if generate:
        same = stock.shape == patched.shape and bool((stock == patched).all())
        return f"patched and stock generate {'the same' if same else 'different'} tokens"
    agrees(PATCHED, STOCK)({STOCK: stock, PATCHED: patched})
    return f"largest difference between the outputs {error(patched, stock):.2e}, largest value {stock.abs().max():.2e}"


def _main(output: Any) -> torch.Tensor:
    """The tensor that two runs are compared by."""
    for name in ("logits", "pooler_output", "last_hidden_state", "sequences"):
        found = getattr(output, name, None)
        if isinstance(found, torch.Tensor):
            return found
    return output if isinstance(output, torch.Tensor) else _main(output[0])


def _times(models: Mapping[str, nn.Module], job: _Job, steps: int) -> dict[str, list[float]]:
    """Seconds of steps without the profiler, interleaved."""
    found: dict[str, list[float]] = {name: [] for name in models}
    for turn in range(steps):
        for name in list(models) if turn % 2 == 0 else list(models)[::-1]:
            begin = time.perf_counter()
            job(models[name])
            found[name].append(time.perf_counter() - begin)
    return found


def _record(name: str, model: nn.Module, job: _Job, steps: int) -> Run:
    """A run's rows and trace."""
    with WorkSeen() as seen, torch.no_grad():
        job(model)
    activities = [torch.profiler.ProfilerActivity.CPU]
    if job.device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with annotated(model, nvtx=False, root=ROOT):
        with torch.profiler.profile(activities=activities):
            torch.ones(1, device=job.device)  # the profiler's own start-up
        with torch.profiler.profile(activities=activities, record_shapes=True, profile_memory=True) as profiler:
            begin = time.perf_counter()
            for _ in range(steps):
                job(model)
            clock = (time.perf_counter() - begin) / steps
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        text = path.read_bytes()
    trace = json.loads(text)
    run, shaped = account(trace, name, steps, job.device.type)
    run.clock = clock
    run.trace = gzip.compress(text, compresslevel=5)
    run.dots = _dots(run, shaped, seen)
    return run


def _dots(run: Run, shaped: Shaped, seen: WorkSeen) -> list[Dot]:
    """The ops of the run whose work was seen, longest first. On a GPU an op's time is that of its kernels."""
    timed = [
        (
            "op",
            row.name,
            row.detail,
            row.calls,
            row.gpu if run.kernels else row.seconds,
            seen.ops.get((row.name, row.detail)),
        )
        for row in run.ops
        if row.kind == "op"
    ]
    for (name, dims), (calls, seconds, gpu) in shaped.items():
        work = seen.stock.get((name, dims))
        timed.append(("stock", name, shapes(dims), calls, gpu if run.kernels else seconds, work))
    found = []
    for kind, name, detail, calls, seconds, work in timed:
        if work is not None and seconds > 0:
            times, cost = work
            found.append(Dot(name, detail, kind, calls, seconds / calls, cost.flops / times, cost.bytes / times))
    return sorted(found, key=lambda dot: -dot.calls * dot.seconds)[:MOST_DOTS]
