"""A toy group for tests of `pytest --benchmark`: the sum of eight numbers, by candidates that can be told to be wrong or slow."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from vlmops.backends import ranges
from vlmops.profiling.suite.chosen import Chosen
from vlmops.profiling.suite.group import Candidate, LeftOut, Setting
from vlmops.profiling.timing import Work

#: Who was called, in order, since a test emptied it.
CALLS: list[str] = []
#: Candidate -> from which of its calls on its sum is wrong.
WRONG_FROM: dict[str, int] = {}
#: Candidate -> what making it ready raises.
RAISES: dict[str, Exception] = {}
SECONDS = {"vlmops": 1e-3, "torch": 2e-3, "compile": 3e-3}


@dataclass(frozen=True)
class Toy:
    """The group; ``key`` is also its size in words."""

    key: str = "toy"
    what: str = "sum"
    kind: str = "op"

    def chosen(self, chosen: Chosen) -> bool:
        return not (chosen.quick and self.key == "long")

    def label(self, chosen: Chosen) -> str:
        return f"{self.key}, n 8"

    def names(self, chosen: Chosen) -> tuple[str, ...]:
        return ("vlmops", *(peer for peer in chosen.peers if not self.absent(peer)))

    def absent(self, peer: str) -> str:
        return "" if peer in SECONDS or peer == "liger" else "no export is written for it"

    def build(self, dtype: str, chosen: Chosen) -> Setting:
        make = {name: lambda name=name: self._make(name) for name in SECONDS}
        return Setting({**make, "liger": self._liger}, self._check, lambda: Work(8.0, 32.0), lambda: "toy backend")

    def _make(self, name: str) -> Candidate:
        if name in RAISES:
            raise RAISES[name]
        made = 0

        def call() -> torch.Tensor:
            nonlocal made
            made += 1
            CALLS.append(name)
            if ranges.ACTIVE is not None:
                with ranges.ACTIVE.range("op", "sum"):
                    pass
            time.sleep(SECONDS[name])
            return torch.ones(8).sum() + (made >= WRONG_FROM.get(name, 10**9))

        return Candidate([call])

    def _liger(self) -> Candidate:
        raise LeftOut("it needs a GPU")

    def _check(self, name: str, output: torch.Tensor) -> str:
        return "" if float(output) == 8.0 else f"{float(output)} is not 8"
