"""Measured choice between backends, remembered in a versioned JSON file.

The first call with a new key times the candidates on the real arguments: ``LEAST_RUNS`` runs each, more of short ones,
fewer where they take over ``BUDGET_S`` seconds. The plain-PyTorch candidate wins ties, so a choice is never slower than
PyTorch beyond noise.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import logging
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextvars import ContextVar
from functools import lru_cache
from math import inf
from pathlib import Path
from typing import Any

import torch

from vlmops.backends import native
from vlmops.backends.cache_dir import cache_dir

__all__ = ["cache_path", "decide", "forget", "machine_key", "measured", "rehearse", "tuning_enabled", "watch"]

log = logging.getLogger("vlmops")

FORMAT = 1
LEAST_RUNS, MAX_RUNS = 3, 15
ENOUGH_S = 5e-3  # after this much measuring, LEAST_RUNS will do: the clock's own grain no longer matters
BUDGET_S = 0.05  # per key, over all candidates, beyond the first (warm) run of each
EVICT_BYTES = 16 << 20
TIE = 0.98  # a kernel must beat plain PyTorch by 2% to be chosen: below that it is noise

_lock = threading.Lock()
_table: dict[str, dict[str, Any]] | None = None
_dirty = False
_watched: ContextVar[list[str] | None] = ContextVar("vlmops_watched_keys", default=None)
_rehearsal: ContextVar[dict[str, bool] | None] = ContextVar("vlmops_rehearsal", default=None)


def tuning_enabled() -> bool:
    """False with ``VLMOPS_TUNING=off``: then a fixed order picks, the same on every run and rank."""
    return os.environ.get("VLMOPS_TUNING", "on").lower() not in ("off", "0", "false")


def cache_path() -> Path:
    """The file; it need not exist."""
    return cache_dir() / f"tuning-v{FORMAT}.json"


def _versions(*packages: str) -> list[str]:
    from importlib.metadata import PackageNotFoundError, version

    found = []
    for package in packages:
        with contextlib.suppress(PackageNotFoundError):
            found.append(f"{package}-{version(package)}")
    return found


@lru_cache(maxsize=32)
def machine_key(device: torch.device) -> str:
    """What a choice measured on this device depends on beside its own key; no driver, no clock, no host.

    A GPU: its name and the versions of torch, triton and vlmops. A CPU: its name, the versions and (in ``_section``) the
    build of the native kernels and the number of threads. Two equal GPUs share their choices, two different ones in one
    machine do not.
    """
    from vlmops.backends.machine import cpu_model
    from vlmops.version import __version__

    versions = [f"torch-{torch.__version__}", f"vlmops-{__version__}"]
    if device.type == "cuda":
        return "|".join((torch.cuda.get_device_name(device), *versions, *_versions("triton")))
    return "|".join((cpu_model(), *versions))


def _section(device: torch.device) -> str:
    if device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        return machine_key(torch.device("cuda", index))
    kernels = native.build_key()[:12] or "none"  # other kernels, other choices
    return f"{machine_key(torch.device('cpu'))}|native-{kernels}|threads-{torch.get_num_threads()}"


def _load() -> dict[str, dict[str, Any]]:
    global _table
    if _table is None:
        _table = _read()
    return _table


def _read() -> dict[str, dict[str, Any]]:
    try:
        data = json.loads(cache_path().read_text())
        table = data["choices"] if data.get("format") == FORMAT else {}
        if not all(isinstance(section, dict) for section in table.values()):
            raise TypeError("a section is not a table")
        return dict(table)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as err:
        log.warning("vlmops: tuning cache %s cannot be read (%s); it will be rebuilt", cache_path(), err)
        return {}


def save() -> None:
    """Write new choices to the cache file, merged with what other processes wrote; a read-only folder is no error."""
    global _dirty
    with _lock:
        if not _dirty or _table is None:
            return
        _dirty = False
        merged = _read()
        for section, rows in _table.items():
            merged.setdefault(section, {}).update(rows)
        with contextlib.suppress(OSError):
            cache_path().parent.mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(dir=cache_path().parent, prefix=".tuning-")
            with os.fdopen(handle, "w") as out:
                json.dump({"format": FORMAT, "choices": merged}, out, indent=1, sort_keys=True)
            os.replace(name, cache_path())


atexit.register(save)


def measured(device: torch.device | None = None) -> dict[str, Any]:
    """The remembered choices of a device (None: of this machine's processor): key -> {"choice": name, "ms": {name: median}}."""
    with _lock:
        return dict(_load().get(_section(device or torch.device("cpu")), {}))


@contextlib.contextmanager
def watch() -> Iterator[list[str]]:
    """Inside the block every key that a choice is asked for is listed."""
    seen: list[str] = []
    token = _watched.set(seen)
    try:
        yield seen
    finally:
        _watched.reset(token)


@contextlib.contextmanager
def rehearse() -> Iterator[dict[str, bool]]:
    """Inside the block nothing is measured: yields key -> whether it is remembered already, in the order asked for."""
    seen: dict[str, bool] = {}
    token = _rehearsal.set(seen)
    try:
        yield seen
    finally:
        _rehearsal.reset(token)


def forget() -> None:
    """Drop the in-memory table (tests, or after the cache folder was moved)."""
    global _table, _dirty
    with _lock:
        _table, _dirty = None, False


def _timed(run: Callable[[], Any], device: torch.device) -> float:
    if device.type == "cuda":
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


def _evict() -> None:
    """Push what a candidate left in the processor's caches out of them, as the rest of a model does between two calls."""
    torch.empty(EVICT_BYTES, dtype=torch.uint8).fill_(1)


def _measure(candidates: Mapping[str, Callable[[], Any]], device: torch.device, cold: bool = False) -> dict[str, float]:
    """Interleaved best-of times in seconds. A candidate that raises is left out (and said once)."""
    best: dict[str, float] = {}
    alive = dict(candidates)
    with torch.no_grad():
        for name in list(alive):  # first run: builds, packs, warms the caches; not counted
            try:
                alive[name]()
            except Exception as err:  # a broken candidate must not break the user's call
                log.warning("vlmops: backend %s failed while being measured: %s", name, err)
                del alive[name]
        spent = 0.0
        for done in range(1, MAX_RUNS + 1):
            for name, run in alive.items():
                if cold:
                    _evict()
                took = _timed(run, device)
                best[name] = min(took, best.get(name, took))
                spent += took
            if spent > BUDGET_S or (done >= LEAST_RUNS and spent > ENOUGH_S):
                break
    return best


def decide(
    op: str,
    key: str,
    candidates: Mapping[str, Callable[[], Any]],
    order: Iterable[str],
    device: torch.device,
    *,
    cold: bool = False,
    least_gain: float = 0.0,
) -> str:
    """Name of the candidate to use for this key: remembered, else measured now, else the first of ``order``.

    Args:
        op: operation name.
        key: everything its speed depends on (dtype, heads, head_dim, bucketed lengths, options).
        candidates: name -> a call without arguments that runs the op on the real arguments, no side effects.
        order: fixed preference, used when tuning is off or nothing could be measured.
        device: where the tensors live.
        cold: empty the processor's caches before every run. For candidates that differ in how much Python they run: in
            a loop that costs a third of what it costs between other modules.
        least_gain: seconds by which a candidate must beat "torch" to be chosen.
    """
    global _dirty
    order = [name for name in order if name in candidates]
    if len(order) == 1 or not tuning_enabled() or (device.type == "cuda" and torch.cuda.is_current_stream_capturing()):
        return order[0]
    full = f"{op}:{device.type}:{key}"
    section = _section(device)
    with _lock:
        row = _load().get(section, {}).get(full)
    known = str(row["choice"]) if isinstance(row, dict) and row.get("choice") in candidates else None
    watched, rehearsal = _watched.get(), _rehearsal.get()
    if watched is not None:
        watched.append(full)
    if rehearsal is not None:
        rehearsal.setdefault(full, known is not None)
        return known or order[0]
    if known is not None:
        return known
    times = _measure({name: candidates[name] for name in order}, device, cold)
    if not times:
        return order[0]
    choice = min(times, key=lambda name: times[name])
    plain = times.get("torch", inf)
    if choice != "torch" and times[choice] > min(TIE * plain, plain - least_gain):
        choice = "torch"
    with _lock:
        _load().setdefault(section, {})[full] = {
            "choice": choice,
            "ms": {name: round(t * 1e3, 4) for name, t in times.items()},
        }
        _dirty = True
    return choice
