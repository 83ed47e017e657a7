"""Interleaved timing in one process: what a speed-up may be claimed from.

Every round runs every candidate once, in an order that rotates, so that drift of the clock, the heat and the neighbours
falls on all alike. A candidate's figure is the median of its rounds; a ratio is that of two medians, with a bootstrap
interval over whole rounds. Outputs are compared before anything is timed.
"""

from __future__ import annotations

import contextlib
import gc
import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from vlmops.profiling.tolerance import EPS

__all__ = [
    "MIN_ROUNDS",
    "Comparison",
    "Ratio",
    "Timing",
    "Work",
    "WrongOutputError",
    "agrees",
    "bootstrap_ratio",
    "compare",
    "num_threads",
]

MIN_ROUNDS = 7
SAMPLE_SECONDS = 2e-3  # a sample shorter than this is repeated inside its timer, so that the clock's grain is below 1%
RESAMPLES = 2000


class WrongOutputError(AssertionError):
    """A candidate's output is wrong: there is no speed to report."""


@dataclass(frozen=True)
class Work:
    """What one call has to do at least: floating-point operations and bytes moved (0 where it does not matter)."""

    flops: float = 0.0
    bytes: float = 0.0


@dataclass(frozen=True)
class Ratio:
    """A ratio of medians with its 95% bootstrap interval.

    Args:
        value, low, high: the ratio and its interval.
        numerator, denominator: one value a round; value = scale * median(numerator) / median(denominator).
        scale: constant factor.
    """

    value: float
    low: float
    high: float
    numerator: tuple[float, ...] = field(default=(), repr=False, compare=False)
    denominator: tuple[float, ...] = field(default=(), repr=False, compare=False)
    scale: float = field(default=1.0, repr=False, compare=False)

    def __str__(self) -> str:
        return f"{self.value:.2f}x [{self.low:.2f}, {self.high:.2f}]"


@dataclass(frozen=True)
class Timing:
    """One candidate's times.

    Args:
        name: the candidate.
        seconds: one time a round, for one call.
    """

    name: str
    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """Median, in seconds."""
        return statistics.median(self.seconds)

    @property
    def iqr(self) -> float:
        """Interquartile range in seconds: half of the rounds lie inside it. 0 for a single round."""
        if len(self.seconds) < 2:
            return 0.0
        first, _, third = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return third - first

    @property
    def spread(self) -> float:
        """Interquartile range over median."""
        return self.iqr / self.median

    def gflops(self, work: Work) -> float:
        """Rate in GFLOP/s."""
        return work.flops / self.median / 1e9

    def gbytes(self, work: Work) -> float:
        """Rate in GB/s (1e9 bytes)."""
        return work.bytes / self.median / 1e9


def bootstrap_ratio(
    numerator: Sequence[float], denominator: Sequence[float], scale: float = 1.0, seed: int = 0
) -> Ratio:
    """scale * median(numerator) / median(denominator), with the interval that resampled rounds give.

    Args:
        numerator, denominator: times of the same rounds, in the same order. A round is drawn as a whole: a slow
            moment of the machine hits both of its times, and must not widen their ratio.
        scale: constant factor, e.g. a ratio of FLOPs when rates are compared.
        seed: of the resampling.

    Raises:
        ValueError: different or zero lengths.
    """
    rounds = len(numerator)
    if rounds == 0 or rounds != len(denominator):
        raise ValueError(f"numerator and denominator: expected the same rounds, got {rounds} and {len(denominator)}")
    rng = random.Random(seed)
    ratios = []
    for _ in range(RESAMPLES if rounds > 1 else 1):
        pick = rng.choices(range(rounds), k=rounds) if rounds > 1 else [0]
        ratios.append(statistics.median(numerator[i] for i in pick) / statistics.median(denominator[i] for i in pick))
    ratios.sort()
    value = statistics.median(numerator) / statistics.median(denominator)
    low, high = ratios[int(0.025 * (len(ratios) - 1))], ratios[int(0.975 * (len(ratios) - 1) + 0.5)]
    return Ratio(scale * value, scale * low, scale * high, tuple(numerator), tuple(denominator), scale)


@dataclass
class Comparison:
    """Candidates timed in the same rounds."""

    timings: dict[str, Timing] = field(default_factory=dict)
    threads: int = 1

    def __getitem__(self, name: str) -> Timing:
        return self.timings[name]

    def speedup(self, name: str, peer: str) -> Ratio:
        """How many times as fast as ``peer`` this candidate is: above 1 is faster."""
        return bootstrap_ratio(self[peer].seconds, self[name].seconds)

    def share(self, name: str, work: Work, peak: str, peak_work: Work) -> Ratio:
        """FLOP rate of ``name`` over that of the candidate ``peak`` (which does ``peak_work``) in the same rounds."""
        return bootstrap_ratio(self[peak].seconds, self[name].seconds, scale=work.flops / peak_work.flops)


@contextlib.contextmanager
def num_threads(threads: int | None) -> Iterator[int]:
    """torch's thread count inside the block; None leaves it."""
    before = torch.get_num_threads()
    try:
        if threads is not None and threads != before:
            torch.set_num_threads(threads)
        yield torch.get_num_threads()
    finally:
        if torch.get_num_threads() != before:
            torch.set_num_threads(before)


def _time(run: Callable[[], Any], calls: int) -> float:
    begin = time.perf_counter()
    for _ in range(calls):
        run()
    return (time.perf_counter() - begin) / calls


def compare(
    candidates: Mapping[str, Callable[[], Any]],
    *,
    rounds: int = MIN_ROUNDS,
    warmup: int = 1,
    threads: int | None = None,
    correct: Callable[[dict[str, Any]], Any] | None = None,
    sample_seconds: float = SAMPLE_SECONDS,
    pause: float = 0.0,
    progress: Callable[[int, int], None] | None = None,
) -> Comparison:
    """Time candidates against each other, interleaved, after their outputs were found right.

    Args:
        candidates: name -> a call without arguments that does the work and returns its result.
        rounds: times each candidate is timed, at least ``MIN_ROUNDS``.
        warmup: untimed runs of each, at least 1 (the first run packs weights, measures choices, builds code).
        threads: torch threads for all of them; None: as it is.
        correct: gets name -> output of the last warm-up run; raises or returns False where one is wrong.
        sample_seconds: a shorter call is repeated inside its timer until a sample is about this long.
        pause: seconds of sleep before each sample: another library's idle threads spin some ms before they sleep, on the
            cores of whoever is timed next.
        progress: called with (rounds done, rounds).

    Returns:
        The times, one a round for each candidate.

    Raises:
        ValueError: no candidates, too few rounds, no warm-up.
        WrongOutputError: ``correct`` refused an output.
    """
    if not candidates:
        raise ValueError("candidates: expected at least one")
    if rounds < MIN_ROUNDS:
        raise ValueError(f"rounds: expected at least {MIN_ROUNDS}, got {rounds}")
    if warmup < 1:
        raise ValueError(f"warmup: expected at least 1, got {warmup}")
    names = list(candidates)
    with num_threads(threads) as used, torch.no_grad():
        outputs, calls = {}, {}
        for name in names:
            for _ in range(warmup):  # the last one tells how long a call is
                begin = time.perf_counter()
                outputs[name] = candidates[name]()
                took = time.perf_counter() - begin
            calls[name] = max(1, round(sample_seconds / max(took, 1e-7)))
        if correct is not None and correct(outputs) is False:
            raise WrongOutputError(f"wrong output among {', '.join(names)}")
        del outputs
        times: dict[str, list[float]] = {name: [] for name in names}
        collecting = gc.isenabled()
        gc.collect()
        gc.disable()
        try:
            for done in range(rounds):
                first = done % len(names)  # nobody always runs right after the same neighbour
                for name in names[first:] + names[:first]:
                    time.sleep(pause)
                    times[name].append(_time(candidates[name], calls[name]))
                if progress is not None:
                    progress(done + 1, rounds)
        finally:
            if collecting:
                gc.enable()
    for name, found in times.items():
        if min(found) <= 0:
            raise RuntimeError(f"{name}: the clock did not advance; a time of 0 is no measurement")
    return Comparison({name: Timing(name, tuple(found)) for name, found in times.items()}, used)


# -- right outputs -----------------------------------------------------------------------------------------------------


def agrees(name: str, peer: str, oracle: Tensor | None = None) -> Callable[[dict[str, Any]], None]:
    """A ``correct`` for ``compare``: max|name - oracle| <= 2 max|peer - oracle| + floor.

    Args:
        name: the candidate that is checked.
        peer: plain torch at the same precision.
        oracle: the result at a higher precision. None: the peer is taken as the truth and 1e-3 (float32) or 3e-2
            (16 bits) of its largest value as the bound, for whole models, where errors have grown through layers.

    Raises (the returned function):
        WrongOutputError: shapes differ, a value is not finite, all are zero, or the error is above the bound.
    """

    def check(outputs: dict[str, Any]) -> None:
        out, theirs = _tensor(outputs[name]), _tensor(outputs[peer])
        if out.shape != theirs.shape:
            raise WrongOutputError(f"{name}: shape {list(out.shape)}, but {peer} gives {list(theirs.shape)}")
        if not bool(out.isfinite().all()):
            raise WrongOutputError(f"{name}: not every value is finite")
        if not bool(out.any()):
            raise WrongOutputError(f"{name}: all zeros, nothing was computed")
        truth = theirs if oracle is None else oracle
        size = float(truth.abs().max())
        mine = error(out, truth)
        if oracle is None:
            bound = (1e-3 if out.dtype in (torch.float32, torch.float64) else 3e-2) * size
        else:
            bound = 2 * error(theirs, truth) + EPS[out.dtype] * max(1.0, size)
        if not mine <= bound:
            raise WrongOutputError(
                f"{name}: largest error {mine:.3e} is above {bound:.3e} (peer {peer}, scale {size:.2e})"
            )

    return check


def error(x: Tensor, truth: Tensor) -> float:
    """Largest absolute difference (float32 at least)."""
    wide = torch.promote_types(torch.promote_types(x.dtype, truth.dtype), torch.float32)
    return float((x.to(wide) - truth.to(wide)).abs().max())


def _tensor(output: Any) -> Tensor:
    """The first tensor of an output: a tensor, a tuple, or a model output."""
    if isinstance(output, Tensor):
        return output
    for name in ("pooler_output", "last_hidden_state", "logits"):
        found = getattr(output, name, None)
        if isinstance(found, Tensor):
            return found
    return _tensor(output[0])
