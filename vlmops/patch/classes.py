"""Classes a patched module gets: a subclass of its own class, made on demand, that pickle can find again.

``__name__`` stays the original's (transformers compares names in ``_no_split_modules``); ``__qualname__`` is
``kind|module|path|Class`` in this module, where the module ``__getattr__`` makes it again when a pickled model is
loaded.
"""

from __future__ import annotations

import importlib
from functools import cache
from typing import Any

from torch import nn

from vlmops.patch.base import PLAIN

__all__ = ["MIXINS", "original_class", "patched_class"]

#: kind -> its fused forward; ``vlmops.patch.api`` fills it.
MIXINS: dict[str, type] = {}


@cache
def patched_class(kind: str, original: type[nn.Module]) -> type[nn.Module]:
    """``original`` with the fused forward of ``kind`` in front of it: same class object every time.

    Raises:
        ValueError: the class cannot be found again by name (nested or local), so a pickled model could not be loaded.
    """
    try:
        found: Any = getattr(importlib.import_module(original.__module__), original.__name__, None)
    except ImportError:
        found = None
    if found is not original:
        raise ValueError(f"{original.__module__}.{original.__qualname__} cannot be imported by its name")
    qualname = "|".join((kind, *original.__module__.split("."), original.__name__))
    body = {"__module__": __name__, "__qualname__": qualname, "__doc__": original.__doc__}
    cls = type(original.__name__, (MIXINS[kind], original), body)
    cls.__qualname__ = qualname
    if kind == "linear" and original is nn.Linear:
        PLAIN.add(cls)
    return cls


def original_class(module: nn.Module) -> type[nn.Module] | None:
    """What a module's class was before patching; None if it is not one of ours."""
    cls = type(module)
    if cls.__module__ != __name__ or "|" not in cls.__qualname__:
        return None
    return cls.__bases__[1]


def __getattr__(name: str) -> Any:
    kind, _, rest = name.partition("|")
    if not rest:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    *path, cls = rest.split("|")
    return patched_class(kind, getattr(importlib.import_module(".".join(path)), cls))
