"""Arrays of other libraries (CuPy, NumPy, JAX) as arguments of the public ops, by DLPack: no copy."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

__all__ = ["accepts_arrays", "as_tensor"]

F = TypeVar("F", bound=Callable[..., Any])


def as_tensor(value: Any) -> Any:
    """A DLPack array as a tensor over the same memory, also inside lists and tuples; anything else as it is.

    Raises:
        BufferError: the array cannot be shared (read-only, of a dtype or on a device torch does not know).
    """
    if isinstance(value, (list, tuple)):
        found = [as_tensor(v) for v in value]
        return value if all(a is b for a, b in zip(found, value, strict=True)) else type(value)(found)
    return value if isinstance(value, Tensor) or not hasattr(value, "__dlpack__") else torch.from_dlpack(value)


def accepts_arrays(fn: F) -> F:
    """``fn`` that takes DLPack arrays wherever it takes tensors. What it returns are tensors: ``cupy.from_dlpack(out)``.

    A call with tensors pays for one more Python call only: arrays are looked for when ``fn``'s own checks have refused them.
    """

    @functools.wraps(fn)
    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            return fn(*args, **kwargs)
        except (TypeError, AttributeError):
            values = [*args, *kwargs.values()]
            found = [as_tensor(v) for v in values]
            if all(a is b for a, b in zip(found, values, strict=True)):
                raise
        return fn(*found[: len(args)], **dict(zip(kwargs, found[len(args) :], strict=True)))

    return cast(F, call)
