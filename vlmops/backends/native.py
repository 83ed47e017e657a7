"""The native CPU library: found in the package, or built once into the user's cache, then loaded into torch's dispatcher.

``VLMOPS_DISABLE_NATIVE=1`` turns it off. Nothing here is ever fatal: without a library the ``cpu`` backend is
unavailable, ``reason()`` says why, and one warning tells the user.
"""

from __future__ import annotations

import contextlib
import logging
import os
import stat
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path

import torch

from vlmops.backends import build
from vlmops.backends.cache_dir import cache_dir

__all__ = ["available", "build_key", "define", "isa", "lib", "load", "reason"]

log = logging.getLogger("vlmops")

_SCHEMAS = torch.library.Library("vlmops_cpu", "FRAGMENT")  # its schemas live as long as this object
_defined: set[str] = set()
_lock = threading.RLock()
_state: str | None = None  # None: not tried; "": loaded; else why not
_key = ""


def define(schema: str) -> None:
    """Define ``vlmops_cpu::<schema>`` once in this process; csrc/cpu/bindings registers the implementation."""
    with _lock:
        name = schema.split("(", 1)[0]
        if name not in _defined:
            _defined.add(name)
            _SCHEMAS.define(schema)


def lib() -> torch.library.Library:
    """The namespace ``vlmops_cpu``: what ``define`` has put into it, for more registrations (a fake, a fallback)."""
    return _SCHEMAS


define("isa() -> str")
define("num_threads() -> int")


def ahead_of_time() -> Path | None:
    """The library that ``pip install --no-build-isolation .`` built, if it is whole and was built against this torch."""
    folder = Path(__file__).resolve().parent.parent / "_native"
    usable = not build.sanitizers() and build.intact(folder, torch.__version__)
    return folder / build.LIBRARY if usable else None


def _private_folder() -> Path:
    """A folder in the temporary directory that nobody else can have prepared: code is loaded from it."""
    user = os.getuid()
    folder = Path(tempfile.gettempdir()) / f"vlmops-{user}"
    folder.mkdir(mode=0o700, exist_ok=True)
    facts = folder.lstat()
    if not stat.S_ISDIR(facts.st_mode) or facts.st_uid != user or facts.st_mode & 0o022:
        raise build.BuildError(f"{folder} is not a folder that only this user can write")
    return folder


def cached(progress: Callable[[int, int], None] | None = None) -> Path:
    """The library in the user's cache, built first if it is not there.

    Raises:
        build.BuildError: it cannot be built.
    """
    return in_cache(build.plan(), "native", progress)


def in_cache(plan: build.Recipe, kind: str, progress: Callable[[int, int], None] | None = None) -> Path:
    """What ``plan`` builds, from the user's cache (a temporary folder where that cannot be written), built first if need be.

    Raises:
        build.BuildError: it cannot be built.
    """
    try:
        return build.build(plan, cache_dir() / kind, progress)
    except build.BuildError:
        raise
    except (OSError, RuntimeError) as err:  # RuntimeError: no home folder
        folder = _private_folder()
        log.warning("vlmops: the cache folder cannot be written (%s); using %s instead", err, folder)
        return build.build(plan, folder, progress)


class Progress:
    """One line on a terminal, one log record elsewhere."""

    def __init__(self, what: str = "the CPU kernels") -> None:
        self.what = what
        self.tty = sys.stderr.isatty()
        self.started = False

    def __call__(self, done: int, total: int) -> None:
        if self.tty:
            print(
                f"\rvlmops: building {self.what} ({done}/{total}, once per machine)",
                end="",
                file=sys.stderr,
                flush=True,
            )
        elif not self.started:
            log.warning("vlmops: building %s (%d files, once per machine)", self.what, total)
        self.started = True

    def close(self) -> None:
        if self.tty and self.started:
            print(file=sys.stderr)


def disabled() -> str:
    """Why the user does not want native code; empty if nobody said so."""
    return "VLMOPS_DISABLE_NATIVE is set" if os.environ.get("VLMOPS_DISABLE_NATIVE", "") not in ("", "0") else ""


def load() -> bool:
    """Load the library, building it at first use. True if its ops can be called. Tried once per process."""
    global _state
    if _state is None:
        with _lock:
            if _state is None:
                _state = _try_load()  # assigned once and last: other threads read it without the lock
    return _state == ""


def _try_load() -> str:
    """Empty once the library is loaded, else why not."""
    why_not = disabled()
    if why_not:  # asked for: nothing to warn about
        return why_not
    try:
        _load()
        _check_cap()
        return ""
    except Exception as err:  # whatever it is, the torch backend still works
        why_not = str(err) or repr(err)
        log.warning("vlmops: the native CPU kernels are not available, plain PyTorch is used instead: %s", why_not)
        return why_not


def _check_cap() -> None:
    """Say so where VLMOPS_CPU_ISA names no set that this machine has: a typing error would be a wrong measurement."""
    cap = os.environ.get("VLMOPS_CPU_ISA", "")
    if cap:
        used = str(torch.ops.vlmops_cpu.isa())
        if used != cap:
            log.warning(
                "vlmops: VLMOPS_CPU_ISA=%s is no instruction set of this machine's build: %s is used", cap, used
            )


def _load() -> None:
    """Load the library built ahead of time, else the cached one; raises what stands in the way."""
    if sys.platform not in ("linux", "darwin") or (sys.platform == "darwin" and not os.environ.get("CXX")):
        raise build.BuildError(f"no native build on {sys.platform} (set CXX to try on macOS)")
    if "address" in build.sanitizers() and "asan" not in os.environ.get("LD_PRELOAD", ""):
        # loading it without would end the process
        raise build.BuildError("VLMOPS_NATIVE_SANITIZE=address needs libasan in LD_PRELOAD (`make test-asan` does it)")
    global _key
    ready = ahead_of_time()
    if ready is not None:
        try:
            torch.ops.load_library(str(ready))
            _key = build.key_of(ready.parent)
            return
        except OSError as err:  # built on another kind of system: build for this one
            log.info("vlmops: %s does not load here (%s)", ready, err.__cause__ or err)
    with contextlib.closing(Progress()) as progress:
        path = cached(progress)
    try:
        torch.ops.load_library(str(path))
    except OSError as err:  # whole, as its checksum says: building it again would give the same
        raise build.BuildError(f"{err.__cause__ or err} (delete {path.parent} to build it again)") from err
    _key = build.key_of(path.parent)


def available() -> bool:
    """Whether the native ops can be called (builds them at first use)."""
    return load()


def reason() -> str | None:
    """Why the native ops are not available; None if they are (or have not been tried)."""
    return _state or None


def isa() -> str:
    """The instruction set in use, e.g. "avx512_bf16"; "" without the library."""
    return str(torch.ops.vlmops_cpu.isa()) if load() else ""


def build_key() -> str:
    """What the library in use was built from (sources, flags, compiler, torch), as a hash; "" without one."""
    return _key if load() else ""
