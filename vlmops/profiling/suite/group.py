"""What a group of peers is made of, whoever they are: candidates on the same work, a check, and reasons for who is not there."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from vlmops.profiling.timing import Work

__all__ = ["Candidate", "LeftOut", "Setting", "first_line"]


class LeftOut(Exception):
    """A candidate cannot be measured here; the message says why."""


@dataclass
class Candidate:
    """Somebody ready to run.

    Args:
        calls: does the work, once for each copy of the buffers (one on a CPU).
        precision: it computes in, where that is not the group's.
        note: what else a reader has to know.
        keeps: its memory between calls, so that the growth in a call says nothing of it.
        compared: whether its output has to be the group's.
        module: what ranges are put around in a run with ``--nvtx``.
    """

    calls: list[Callable[[], Any]]
    precision: str = ""
    note: str = ""
    keeps: bool = False
    compared: bool = True
    module: nn.Module | None = None


@dataclass
class Setting:
    """A group with its tensors made.

    Args:
        make: name -> makes the candidate ready (compiles, converts), or raises ``LeftOut``.
        check: (name, output) -> what is wrong with it, "" if nothing.
        work: least work of one call.
        backend: which of our backends ran, in words; called after our first call.
        peak: peak memory of candidates measured in processes of their own: () -> name -> bytes, or a reason.
    """

    make: Mapping[str, Callable[[], Candidate]]
    check: Callable[[str, Any], str]
    work: Callable[[], Work]
    backend: Callable[[], str] = lambda: ""
    peak: Callable[[], dict[str, int | str]] = field(default=dict)


def first_line(err: BaseException) -> str:
    """What went wrong, in one line of bounded length."""
    text = str(err).strip().split("\n")[0]
    return f"{type(err).__name__}: {text[:200]}" if text else type(err).__name__
