"""A line on a terminal while something takes long; nothing where nobody looks."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, TypeVar

__all__ = ["progress"]

T = TypeVar("T")


def progress(what: str, run: Callable[..., T], *args: Any, **kwargs: Any) -> T:
    """run(*args, **kwargs), with a spinner that says ``what`` if standard error is a terminal."""
    if not sys.stderr.isatty():
        return run(*args, **kwargs)
    from rich.console import Console

    with Console(stderr=True).status(f"vlmops: {what}"):
        return run(*args, **kwargs)
