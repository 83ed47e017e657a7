"""What is checked: one table for each kind of op, every op and every option of its schema in it.

To add an op: write its cases into one of the modules below (or a new one, named in ``MODULES``). A test fails for an op without
a case, and for an option that no case sets.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Sequence
from functools import lru_cache

from vlmops.profiling.gpu_check.cases.case import Case

__all__ = ["MODULES", "Case", "all_cases", "find"]

MODULES = ("attention", "rows", "products", "pixels", "few_bits")


@lru_cache(maxsize=1)
def all_cases() -> tuple[Case, ...]:
    """Every case.

    Raises:
        ValueError: two cases of one name.
    """
    found: dict[str, Case] = {}
    for module in MODULES:
        for case in importlib.import_module(f"{__name__}.{module}").cases():
            if case.name in found:
                raise ValueError(f"two cases are called {case.name!r}")
            found[case.name] = case
    return tuple(found.values())


def find(name: str, among: Iterable[Case] | None = None) -> Case:
    """The case of this name; KeyError if there is none."""
    cases: Sequence[Case] = tuple(all_cases() if among is None else among)
    for case in cases:
        if case.name == name:
            return case
    raise KeyError(name)
