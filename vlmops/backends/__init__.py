"""Where a kernel may run: capability, forced and measured choice, native builds.

This package knows no operation. An operation hands it candidates (name -> callable) and a key, and gets a name back.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from contextvars import ContextVar

__all__ = ["BACKENDS", "BackendError", "LaunchError", "forced_backend", "use_backend"]

#: Every backend there can be. ``reference`` is the oracle and never chosen by ``auto``.
BACKENDS = ("reference", "torch", "cpu", "triton", "cuda")

_forced: ContextVar[str | None] = ContextVar("vlmops_backend", default=None)


class BackendError(RuntimeError):
    """A forced backend cannot run; the message says what is missing."""


class LaunchError(BackendError):
    """A backend that should have run failed to start; where it was not forced, another one takes over."""


def _checked(name: str) -> str:
    if name not in BACKENDS and name != "auto":
        raise ValueError(f"unknown backend {name!r}: expected 'auto' or one of {', '.join(BACKENDS)}")
    return name


def forced_backend() -> str | None:
    """The backend forced by ``use_backend`` or ``VLMOPS_BACKEND``; None means choose (``auto``)."""
    name = _forced.get()
    if name is None:
        name = os.environ.get("VLMOPS_BACKEND") or None
        if name is not None:
            _checked(name)
    return None if name == "auto" else name


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Force one backend for every op called inside the ``with`` block of this thread or task.

    Args:
        name: "reference", "torch", "cpu", "triton", "cuda", or "auto" to lift an outer force.

    A backward pass uses the backend its forward ran on, also after the block has ended.

    Raises:
        ValueError: the name is none of these. (A backend that cannot run raises ``BackendError`` at the first op.)
    """
    token = _forced.set(_checked(name))
    try:
        yield
    finally:
        _forced.reset(token)
