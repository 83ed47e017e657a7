"""A GPU's measured peaks for a report: two numbers, or the JSON that `vlmops gpu-check` wrote on that GPU."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlmops.profiling.nsight import names
from vlmops.profiling.nsight.errors import ProfileFileError
from vlmops.profiling.nsight.ncu import Peaks

__all__ = ["Measured", "flops", "given"]

NUMBERS = re.compile(r"\s*([\d.]+(?:e[+-]?\d+)?)\s*(?:,\s*([\d.]+(?:e[+-]?\d+)?)\s*)?", re.IGNORECASE)
HINT = "expected GB/s and TFLOP/s, as in 2900,620, GB/s alone, or the gpu-check.json of `vlmops gpu-check`"
MAX_BYTES = 64 << 20


@dataclass(frozen=True)
class Measured:
    """Peaks and where they are from.

    Args:
        peaks: bytes/s, and FLOP/s (of the fastest dtype that was measured).
        text: the same in words.
        gpu: on which they were measured; None: not told.
    """

    peaks: Peaks
    text: str
    gpu: str | None = None

    def notes(self, gpus: Sequence[str]) -> tuple[str, ...]:
        """What a report of a recording of these GPUs has to say of them."""
        found = (f"shares of bandwidth are of the peak that was given: {self.text}",)
        if self.gpu is None or not gpus or self.gpu in gpus:
            return found
        return (*found, f"that peak was measured on {self.gpu}, the recording is of {', '.join(dict.fromkeys(gpus))}")


def given(text: str) -> Measured:
    """The peaks of an option's value.

    Args:
        text: "2900,620" (GB/s, TFLOP/s), "2900" (GB/s), or a path.

    Raises:
        ValueError: neither.
        ProfileFileError: a file that is no result of gpu-check, or one without peaks.
        OSError: it cannot be opened.
    """
    numbers = NUMBERS.fullmatch(text)
    if numbers is not None:
        values = [_positive(number, text) for number in numbers.groups() if number is not None]
        peaks = Peaks(values[0] * 1e9, values[1] * 1e12 if len(values) > 1 else None)
        return Measured(peaks, _words(peaks))
    path = Path(text)
    if not path.is_file():
        raise ValueError(f"{text!r}: {HINT}")
    return _of_file(path)


def _positive(number: str, text: str) -> float:
    try:
        found = float(number)
    except ValueError as err:
        raise ValueError(f"{text!r}: {number!r} is no number; {HINT}") from err
    if not 0 < found < math.inf:
        raise ValueError(f"{text!r}: a peak is above 0; {HINT}")
    return found


def _words(peaks: Peaks, dtype: str = "") -> str:
    compute = "" if peaks.flops is None else f", {peaks.flops / 1e12:.4g} TFLOP/s{f' in {dtype}' if dtype else ''}"
    return f"{peaks.bandwidth / 1e9:.4g} GB/s{compute}"


def _of_file(path: Path) -> Measured:
    if path.stat().st_size > MAX_BYTES:
        raise ProfileFileError(path, f"more than {MAX_BYTES >> 20} MiB: {HINT}")
    try:
        data: Any = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as err:
        raise ProfileFileError(path, f"no JSON ({err}): {HINT}") from err
    if not isinstance(data, dict) or "peaks" not in data or not isinstance(data.get("machine"), dict):
        raise ProfileFileError(path, f"no result of gpu-check: {HINT}")
    found = data["peaks"]
    if found is None:
        raise ProfileFileError(path, "gpu-check measured no peak there: it ran without a GPU")
    try:
        bandwidth, rates = float(found["bandwidth"]), {str(k): float(v) for k, v in found["flops"].items()}
    except (KeyError, TypeError, ValueError, AttributeError) as err:
        raise ProfileFileError(path, f"its peaks are not those of gpu-check: {HINT}") from err
    if not all(0 < rate < math.inf for rate in (bandwidth, *rates.values())):
        raise ProfileFileError(path, "a peak that is not above 0")
    dtype = max(rates, key=lambda name: rates[name], default="")
    gpu = data["machine"].get("gpu")
    peaks = Peaks(bandwidth, rates.get(dtype))
    name = names.clean(gpu) if isinstance(gpu, str) else None
    return Measured(peaks, f"{_words(peaks, names.clean(dtype))} ({path.name}{f', {name}' if name else ''})", name)


def flops(texts: Sequence[str]) -> dict[str, float]:
    """Kernel -> FLOPs of one launch, from "kernel=1.2e12".

    Raises:
        ValueError: another form.
    """
    found = {}
    for text in texts:
        kernel, equals, number = text.rpartition("=")
        try:
            value = float(number)
        except ValueError:
            value = 0.0
        if not kernel or not equals or not 0 < value < math.inf:
            raise ValueError(f"{text!r}: expected KERNEL=FLOPS of one launch, as in gemm_kernel=1.2e12")
        found[kernel] = value
    return found
