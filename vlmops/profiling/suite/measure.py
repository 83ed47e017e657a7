"""One group: everybody made ready and checked, then timed in the same rounds as the machine's two roofs."""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Any

import torch

import vlmops
from vlmops.backends import BackendError, ranges
from vlmops.profiling import annotate, memory
from vlmops.profiling.gpu_check.peak import SIDE
from vlmops.profiling.gpu_check.timing import Clock, CudaClock, interleave, rotating
from vlmops.profiling.peak import PEAK_WORK, peak_call
from vlmops.profiling.suite import peers
from vlmops.profiling.suite.cases import Case
from vlmops.profiling.suite.chosen import DTYPES, OURS, STACK, Chosen
from vlmops.profiling.suite.group import Candidate, LeftOut, Setting, first_line
from vlmops.profiling.suite.models import Model
from vlmops.profiling.suite.pinning import pinned
from vlmops.profiling.suite.row import COMPUTE, COPY, Row, describe
from vlmops.profiling.timing import Comparison, Work, compare, num_threads

__all__ = ["Measured", "group_name", "measure"]

COPY_BYTES = 64 << 20  # larger than the caches of most processors
GPU_COPY_BYTES = 1 << 30
GPU_SECONDS = 2.0  # of timing a group on a GPU
PAUSE = 6e-3  # between two candidates: gomp's threads spin about 4 ms before they sleep


@dataclass
class Measured:
    """What came out of a group.

    Args:
        group: its name.
        rows: candidate -> what was measured.
        failed: candidate -> what is wrong with its output.
        left_out: candidate -> why it was not measured.
        right: candidates whose output was right; without timing all there is.
    """

    group: str
    rows: dict[str, Row] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    right: list[str] = field(default_factory=list)


def group_name(case: Case | Model, dtype: str, chosen: Chosen) -> str:
    """ "linear: decoding, rows 1, width 1536, out 8960, fp32"."""
    return f"{case.what}: {case.label(chosen)}, {dtype}"


def measure(
    case: Case | Model, dtype: str, names: Sequence[str], chosen: Chosen, clock: Clock | None = None
) -> Measured:
    """Check and time the candidates of one group.

    Args:
        case: of a benchmark file.
        dtype: a name of ``DTYPES``.
        names: the candidates.
        chosen: options of the run.
        clock: of a GPU, for tests.
    """
    result = Measured(group_name(case, dtype, chosen))
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(vlmops.use_backend(chosen.backend))
        stack.enter_context(num_threads(chosen.threads))
        try:
            setting = case.build(dtype, chosen)
        except torch.OutOfMemoryError as err:
            result.left_out = dict.fromkeys(names, first_line(err))
            return result
        ready, took = _ready(setting, names, chosen, result)
        if ready and chosen.timed:
            found, roofs = _timed(case, ready, setting, result, chosen, clock)
            for name in result.failed:
                ready.pop(name, None)
            _describe(case, dtype, ready, took, setting, found, roofs, chosen, result)
        result.right = list(ready)
        del setting, ready
    peers.forget()  # the next group's graphs are of the same code
    gc.collect()
    return result


def _ready(
    setting: Setting, names: Sequence[str], chosen: Chosen, result: Measured
) -> tuple[dict[str, Candidate], dict[str, float]]:
    """The candidates that run, are right and not too slow, and how long making them ready took."""
    ready: dict[str, Candidate] = {}
    took: dict[str, float] = {}
    for name in names:
        begin = time.perf_counter()
        try:
            candidate = setting.make[name]()
            output = candidate.calls[0]()
        except (LeftOut, BackendError, torch.OutOfMemoryError) as err:
            result.left_out[name] = str(err) if isinstance(err, LeftOut) else first_line(err)
            continue
        except Exception as err:
            (result.failed if name in (OURS, STACK) else result.left_out)[name] = f"it raised {first_line(err)}"
            continue
        took[name] = time.perf_counter() - begin
        wrong = setting.check(name, output) if candidate.compared else ""
        del output
        if wrong:
            result.failed[name] = f"wrong output: {wrong}"
            continue
        begin = time.perf_counter()
        candidate.calls[0]()
        _synchronize(chosen)
        once = time.perf_counter() - begin
        if once > chosen.longest_call and chosen.timed:
            result.left_out[name] = (
                f"one call takes {once:.1f} s, longer than the {chosen.longest_call:g} s of this run"
            )
            continue
        ready[name] = candidate
    return ready, took


def _timed(
    case: Case | Model, ready: dict[str, Candidate], setting: Setting, result: Measured, chosen: Chosen, clock: Clock | None
) -> tuple[Comparison, dict[str, Work]]:  # fmt: skip
    """The group's rounds. Outputs are compared once more, those of the last call before the clock starts."""
    calls = {name: rotating(lambda call: call(), [(call,) for call in one.calls]) for name, one in ready.items()}
    roofs = _roofs(chosen, result.group)
    with _annotated(case, ready, chosen) as marked:
        calls = {name: marked(name, call) for name, call in calls.items()}
        calls.update({name: call for name, (call, _) in roofs.items()})
        works = {name: work for name, (_, work) in roofs.items()}
        if chosen.device == "cuda":
            clock = clock or CudaClock(torch.device(chosen.device))
            return interleave(calls, clock, seconds=GPU_SECONDS, least=chosen.rounds)[0], works

        def correct(outputs: dict[str, Any]) -> None:
            for name, one in ready.items():
                wrong = setting.check(name, outputs[name]) if one.compared else ""
                if wrong:
                    result.failed[name] = f"wrong output: {wrong}"

        with pinned(chosen.threads):
            return compare(calls, rounds=chosen.rounds, correct=correct, pause=PAUSE), works


def _roofs(chosen: Chosen, group: str) -> dict[str, tuple[Callable[[], Any], Work]]:
    """One large product in the group's dtype, and one large copy."""
    dtype = DTYPES[group.rsplit(", ", 1)[1]]
    if chosen.device == "cpu":
        return {COMPUTE: (peak_call(dtype), PEAK_WORK), COPY: (_copy("cpu", COPY_BYTES), Work(bytes=2.0 * COPY_BYTES))}
    n = SIDE[dtype]
    return {
        COMPUTE: (_product(chosen.device, dtype, n), Work(2.0 * n**3)),
        COPY: (_copy(chosen.device, GPU_COPY_BYTES), Work(bytes=2.0 * GPU_COPY_BYTES)),
    }


@lru_cache(maxsize=1)
def _copy(device: str, size: int) -> Callable[[], Any]:
    source = torch.ones(size // 4, dtype=torch.float32, device=device)
    return partial(torch.empty_like(source).copy_, source)


@lru_cache(maxsize=1)
def _product(device: str, dtype: torch.dtype, n: int) -> Callable[[], Any]:
    x, y = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    return lambda: x @ y


def _describe(
    case: Case | Model, dtype: str, ready: dict[str, Candidate], took: dict[str, float], setting: Setting,
    found: Comparison, roofs: dict[str, Work], chosen: Chosen, result: Measured,
) -> None:  # fmt: skip
    for name in result.failed:  # a wrong one is nobody's peer
        found.timings.pop(name, None)
    work, apart = setting.work(), setting.peak()
    for name, one in ready.items():
        row = Row(
            result.group, case.what, case.label(chosen), dtype, case.kind, name,
            chosen.device, found[name].seconds, backend=setting.backend() if name == OURS else "",
            precision=one.precision, note=one.note, prepare_seconds=took[name], peak_memory=_growth(one, chosen),
        )  # fmt: skip
        alone = apart.get(name)
        if isinstance(alone, int):
            row.process_peak_memory = alone
        elif alone:
            row.note = "; ".join(part for part in (row.note, f"no peak of its own process: {alone}") if part)
        result.rows[name] = describe(row, found, work, roofs)


def _growth(one: Candidate, chosen: Chosen) -> int | None:
    """Bytes that one more call needs at its peak; None where the system does not tell."""
    if one.keeps:
        return None
    if chosen.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        one.calls[0]()
        _synchronize(chosen)
        return int(torch.cuda.max_memory_allocated() - before)
    try:
        before = memory.settle()
        one.calls[0]()
        return max(0, memory.status("VmHWM") - before)
    except OSError:
        return None


def _synchronize(chosen: Chosen) -> None:
    if chosen.device == "cuda":
        torch.cuda.synchronize()


@contextlib.contextmanager
def _annotated(
    case: Case | Model, ready: dict[str, Candidate], chosen: Chosen
) -> Iterator[Callable[[str, Callable[[], Any]], Callable[[], Any]]]:
    """Gives a function that puts a call of a candidate into a range; without ``--nvtx`` it leaves it as it is.

    The range is a module's, "torch (linear)": a table by module then has the candidates.
    """
    if not chosen.nvtx:
        yield lambda name, call: call
        return
    with contextlib.ExitStack() as stack:
        for one in ready.values():
            if one.module is not None:
                stack.enter_context(annotate.annotated(one.module, nvtx=True, record=False))
        recorder = stack.enter_context(ranges.recording(nvtx=True, record=False))

        def marked(name: str, call: Callable[[], Any]) -> Callable[[], Any]:
            def run() -> Any:
                with recorder.range("module", f"{name} ({case.what})", case.label(chosen)):
                    return call()

            return run

        yield marked
