"""Timing one load: outputs and gradients checked first, candidates interleaved, shares of the measured peak by the op's cost."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

import vlmops
from vlmops.backends import BackendError, choice
from vlmops.ops._shared.cost import Cost
from vlmops.profiling import roofline
from vlmops.profiling.gpu_check import loads, parity
from vlmops.profiling.gpu_check.loads import Load
from vlmops.profiling.gpu_check.peak import Peaks
from vlmops.profiling.gpu_check.tasks import (
    DTYPES,
    Reason,
    Result,
    Task,
    argument_bytes,
    backends_here,
    first_line,
    missed,
    no_room,
)
from vlmops.profiling.gpu_check.timing import Clock, interleave, rotating
from vlmops.profiling.timing import Comparison
from vlmops.profiling.tolerance import judge

__all__ = ["cost_of", "timed", "warm"]

OURS, PLAIN = "vlmops", "vlmops torch"  # prefix of our backends; the plain-PyTorch one, a peer like the others
COPIES = 3
PEER_FACTOR = 4.0  # a peer may round differently: it is refused only where it computes something else


@dataclass
class Candidate:
    """Somebody who computes the same."""

    name: str
    call: Callable[..., Any]
    backend: str = "torch"  # forced around the call
    compared: bool = True
    wrong: str = ""

    @property
    def ours(self) -> bool:
        """Whether it is a kernel of ours, not plain PyTorch."""
        return self.name.startswith(OURS) and self.name != PLAIN


@dataclass
class Setting:
    """A load placed on the device."""

    load: Load
    dtype: torch.dtype
    copies: list[tuple[Any, Any]]
    candidates: list[Candidate]
    absent: dict[str, str] = field(default_factory=dict)

    @property
    def first(self) -> tuple[Any, Any]:
        """Arguments of the first copy."""
        return self.copies[0]


def cost_of(call: Callable[..., Any], args: Any, kwargs: Any) -> Cost | None:
    """What the op itself states it must move and compute for these arguments; None if it states nothing."""
    with vlmops.use_backend("torch"):
        return roofline.cost_of(lambda: call(*args, **kwargs))


def _setting(task: Task, device: torch.device) -> Setting:
    load = loads.find(task.case)
    dtype = DTYPES[task.dtype]
    made = load.arguments(task.tiny)
    copies = [parity.place(made, device, dtype) for _ in range(COPIES)]
    args, kwargs = copies[0]
    names = backends_here(load.op, task.device)
    candidates = [Candidate(f"{OURS} {name}", load.call, name) for name in names if name != "torch"]
    candidates.append(Candidate(PLAIN, load.call))
    setting = Setting(load, dtype, copies, candidates)
    for peer in load.peers(args, kwargs):
        if peer.missing:
            setting.absent[peer.name] = peer.missing
        else:
            candidates.append(Candidate(peer.name, peer.call, compared=peer.compared))
    return setting


def warm(task: Task) -> Result:
    """Run our kernels once, forward and backward: Triton's own cache then has every configuration."""
    device = torch.device(task.device)
    load, dtype = loads.find(task.case), DTYPES[task.dtype]
    args, kwargs = parity.place(load.arguments(task.tiny), device, dtype)
    for name in backends_here(load.op, task.device):
        if name != "torch":
            _outputs(load, Candidate(name, load.call, name), args, kwargs, None)
    return Result(task)


def _outputs(load: Load, who: Candidate, args: Any, kwargs: Any, grads: Sequence[Tensor] | None) -> tuple[Any, Any]:
    if grads is None:
        with vlmops.use_backend(who.backend), torch.no_grad():
            grads = parity.output_gradients(
                parity.tensors(who.call(*args, **kwargs)), args[0].dtype if args else torch.float32
            )
    return parity.run(who.call, args, kwargs, who.backend, grads)


def _oracle(setting: Setting, device: torch.device) -> tuple[str, list[Tensor], list[Tensor], list[Tensor]]:
    """Its name, outputs, gradients, and the gradients that went in: float64, or float32 where that does not fit.

    Raises:
        MemoryError: neither fits.
    """
    load = setting.load
    args, kwargs = setting.first
    grad_bytes = 6 * load.largest
    choices = [("reference, float64", "reference", torch.float64, 8)]
    if setting.dtype != torch.float32:
        choices.append(("torch, float32", "torch", torch.float32, 4))
    short = ""
    for name, backend, dtype, width in choices:
        short = no_room(device, grad_bytes * width + 8 * argument_bytes((args, kwargs)))
        if short:
            continue
        wide = parity.to_dtype((args, kwargs), dtype)
        with vlmops.use_backend(backend), torch.no_grad():
            grads = parity.output_gradients(parity.tensors(load.call(*wide[0], **wide[1])), setting.dtype)
        outs, found = parity.run(load.call, *wide, backend, grads)
        return name, [o.detach() for o in outs], found, grads
    raise MemoryError(short)


def _judge_all(setting: Setting, oracle: Sequence[Tensor], grads_in: Sequence[Tensor], device: torch.device) -> None:
    """Fill in ``wrong`` of every candidate; plain PyTorch first, whose error is the measure of the others'."""
    args, kwargs = setting.first
    order = sorted(setting.candidates, key=lambda who: who.name != PLAIN)
    plain: list[Tensor] | None = None
    for who in order:
        try:
            outs, grads = _outputs(setting.load, who, args, kwargs, grads_in)
            if device.type == "cuda":
                torch.cuda.synchronize()
        except BackendError as err:
            setting.absent[who.name], who.wrong = first_line(err), "cannot run"
            continue
        except Exception as err:
            if who.ours:
                who.wrong = f"{type(err).__name__}: {first_line(err)}"
            else:
                setting.absent[who.name], who.wrong = f"{type(err).__name__}: {first_line(err)}", "cannot run"
            continue
        found = [*outs, *grads]
        if not who.compared:
            continue
        if len(found) != len(oracle):
            who.wrong = f"{len(found)} results instead of {len(oracle)}"
            continue
        bad = []
        for i, (a, b) in enumerate(zip(found, oracle, strict=True)):
            judged = judge(a, None if plain is None else plain[i], b, f"result {i}", setting.dtype)
            if judged.error > judged.bound * (1.0 if who.ours or plain is None else PEER_FACTOR):
                bad.append(str(judged))
        who.wrong = "; ".join(bad)
        if who.name == PLAIN and not bad:
            plain = found


def timed(task: Task, clock: Clock) -> Result:
    """Forward, and forward with backward, of everybody whose results are right."""
    device = torch.device(task.device)
    load = loads.find(task.case)
    size = argument_bytes(load.arguments(task.tiny))  # float32: twice what 16-bit copies take
    short = no_room(device, (COPIES + 6) * size)
    if short:
        return missed(task, Reason.MEMORY, short)
    setting = _setting(task, device)
    result = Result(task)
    try:
        oracle_name, outs, grads, grads_in = _oracle(setting, device)
    except MemoryError as err:
        return missed(task, Reason.MEMORY, str(err))
    _judge_all(setting, [*outs, *grads], grads_in, device)
    has_grads = bool(grads)
    del outs, grads
    wrong = [
        f"{who.name}: {who.wrong}" for who in setting.candidates if who.ours and who.wrong and who.wrong != "cannot run"
    ]
    if wrong:
        result.status, result.reason, result.note = "failed", Reason.WRONG, " | ".join(wrong)
    for who in setting.candidates:
        if who.wrong and who.wrong != "cannot run" and not who.ours:
            setting.absent[who.name] = f"another result: {who.wrong}"
    right = [who for who in setting.candidates if not who.wrong]
    if not right:
        return result
    cost = cost_of(load.call, *setting.first)
    for direction in ("forward", "forward + backward") if has_grads else ("forward",):
        calls = {}
        for who in right:
            run = _forward if direction == "forward" else partial(_both, grads=grads_in)
            calls[who.name] = rotating(partial(run, who), setting.copies)
        found, host = interleave(calls, clock, seconds=task.seconds)
        row = describe(load, task.dtype, direction, found, host, cost, task.peaks)
        row.update(oracle=oracle_name, absent=setting.absent, tuned=task.tune)
        result.rows.append(row)
    choice.save()  # what a process measured is lost when it is killed
    return result


def _forward(who: Candidate, args: Any, kwargs: Any) -> Any:
    with vlmops.use_backend(who.backend), torch.no_grad():
        return who.call(*args, **kwargs)


def _both(who: Candidate, args: Any, kwargs: Any, grads: Sequence[Tensor]) -> Any:
    return parity.run(who.call, args, kwargs, who.backend, grads)


def describe(
    load: Load, dtype: str, direction: str, found: Comparison, host: dict[str, float], cost: Cost | None, peaks: Peaks | None
) -> dict[str, Any]:  # fmt: skip
    """A row of the report: times, ratios to each peer, and the share of the roofline of the fastest kernel of ours."""
    kernels = [name for name in found.timings if name.startswith(OURS) and name != PLAIN]
    best = min(kernels or [PLAIN] * (PLAIN in found.timings), key=lambda name: found[name].median, default=None)
    row: dict[str, Any] = {
        "op": load.op, "case": load.label, "dtype": dtype, "direction": direction, "ours": best,
        "times": {
            name: {"ms": t.median * 1e3, "spread": t.spread, "host_us": host[name] * 1e6, "rounds": len(t.seconds)}
            for name, t in found.timings.items()
        },
        "ratios": {}, "bytes": None, "flops": None, "gbytes": None, "gflops": None, "least_ms": None, "share": None,
        "limit": None,
    }  # fmt: skip
    if best is None:
        return row
    for name in found.timings:
        if name != best:
            ratio = found.speedup(best, name)
            row["ratios"][name] = {"value": ratio.value, "low": ratio.low, "high": ratio.high}
    if cost is None:
        return row
    seconds, flops = found[best].median, float(cost.flops)
    if direction == "forward":
        row.update(bytes=cost.bytes, gbytes=cost.bytes / seconds / 1e9)
    elif load.backward is None or not flops:
        return row  # limited by memory: what a backward must move depends on what was kept
    else:
        flops *= 1 + load.backward
    row.update(flops=flops, gflops=flops / seconds / 1e9)
    peak = None if peaks is None else peaks.flops.get(dtype)
    if peaks is None or (flops and not peak):
        return row
    memory = cost.bytes / peaks.bandwidth if direction == "forward" else 0.0
    compute = flops / peak if peak else 0.0
    row.update(least_ms=max(memory, compute) * 1e3, share=max(memory, compute) / seconds)
    row["limit"] = "memory" if memory >= compute else "compute"
    return row
