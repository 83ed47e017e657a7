"""The checked-in budgets of the compiled kernels (benchmarks/budgets), by the name a profiler sees."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from vlmops.profiling.nsight.errors import ProfileFileError

__all__ = ["Budgets", "Verdict", "load"]

FOLDER = Path(__file__).resolve().parents[3] / "benchmarks" / "budgets"
FORMAT = 1


@dataclass(frozen=True)
class Entry:
    """A compiled kernel: of which op, for which architecture, with how many registers a thread and bytes of shared memory."""

    op: str
    arch: str
    registers: int
    shared: int


@dataclass(frozen=True)
class Verdict:
    """A measured kernel beside its budgets.

    Args:
        status: "within" their span, "above" or "below" it in registers or shared memory, or "none": there is no budget.
        text: the same in words.
    """

    status: str
    text: str


@dataclass(frozen=True)
class Budgets:
    """Every budget, by kernel name. A Triton kernel has one for each case it was compiled for; a CUDA kernel has exactly one."""

    kernels: dict[str, tuple[Entry, ...]]

    def op(self, kernel: str) -> str | None:
        """The op a kernel belongs to; None: not ours, or several ops share it."""
        ops = {entry.op for entry in self.kernels.get(kernel, ())}
        return ops.pop() if len(ops) == 1 else None

    def compare(self, kernel: str, capability: str | None, registers: int | None, shared: int | None) -> Verdict:
        """Registers and shared memory of a launch against what its compiler was seen to use.

        Args:
            kernel: its name, without parameters.
            capability: "9.0".
            registers: of a thread.
            shared: bytes of static and dynamic shared memory of a block.
        """
        entries = self.kernels.get(kernel, ())
        if not entries:
            return Verdict("none", "no kernel of ours")
        if capability is None:
            return Verdict("none", "the file does not say which GPU")
        arch = "sm_" + capability.replace(".", "")
        here = [entry for entry in entries if entry.arch in (arch, f"{arch}a")]
        if not here:
            return Verdict("none", f"no budget for {arch}")
        words, states = [], set()
        for what, value, budget in (
            ("registers", registers, [entry.registers for entry in here]),
            ("B shared", shared, [entry.shared for entry in here]),
        ):
            if value is None:
                continue
            least, most = min(budget), max(budget)
            states.add("above" if value > most else "below" if value < least else "within")
            span = f"{least}" if least == most else f"{least}..{most}"
            words.append(f"{value} {what}, budget {span}")
        if not words:
            return Verdict("none", "neither registers nor shared memory were recorded")
        worst = next(state for state in ("above", "below", "within") if state in states)
        return Verdict(worst, "; ".join(words))


def load(folder: Path = FOLDER) -> Budgets:
    """triton.json and cuda.json of a folder; those that are not there (an installed package has none) are left out.

    Raises:
        ProfileFileError: one is there and cannot be read.
    """
    return _load(folder)


@lru_cache(maxsize=4)
def _load(folder: Path) -> Budgets:
    found: dict[str, list[Entry]] = {}
    for path in (folder / "triton.json", folder / "cuda.json"):
        if not path.is_file():
            continue
        try:
            data = json.loads(path.read_text())
            if data["format"] != FORMAT:
                raise ValueError(f"format {data['format']}, expected {FORMAT}")
            tables: list[dict[str, Any]] = [data["kernels"]] if "kernels" in data else list(data["nvcc"].values())
            for table in tables:
                for title, archs in table.items():
                    parts = title.split(" | ")
                    kernel = parts[-1].partition(" #")[0]
                    for arch, row in archs.items():
                        entry = Entry(parts[0], arch, int(row["registers"]), int(row["shared"]))
                        found.setdefault(kernel, []).append(entry)
        except (ValueError, KeyError, TypeError, AttributeError) as err:
            raise ProfileFileError(path, f"no budget file of format {FORMAT}: {err}") from err
    return Budgets({name: tuple(entries) for name, entries in found.items()})
