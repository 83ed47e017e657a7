"""The native CPU library: found in the package, or built once into the user's cache, then loaded into torch's dispatcher.

``VLMOPS_DISABLE_NATIVE=1`` turns it off. Nothing here is ever fatal: without a library the ``cpu`` backend is
unavailable, ``reason()`` says why, and one warning tells the user.
"""

from __future__ import annotations

import logging
import os
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path

import torch

from vlmops.backends import build
from vlmops.backends.cache_dir import cache_dir

__all__ = ["available", "define", "isa", "load", "reason"]

log = logging.getLogger("vlmops")

_SCHEMAS = torch.library.Library("vlmops_cpu", "FRAGMENT")
_defined: set[str] = set()
_lock = threading.RLock()
_state: str | None = None  # None: not tried; "": loaded; else why not


def define(schema: str) -> None:
    """Define ``vlmops_cpu::<schema>`` once in this process; csrc/cpu/bindings registers the implementation."""
    with _lock:
        name = schema.split("(", 1)[0]
        if name not in _defined:
            _defined.add(name)
            _SCHEMAS.define(schema)


define("isa() -> str")
define("num_threads() -> int")


def ahead_of_time() -> Path | None:
    """The library that ``pip install --no-build-isolation .`` built, if it was built against this torch."""
    folder = Path(__file__).resolve().parent.parent / "_native"
    library, stamp = folder / build.LIBRARY, folder / "torch-version"
    if library.is_file() and stamp.is_file() and stamp.read_text().strip() == torch.__version__:
        return library
    return None


def library_path(progress: Callable[[int, int], None] | None = None) -> Path:
    """The library's file, built first if there is none.

    Raises:
        build.BuildError: it cannot be built.
    """
    ready = ahead_of_time()
    if ready is not None and not build.sanitizers():
        return ready
    plan = build.plan()
    root = cache_dir() / "native"
    try:
        return build.build(plan, root, progress)
    except OSError as err:
        if isinstance(err, FileNotFoundError) and "ninja" in str(err):
            raise build.BuildError(str(err)) from err
        folder = Path(tempfile.gettempdir()) / f"vlmops-{os.getuid() if hasattr(os, 'getuid') else 'user'}"
        log.warning("vlmops: cache folder %s cannot be written (%s); building into %s", root, err, folder)
        folder.mkdir(mode=0o700, exist_ok=True)
        if hasattr(os, "getuid") and folder.stat().st_uid != os.getuid():
            raise build.BuildError(f"{folder} belongs to another user") from err
        return build.build(plan, folder, progress)


class _Progress:
    """One line on a terminal, one log record elsewhere."""

    def __init__(self) -> None:
        self.tty = sys.stderr.isatty()
        self.started = False

    def __call__(self, done: int, total: int) -> None:
        if self.tty:
            print(f"\rvlmops: building the CPU kernels ({done}/{total}, once per machine)", end="", file=sys.stderr, flush=True)
            if done == total:
                print(file=sys.stderr)
        elif not self.started:
            log.warning("vlmops: building the CPU kernels (%d files, once per machine)", total)
        self.started = True


def load() -> bool:
    """Load the library, building it at first use. True if its ops can be called. Tried once per process."""
    global _state
    if _state is not None:
        return _state == ""
    with _lock:
        if _state is None:
            _state = _try_load()
            if _state:
                log.warning("vlmops: the native CPU kernels are not available, plain PyTorch is used instead: %s", _state)
    return _state == ""


def _try_load() -> str:
    if os.environ.get("VLMOPS_DISABLE_NATIVE", "") not in ("", "0"):
        return "VLMOPS_DISABLE_NATIVE is set"
    if sys.platform not in ("linux", "darwin") or (sys.platform == "darwin" and not os.environ.get("CXX")):
        return f"no native build on {sys.platform} (set CXX to try on macOS)"
    try:
        path = library_path(_Progress())
    except (build.BuildError, OSError) as err:
        return str(err)
    try:
        torch.ops.load_library(str(path))
        return ""
    except OSError as err:
        first = str(err)
    # A file that does not load was damaged after it was built: build it again, once.
    try:
        path.unlink()
        path = library_path(_Progress())
        torch.ops.load_library(str(path))
        return ""
    except (build.BuildError, OSError) as err:
        return f"{first}; and after building again: {err}"


def available() -> bool:
    """Whether the native ops can be called (builds them at first use)."""
    return load()


def reason() -> str | None:
    """Why the native ops are not available; None if they are (or have not been tried)."""
    return _state or None


def isa() -> str:
    """The instruction set in use, e.g. "avx512_bf16"; "" without the library."""
    return str(torch.ops.vlmops_cpu.isa()) if load() else ""
